"""One evaluation from sources to ``linear.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import provenance
from common.config import to_plain
from common.errors import require
from common.files import read_json, write_json
from pretrain import collectives as dist
from pretrain.data.shards import ShardIndex, Subset
from pretrain.engine import checkpoint, rendezvous, run_folder
from pretrain.engine.device import choose_device
from pretrain.evaluation.knn import knn_grid
from pretrain.evaluation.linear import heads as cached
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.extract import Blocks, Branch, Extractor, FeatureFile, extract, load
from pretrain.evaluation.linear.full import NAME as CHECKPOINT
from pretrain.evaluation.linear.full import FullTraining
from pretrain.evaluation.linear.sets import open_sets, write_list

FORMAT = "fa-linear-1"
NAME = "linear.json"
SUBSET = "subset.txt"
_KS = (1, 5, 10, 20, 50, 100, 200)
_TEMPERATURES = (0.03, 0.07, 0.1, 0.2, 1.0)
# k and temperature of the figure that is compared: fixed beforehand, as in the run's own probe.
HEADLINE = (20, 0.07)
# Keys that decide rounding or speed, or what is read from elsewhere.
_NOT_COMPARED = ("device", "num_workers", "subset_list", "checkpoint_every_steps")
_NO_FIGURES: dict[str, Any] = {
    "selection": None, "rates": [], "chosen": None, "chosen_base_lr": None, "refitted": False,
    "knn": None, "top1": None, "top5": None, "training_top1": None, "n": 0, "per_class": {},
}  # fmt: skip


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, on what, and where the result goes.

    Attributes:
        source: As ``extract.load`` takes it.
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
        request: What to evaluate.
        config: How.
    Raises:
        UserError: Anything that cannot work; ``out`` holds an evaluation and is not resumed.
    """

    def __init__(self, request: EvaluationRequest, config: LinearConfig) -> None:
        self.request, self.config = request, config
        self.device = choose_device(config.device)
        rendezvous.start(self.device.type)
        for name in (NAME, CHECKPOINT):
            require(
                request.resume or not (request.out / name).exists(),
                f"{request.out} holds an evaluation already ({name}): go on with --resume, or "
                "choose another --out",
            )
        request.out.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}
        with self._timed("open"):
            self.frozen = load(request.source, branch=request.branch, seed=config.seed)
            self.sets = open_sets(request.train, request.val, config)
        self.extractor = Extractor(self.frozen, config, self.device)
        self.feature_bytes = self.num_rows_found = 0
        self.identity = {
            "weights": self.frozen.weights_hash,
            "train": self.sets.chosen.fingerprint,
            "val": self.sets.val.fingerprint,
            "image_size": self.extractor.image_size,
            "config": {k: v for k, v in to_plain(config).items() if k not in _NOT_COMPARED},
        }

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the wall time of what is done within to a part of the work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def run(self) -> dict[str, Any] | None:
        """The result, written to ``linear.json``; None in all processes but the first.

        Raises:
            UserError: Another evaluation stands in ``out``, or a picture does not decode.
            StoppedBySignal: After the state was saved.
        """
        out, is_main = self.request.out, dist.rank() == 0
        lock = run_folder.hold(out) if is_main else None
        try:
            if (out / NAME).exists():  # finished
                result = read_json(out / NAME)
                changes = checkpoint.different_keys(result.get("identity", {}), self.identity)
                require(
                    not changes,
                    f"{out / NAME} is of another evaluation: {'; '.join(changes)}. Choose another "
                    "--out",
                )
                return result if is_main else None
            if is_main and len(self.sets.chosen.sample_ids) < self.sets.train.num_samples:
                write_list(self.sets.train, self.sets.chosen.sample_ids, out / SUBSET)
            figures = self._full() if self.config.protocol == "full" else self._on_features()
            if not is_main or figures is None:
                return None
            result = json.loads(json.dumps(self._description() | figures | self._costs()))
            write_json(out / NAME, result)
            return result
        finally:
            self.sets.close()
            if lock is not None:
                lock.close()

    def _full(self) -> dict[str, Any] | None:
        training = FullTraining(
            self.extractor, self.sets, self.config, self.request.out, self.identity, self.device,
            resume=self.request.resume,
        )  # fmt: skip
        with self._timed("train"):
            training.train()
        held_out, part = None, Subset(self.sets.train, self.sets.held_out)
        central = self._features("held_out", part, 0) if part.num_samples else None
        val = self._features("val", self.sets.val, 0)
        if not self._stays():
            return None
        with self._timed("evaluate"):
            if central is not None:
                held_out = cached.score(training.heads, central, part.labels)
            figures = cached.score(training.heads, val, self.sets.val.labels)
        return self._linear(held_out, figures) | {"training_top1": training.curve}

    def _stays(self) -> bool:
        """Whether this process does the rest, which takes one."""
        is_main = dist.rank() == 0
        rendezvous.stop()
        return is_main

    def _on_features(self) -> dict[str, Any] | None:
        passes = self.config.passes if self.config.protocol == "cached" else 0
        train = central = self._features("train", self.sets.chosen, passes)
        if passes and len(self.sets.held_out):
            central = self._features("train", self.sets.chosen, 0, "extract_central")
        val = self._features("val", self.sets.val, 0)
        if not self._stays():
            return None
        if self.config.protocol == "knn":
            return self._knn(train, val)
        return self._cached(train, central, val)

    def _features(
        self, name: str, samples: Subset | ShardIndex, passes: int, part: str | None = None
    ) -> FeatureFile:
        """The features of a set, computed as far as the file lacks them."""
        with self._timed(part or f"extract_{name}"):
            blocks = Blocks(samples, self.extractor.image_size, passes, self.config)
            view = dict(self.extractor.view)
            if passes:
                view["crop"] = self._random_crop() | {"seed": self.config.seed, "passes": passes}
            facts = {"weights_hash": self.frozen.weights_hash, "samples": samples.fingerprint}
            file = FeatureFile(
                self.request.features or self.request.out / "features", name, blocks.num_rows,
                self.extractor.dim, self.config.feature_dtype, facts | {"view": view},
            )  # fmt: skip
            self.feature_bytes += file.num_bytes
            self.num_rows_found += file.num_found
            extract(self.extractor, blocks, file, f"{name} features", self.config.num_workers)
        return file

    def _random_crop(self) -> dict[str, Any]:
        scale = list(self.config.crop_scale)
        return {"random_resized_crop": scale, "flip": self.config.flip_probability}

    def _cached(self, train: FeatureFile, central: FeatureFile, val: FeatureFile) -> dict[str, Any]:
        config, sets, device = self.config, self.sets, self.device
        chosen, labels = sets.chosen.sample_ids, sets.chosen.labels
        fitted, held_out = (np.searchsorted(chosen, x) for x in (sets.fitted, sets.held_out))
        shape = (self.extractor.dim, sets.num_classes)
        with self._timed("sweep"):
            heads = cached.LinearHeads(config, *shape, config.peak_rates(), device)
            cached.train(heads, train, labels, fitted)
        selection = None
        with self._timed("evaluate"):
            if len(held_out):
                selection = cached.score(heads, central, labels, held_out)
            figures = cached.score(heads, val, sets.val.labels)
        result = self._linear(selection, figures)
        if selection is None or not config.refit:
            return result
        with self._timed("refit"):
            rate = config.peak_rates()[result["chosen"]]
            heads = cached.LinearHeads(config, *shape, [rate], device)
            cached.train(heads, train, labels, np.arange(len(labels)), title="refit")
            figures = cached.score(heads, val, sets.val.labels)
        return result | self._final(figures, 0) | {"refitted": True}

    def _linear(self, held_out: dict[str, Any] | None, val: dict[str, Any]) -> dict[str, Any]:
        """Figures of classifiers: each rate's, and which one the held-out part chose."""
        base, peak = self.config.rates(), self.config.peak_rates()
        chosen = cached.best(held_out["top1"], base) if held_out else 0
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
        by = "held-out part of the training set"
        selection = {"by": by, "n": held_out["n"]} if held_out else None
        own = {"selection": selection, "rates": rates, "chosen": chosen}
        return _NO_FIGURES | own | {"chosen_base_lr": base[chosen]} | self._final(val, chosen)

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
        require(
            max(ks) <= num,
            f"knn_k={max(ks)}, but only {num} training samples are used; lower it",
        )
        with self._timed("neighbours"):
            bank, labels, queries, query_labels = map(
                torch.from_numpy,
                (train.whole(), self.sets.chosen.labels, val.whole(), self.sets.val.labels),
            )
            top1 = knn_grid(
                bank, labels, queries, query_labels, ks=ks, temperatures=temperatures,
                device=self.device,
            )  # fmt: skip
        k, temperature = HEADLINE
        is_there = k in ks and temperature in temperatures
        headline = top1[ks.index(k)][temperatures.index(temperature)] if is_there else None
        knn = {"ks": ks, "temperatures": temperatures, "top1": top1, "headline": list(HEADLINE)}
        return _NO_FIGURES | {"knn": knn, "top1": headline, "n": self.sets.val.num_samples}

    def _description(self) -> dict[str, Any]:
        """What was evaluated, on what, and how."""
        config, sets, view = self.config, self.sets, self.extractor.view
        is_cropped = config.protocol == "full" or (config.protocol == "cached" and config.passes)
        training_view = self._random_crop() if is_cropped else {"crop": view["crop"]}
        data: dict[str, Any] = {
            part: {"name": index.name, "fingerprint": index.fingerprint,
                   "num_samples": index.num_samples}
            for part, index in (("train", sets.train), ("val", sets.val))
        }  # fmt: skip
        data["train"] |= {"num_used": sets.chosen.num_samples, "num_held_out": len(sets.held_out)}
        return {
            "format": FORMAT,
            "protocol": config.protocol,
            "identity": self.identity,
            "checkpoint": self.frozen.description(),
            "preprocessing": {**view, "training": training_view},
            "data": data | {"num_classes": sets.num_classes},
            "config": to_plain(config),
        }

    def _costs(self) -> dict[str, Any]:
        is_cpu = self.device.type == "cpu"
        return {
            "seconds": self.seconds,
            "peak_memory_bytes": provenance.peak_memory_bytes(),
            "peak_gpu_memory_bytes": None if is_cpu else torch.cuda.max_memory_allocated(),
            "feature_bytes": self.feature_bytes,
            "num_feature_rows_found": self.num_rows_found,
            "device": "cpu" if is_cpu else torch.cuda.get_device_name(),
            "versions": provenance.versions(),
        }


def table(result: dict[str, Any]) -> str:
    """The figures for people, in percent."""
    checkpoint, data, knn = result["checkpoint"], result["data"], result["knn"]
    lines = [
        f"{result['protocol']} evaluation of {checkpoint['name']}"
        + (f" ({checkpoint['branch']})" if checkpoint["branch"] else ""),
        f"{data['train']['num_used']:,} of {data['train']['num_samples']:,} labels, "
        f"{data['val']['num_samples']:,} validation pictures, {data['num_classes']} classes",
        "",
    ]
    if knn:
        title = "k, temperature"
        lines.append(f"{title:>16}" + "".join(f"{t:>9g}" for t in knn["temperatures"]))
        for k, row in zip(knn["ks"], knn["top1"], strict=True):
            lines.append(f"{k:>16}" + "".join(f"{_percent(value):>9}" for value in row))
        lines.append("")
    else:
        lines += _linear_lines(result)
    total = sum(result["seconds"].values())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["seconds"].items())
    lines.append(f"{total:.1f} s ({parts}); peak {result['peak_memory_bytes'] / 1e6:,.0f} MB")
    return "\n".join(lines)


def _linear_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{'base rate':>12}{'held out':>10}{'val top-1':>11}{'val top-5':>11}"]
    is_selected = result["selection"] is not None
    for number, row in enumerate(result["rates"]):
        is_chosen = is_selected and number == result["chosen"]
        mark = "  chosen by the held-out part" if is_chosen else ""
        lines.append(
            f"{row['base_lr']:>12.4g}{_percent(row['held_out_top1']):>10}"
            f"{_percent(row['val_top1']):>11}{_percent(row['val_top5']):>11}{mark}"
        )
    # The best rate may lie outside the sweep.
    rates = [row["base_lr"] for row in result["rates"]]
    ends = {min(rates): "lowest of the sweep: lower lr_min",
            max(rates): "highest of the sweep: raise lr_max"}  # fmt: skip
    if is_selected and (end := ends.get(result["chosen_base_lr"])):
        lines.append(f"note: the chosen rate is the {end}, there may be a better one")
    again = ", trained again with the held-out part" if result["refitted"] else ""
    lines.append(
        f"\ntop-1 {_percent(result['top1'])} %, top-5 {_percent(result['top5'])} % of "
        f"{result['n']:,}{again}"
    )
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
