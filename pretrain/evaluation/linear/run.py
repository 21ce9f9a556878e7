"""One evaluation from sources to ``linear.json``."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import provenance
from common.errors import UserError
from common.files import write_json
from pretrain import collectives as dist
from pretrain.data.shards import ShardIndex, Subset
from pretrain.engine import checkpoint, rendezvous, run_folder
from pretrain.engine.device import choose_device
from pretrain.evaluation.knn import knn_grid
from pretrain.evaluation.linear import heads as cached
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.extract import (
    Blocks,
    Branch,
    Extractor,
    FeatureFile,
    Frozen,
    Identity,
    extract,
    load,
)
from pretrain.evaluation.linear.full import NAME as CHECKPOINT
from pretrain.evaluation.linear.full import FullTraining
from pretrain.evaluation.linear.heads import best
from pretrain.evaluation.linear.sets import Sets, open_sets, write_list

FORMAT = "fa-linear-1"
NAME = "linear.json"
_NUM_SHOWN = 3  # classes at either end


class Clock:
    """Time by part of the work.

    Attributes:
        seconds: Wall time of each part.
        processor_seconds: Of this process and of its workers that ended in that part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what is done within."""
        wall, processor = time.perf_counter(), _processor_seconds()
        try:
            yield
        finally:
            for table, value in (
                (self.seconds, time.perf_counter() - wall),
                (self.processor_seconds, _processor_seconds() - processor),
            ):
                table[name] = table.get(name, 0.0) + value


def _processor_seconds() -> float:
    """Of this process and its ended children, user and system."""
    own, ended = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def gpu_bytes(device: torch.device) -> int | None:
    """Peak memory of the GPU; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def table(result: dict[str, Any]) -> str:
    """The figures for people, in percent."""
    checkpoint, data = result["checkpoint"], result["data"]
    lines = [
        f"{result['protocol']} evaluation of {checkpoint['name']}"
        + (f" ({checkpoint['branch']})" if checkpoint["branch"] else ""),
        f"{data['train']['num_used']:,} of {data['train']['num_samples']:,} labels, "
        f"{data['val']['num_samples']:,} validation pictures, {data['num_classes']} classes",
        "",
    ]
    lines += _knn_lines(result["knn"]) if result["knn"] else _linear_lines(result)
    total = sum(result["seconds"].values())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["seconds"].items())
    lines.append(f"{total:.1f} s ({parts}); peak {result['peak_memory_bytes'] / 1e6:,.0f} MB")
    return "\n".join(lines)


def _knn_lines(knn: dict[str, Any]) -> list[str]:
    title = "k, temperature"
    head = f"{title:>16}" + "".join(f"{t:>9g}" for t in knn["temperatures"])
    rows = [
        f"{k:>16}" + "".join(f"{_percent(value):>9}" for value in row)
        for k, row in zip(knn["ks"], knn["top1"], strict=True)
    ]
    return [head, *rows, ""]


def _linear_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{'base rate':>12}{'held out':>10}{'val top-1':>11}{'val top-5':>11}"]
    for number, row in enumerate(result["rates"]):
        is_chosen = result["selection"] is not None and number == result["chosen"]
        lines.append(
            f"{row['base_lr']:>12.4g}{_percent(row['held_out_top1']):>10}"
            f"{_percent(row['val_top1']):>11}{_percent(row['val_top5']):>11}"
            f"{'  chosen by the held-out part' if is_chosen else ''}"
        )
    if result["selection"] is not None:
        lines += _edge(result)
    again = ", trained again with the held-out part" if result["refitted"] else ""
    lines.append(
        f"\ntop-1 {_percent(result['top1'])} %, top-5 {_percent(result['top5'])} % of "
        f"{result['n']:,}{again}"
    )
    known = {name: x for name, x in result["per_class"].items() if x is not None}
    order = sorted(known, key=lambda name: known[name])
    worst, best = order[:_NUM_SHOWN], order[::-1][:_NUM_SHOWN]
    for title, names in (("worst", worst), ("best", best)):
        cells = ", ".join(f"{name} {_percent(known[name])}" for name in names)
        lines.append(f"{title} classes: {cells}")
    return lines


def _edge(result: dict[str, Any]) -> list[str]:
    """A note where the best rate may lie outside the sweep."""
    rates = [row["base_lr"] for row in result["rates"]]
    ends = {min(rates): "lowest of the sweep: lower lr_min",
            max(rates): "highest of the sweep: raise lr_max"}  # fmt: skip
    advice = ends.get(result["chosen_base_lr"])
    return [f"note: the chosen rate is the {advice}, there may be a better one"] if advice else []


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


SUBSET = "subset.txt"
_KS = (1, 5, 10, 20, 50, 100, 200)
_TEMPERATURES = (0.03, 0.07, 0.1, 0.2, 1.0)
HEADLINE = (20, 0.07)
"""k and temperature of the figure that is compared: fixed beforehand, as in the run's own probe."""
# Keys that decide rounding or speed, or what is read from elsewhere.
_NOT_COMPARED = ("device", "num_workers", "subset_list", "checkpoint_every_steps")


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        source: As ``frozen.load`` takes it.
        train: Shards of the training set.
        val: Shards of the validation set.
        out: Folder of the result.
        branch: Of a checkpoint of ours.
        features: Folder of the features; None: ``out/features``.
        resume: Go on with what ``out`` holds; a finished result is given back.
    """

    source: str
    train: str
    val: str
    out: Path
    branch: Branch = "online"
    features: Path | None = None
    resume: bool = False


class Evaluation:
    """An evaluation that is ready to run: everything is opened and checked.

    Args:
        request: What was asked for.
        config: How.
    Raises:
        UserError: Anything that cannot work.
    """

    def __init__(self, request: Request, config: LinearConfig) -> None:
        self.request, self.config = request, config
        self.device = choose_device(config.device)
        rendezvous.start(self.device.type)
        _prepare(request)
        self.clock = Clock()
        with self.clock.part("open"):
            self.frozen: Frozen = load(request.source, branch=request.branch, seed=config.seed)
            self.sets: Sets = open_sets(request.train, request.val, config)
        self.extractor = Extractor(self.frozen, config, self.device)
        self.feature_bytes = self.num_rows_found = 0

    def run(self) -> dict[str, Any] | None:
        """The result, written to ``linear.json``; None in all processes but the first.

        Raises:
            UserError: Another evaluation stands in ``out``, or a picture does not decode.
            StoppedBySignal: After the state was saved.
        """
        out, is_main = self.request.out, dist.rank() == 0
        lock = run_folder.hold(out) if is_main else None
        try:
            finished = self._finished()
            if finished is not None:
                return finished if is_main else None
            if is_main and len(self.sets.chosen.sample_ids) < self.sets.train.num_samples:
                write_list(self.sets.train, self.sets.chosen.sample_ids, out / SUBSET)
            figures = self._full() if self.config.protocol == "full" else self._on_features(is_main)
            if not is_main or figures is None:
                return None
            result = self._describe() | figures | self._costs()
            write_json(out / NAME, result)
            return result
        finally:
            self.sets.close()
            if lock is not None:
                lock.close()

    def _finished(self) -> dict[str, Any] | None:
        path = self.request.out / NAME
        if not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        changes = checkpoint.different_keys(result.get("identity", {}), self.identity())
        if changes:
            raise UserError(
                f"{path} is of another evaluation: {'; '.join(changes)}. Choose another --out"
            )
        return result

    def identity(self) -> dict[str, Any]:
        """What the figures follow from, as plain types."""
        config = {k: v for k, v in _plain(self.config).items() if k not in _NOT_COMPARED}
        return {
            "weights": self.frozen.weights_hash,
            "train": self.sets.chosen.fingerprint,
            "val": self.sets.val.fingerprint,
            "image_size": self.extractor.image_size,
            "config": config,
        }

    def _full(self) -> dict[str, Any]:
        training = FullTraining(
            self.extractor, self.sets, self.config, self.request.out, self.identity(), self.device,
            resume=self.request.resume,
        )  # fmt: skip
        with self.clock.part("train"):
            training.train()
        held_out = None
        with self.clock.part("evaluate"):
            if len(self.sets.held_out):
                held_out = training.score(Subset(self.sets.train, self.sets.held_out), "held out")
            val = training.score(self.sets.val, "validation")
        return self._linear(held_out, val) | {"training_top1": training.curve}

    def _on_features(self, is_main: bool) -> dict[str, Any] | None:
        passes = self.config.passes if self.config.protocol == "cached" else 0
        train = central = self._features("train", self.sets.chosen, passes)
        if passes and len(self.sets.held_out):
            central = self._features("train", self.sets.chosen, 0, "extract_central")
        val = self._features("val", self.sets.val, 0)
        rendezvous.stop()  # the rest takes one process
        if not is_main:
            return None
        if self.config.protocol == "knn":
            return self._knn(train, val)
        return self._cached(train, central, val)

    def _features(
        self, name: str, samples: Subset | ShardIndex, passes: int, part: str | None = None
    ) -> FeatureFile:
        with self.clock.part(part or f"extract_{name}"):
            blocks = Blocks(samples, self.extractor.image_size, passes, self.config)
            view = self.extractor.view()
            if passes:
                view["crop"] = self._random_crop() | {"seed": self.config.seed, "passes": passes}
            identity = Identity(
                self.frozen.weights_hash, samples.fingerprint, blocks.num_rows, self.extractor.dim,
                self.config.feature_dtype, view,
            )  # fmt: skip
            folder = self.request.features or self.request.out / "features"
            file = FeatureFile(folder, name, identity)
            self.feature_bytes += identity.num_bytes
            self.num_rows_found += file.num_found
            extract(self.extractor, blocks, file, f"{name} features", self.config.num_workers)
        return file

    def _random_crop(self) -> dict[str, Any]:
        scale = list(self.config.crop_scale)
        return {"random_resized_crop": scale, "flip": self.config.flip_probability}

    def _cached(self, train: FeatureFile, central: FeatureFile, val: FeatureFile) -> dict[str, Any]:
        config, sets = self.config, self.sets
        chosen, labels = sets.chosen.sample_ids, sets.chosen.labels
        fitted, held_out = (np.searchsorted(chosen, x) for x in (sets.fitted, sets.held_out))
        common: dict[str, Any] = {
            "config": config,
            "dim": self.extractor.dim,
            "num_classes": sets.num_classes,
            "device": self.device,
        }
        with self.clock.part("sweep"):
            heads = cached.train(train, labels, fitted, rates=config.peak_rates(), **common)
        selection = None
        val_rows, val_labels = np.arange(sets.val.num_samples), sets.val.labels
        with self.clock.part("evaluate"):
            if len(held_out):
                selection = cached.score(heads, central, labels, held_out, self.device)
            figures = cached.score(heads, val, val_labels, val_rows, self.device)
        result = self._linear(selection, figures)
        if selection is None or not config.refit:
            return result
        with self.clock.part("refit"):
            rates = [config.peak_rates()[result["chosen"]]]
            everything = np.arange(len(labels))
            heads = cached.train(train, labels, everything, rates=rates, title="refit", **common)
            figures = cached.score(heads, val, val_labels, val_rows, self.device)
        return result | self._final(figures, 0) | {"refitted": True}

    def _linear(self, held_out: dict[str, Any] | None, val: dict[str, Any]) -> dict[str, Any]:
        """Figures of classifiers: each rate's, and which one the held-out part chose."""
        base, peak = self.config.rates(), self.config.peak_rates()
        chosen = best(held_out["top1"], base) if held_out else 0
        rates = [
            {
                "base_lr": base[i],
                "peak_lr": peak[i],
                "held_out_top1": held_out["top1"][i] if held_out else None,
                "val_top1": val["top1"][i],
                "val_top5": val["top5"][i] if val["top5"] else None,
            }
            for i in range(len(base))
        ]
        selection = None
        if held_out:
            selection = {"by": "held-out part of the training set", "n": held_out["n"]}
        own: dict[str, Any] = {"selection": selection, "rates": rates, "chosen": chosen}
        own |= {"knn": None, "training_top1": None}
        own |= {"chosen_base_lr": base[chosen], "refitted": False}
        return own | self._final(val, chosen)

    def _final(self, val: dict[str, Any], number: int) -> dict[str, Any]:
        classes = self.sets.train.classes or [str(i) for i in range(self.sets.num_classes)]
        return {
            "top1": val["top1"][number],
            "top5": val["top5"][number] if val["top5"] else None,
            "n": val["n"],
            "per_class": dict(zip(classes, val["per_class"][number], strict=True)),
        }

    def _knn(self, train: FeatureFile, val: FeatureFile) -> dict[str, Any]:
        num = self.sets.chosen.num_samples
        ks = self.config.knn_k or [k for k in _KS if k <= num]
        temperatures = self.config.knn_temperature or list(_TEMPERATURES)
        if max(ks) > num:
            raise UserError(f"knn_k={max(ks)}, but only {num} training samples are used; lower it")
        with self.clock.part("neighbours"):
            top1 = knn_grid(
                train.whole(), torch.from_numpy(self.sets.chosen.labels), val.whole(),
                torch.from_numpy(self.sets.val.labels), ks=ks, temperatures=temperatures,
                device=self.device,
            )  # fmt: skip
        k, temperature = HEADLINE
        is_there = k in ks and temperature in temperatures
        headline = top1[ks.index(k)][temperatures.index(temperature)] if is_there else None
        knn = {"ks": ks, "temperatures": temperatures, "top1": top1, "headline": list(HEADLINE)}
        return {
            "selection": None, "rates": [], "chosen": None, "chosen_base_lr": None,
            "refitted": False, "knn": knn, "top1": headline, "top5": None, "training_top1": None,
            "n": self.sets.val.num_samples, "per_class": {},
        }  # fmt: skip

    def _describe(self) -> dict[str, Any]:
        sets, chosen = self.sets, self.sets.chosen
        view = self.extractor.view()
        training_view = {"crop": view["crop"]}
        if self.config.protocol == "full" or (
            self.config.protocol == "cached" and self.config.passes
        ):
            training_view = self._random_crop()
        return {
            "format": FORMAT,
            "protocol": self.config.protocol,
            "identity": self.identity(),
            "checkpoint": self.frozen.description(),
            "preprocessing": {**view, "training": training_view},
            "data": {
                "train": {"name": sets.train.name, "fingerprint": sets.train.fingerprint,
                          "num_samples": sets.train.num_samples, "num_used": chosen.num_samples,
                          "num_held_out": len(sets.held_out)},
                "val": {"name": sets.val.name, "fingerprint": sets.val.fingerprint,
                        "num_samples": sets.val.num_samples},
                "num_classes": sets.num_classes,
            },
            "config": _plain(self.config),
        }  # fmt: skip

    def _costs(self) -> dict[str, Any]:
        """Time, memory and disk.

        ``cost_over_one_pass``: processor time of one pass over the training set and of all that is
        trained on its features, over that of the pass. None where features were there already.
        """
        times = self.clock.processor_seconds
        one_pass = times.get("extract_train", 0.0)
        after = sum(times.get(part, 0.0) for part in ("sweep", "refit", "evaluate"))
        is_sweep = self.config.protocol == "cached" and not self.num_rows_found
        return {
            "seconds": self.clock.seconds,
            "processor_seconds": times,
            "cost_over_one_pass": (one_pass + after) / one_pass if is_sweep else None,
            "peak_memory_bytes": provenance.peak_memory_bytes(),
            "peak_gpu_memory_bytes": gpu_bytes(self.device),
            "feature_bytes": self.feature_bytes,
            "num_feature_rows_found": self.num_rows_found,
            "device": "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(),
            "versions": provenance.versions(),
        }


def _prepare(request: Request) -> None:
    """Make the folder, or refuse one that holds an evaluation.

    Raises:
        UserError: ``--resume`` was not given, and a result or a checkpoint is there.
    """
    for name in (NAME, CHECKPOINT):
        if (request.out / name).exists() and not request.resume:
            raise UserError(
                f"{request.out} holds an evaluation already ({name}): go on with --resume, or "
                "choose another --out"
            )
    request.out.mkdir(parents=True, exist_ok=True)


def _plain(config: LinearConfig) -> dict[str, Any]:
    """As it stands in JSON."""
    return json.loads(json.dumps(asdict(config)))
