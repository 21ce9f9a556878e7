"""One evaluation from sources to ``linear.json``."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import checkpoints, files, provenance
from common.config import to_plain
from common.errors import UserError, no_such_file, require
from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.data.loader import Loader, ViewDataset
from pretrain.data.random_numbers import draw_uniforms
from pretrain.data.shards import Samples, ShardIndex, Subset, num_classes, open_labelled
from pretrain.engine import checkpoint
from pretrain.engine.checkpoint import Checkpoints, different_keys
from pretrain.engine.guards import StopOnSignal
from pretrain.engine.run_folder import ProgressLog
from pretrain.engine.trainer import Batches, Trainer
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.features import Branch, Features, FrozenBackbone, extract
from pretrain.evaluation.linear.heads import CropBatches, LinearHeads, StoredBatches, score
from pretrain.evaluation.probe import knn_grid

FORMAT = "fa-linear-1"
NAME = "linear.json"
SUBSET = "subset.txt"
IDENTITY = "identity.json"  # what the checkpoint belongs to
LOG_EVERY_STEPS = 10  # several processes agree on a signal there
_KS = (1, 5, 10, 20, 50, 100, 200)
_TEMPERATURES = (0.03, 0.07, 0.1, 0.2, 1.0)
# k and temperature of the figure that is compared: fixed beforehand, as in the run's own probe.
HEADLINE = (20, 0.07)
# What stands in the result where a protocol has no such figure.
_NO_FIGURES: dict[str, Any] = {
    "selection": None, "rates": [], "chosen": None, "chosen_base_lr": None, "refitted": False,
    "knn": None, "top5": None, "training_top1": None, "per_class": {},
}  # fmt: skip
# Keys that decide rounding or speed, or what is read from elsewhere: image_size is in the view.
_NOT_COMPARED = ("device", "num_workers", "subset_list", "checkpoint_every_steps", "image_size")


# -- which samples are trained on, which select the rate, and which are scored --


@dataclass(frozen=True)
class Sets:
    """Labelled samples.

    Attributes:
        train: Shards of the training set.
        val: Shards of the validation set, which decides nothing.
        classes: Names of both sets' classes; numbers where the shards name none.
        chosen: All training samples whose labels are used, those that are held out too.
        fitted: int64 [n], numbers in ``chosen`` of the samples that are trained on.
        held_out: int64 [m], those that select the rate; none where there is nothing to select.
    """

    train: ShardIndex
    val: ShardIndex
    classes: list[str]
    chosen: Subset
    fitted: np.ndarray
    held_out: np.ndarray

    def part(self, numbers: np.ndarray) -> Subset:
        """Some of the chosen samples as a set of their own."""
        return Subset(self.train, self.chosen.sample_ids[numbers])


def open_sets(train: str, val: str, config: LinearConfig) -> Sets:
    """Open and check both sets, choose the subset, and hold a part of it out.

    Raises:
        UserError: Samples without labels, other classes in the two sets, a subset list that does
            not fit, too few samples to hold any out.
    """
    train_index, val_index = open_labelled({"--train": train, "--val": val})
    classes, labels = train_index.classes, train_index.labels
    unseen = np.setdiff1d(val_index.labels, labels)
    names = [classes[i] if classes else str(i) for i in unseen[:3]]
    require(
        not names,
        f"--val {val_index.name} has samples of {', '.join(names)} ({len(unseen)} classes), of "
        f"which --train {train_index.name} has none: nothing can be learnt of that class",
    )
    hashes = train_index.samples["key"].astype(np.uint64).view(np.int64)
    chosen = np.arange(len(labels))
    if config.subset_list is not None:
        chosen = listed(train_index, Path(config.subset_list))
    elif config.fraction < 1:
        chosen = balanced(labels, hashes, config.fraction, seed=config.seed)
    held_out = np.empty(0, np.int64)
    if config.protocol != "knn" and len(config.rates()) > 1:
        held_out = stratified(labels[chosen], hashes[chosen], config.holdout, seed=config.seed)
        require(
            len(held_out) > 0,
            f"holdout={config.holdout}: no class of {train_index.name} has the two samples that "
            f"it takes to hold one out ({len(chosen)} are chosen); use more labels, or a single "
            "rate in lrs",
        )
    return Sets(
        train_index, val_index,
        classes=classes or [str(i) for i in range(num_classes(train_index, "--train"))],
        chosen=Subset(train_index, chosen),
        fitted=np.setdiff1d(np.arange(len(chosen)), held_out),
        held_out=held_out,
    )  # fmt: skip


def balanced(labels: np.ndarray, keys: np.ndarray, share: float, *, seed: int) -> np.ndarray:
    """The same number of samples of each class, a function of (seed, keys) alone.

    Each class gives round(share * samples / classes), or all it has. A sample's rank within its
    class does not depend on the share: the samples of 1 % are among those of 10 %.

    Args:
        labels: int64 [n].
        keys: int64 [n], hashed names of the samples.
        share: Of all samples, above 0 and below 1.
        seed: Another seed, another subset.
    Returns:
        int64, ascending positions in ``labels``.
    Raises:
        UserError: If that is less than one sample a class.
    """
    classes = np.unique(labels)
    each = round(share * len(labels) / len(classes))
    require(
        each >= 1,
        f"fraction={share:g} of {len(labels)} samples is less than one sample for each of "
        f"{len(classes)} classes; use at least {len(classes) / len(labels):.3g}",
    )
    return np.flatnonzero(_rank_in_class(labels, keys, "label-fraction", seed) < each)


def stratified(labels: np.ndarray, keys: np.ndarray, share: float, *, seed: int) -> np.ndarray:
    """About the same share of each class, at least one of every class with two samples.

    Args and result as ``balanced``.
    """
    counts = np.bincount(labels)
    due = np.maximum(np.rint(share * counts), 1).astype(np.int64)
    due = np.minimum(due, counts - 1)  # one stays to be trained on
    rank = _rank_in_class(labels, keys, "held-out", seed)
    return np.flatnonzero(rank < due[labels])


def _rank_in_class(labels: np.ndarray, keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Place of each sample in a random order of its class, from 0; int64 [n]."""
    draws = draw_uniforms(purpose, keys, 0, 1, seed=seed, view_index=0)[0]
    order = np.lexsort((keys, draws, labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels[order[0]] - 1))
    lengths = np.diff(starts, append=len(order))
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    return rank


def listed(index: ShardIndex, path: Path) -> np.ndarray:
    """The samples that a file names, one a line: official 1 % and 10 % lists, or one of ours.

    A line is a sample's key, or the last part of it; a suffix (``.JPEG``) is left out, as keys have
    none. Reads the headers of all shards.

    Returns:
        int64, ascending.
    Raises:
        UserError: File missing or empty, or a line that names no sample, or several.
    """
    require(path.is_file(), no_such_file(path, "give --subset-list a list", "file"))
    lines = {line.strip() for line in files.read_text(path).split("\n")}
    by_name: dict[str, list[int]] = {}
    for sample in range(index.num_samples):
        key = index.key_name(sample)
        for name in {key, key.rpartition("/")[2]}:
            by_name.setdefault(name, []).append(sample)
    listed_samples: set[int] = set()
    for line in sorted(line for line in lines if line and not line.startswith("#")):
        folder, slash, last = line.rpartition("/")
        without_suffix = f"{folder}{slash}{last.rpartition('.')[0] or last}"
        samples = by_name.get(line) or by_name.get(without_suffix) or []
        require(
            len(samples) == 1,
            f"subset list {path}: {line!r} names {len(samples)} samples of {index.name} (whose "
            f"first key is {index.key_name(0)!r}); each line must be the key of one sample",
        )
        listed_samples.add(samples[0])
    require(bool(listed_samples), f"subset list {path} is empty")
    return np.array(sorted(listed_samples), np.int64)


# -- the evaluation --


class Evaluation:
    """An evaluation that is ready to run: everything is opened and checked.

    Args:
        config: How.
        source: What to evaluate, as ``FrozenBackbone`` takes it.
        train: Shards of the training set.
        val: Shards of the validation set.
        out: Folder of the result.
        branch: Of a checkpoint with two networks.
        features: Folder of the features; None: ``out/features``.
        resume: Go on with what ``out`` holds; a finished result is given back.
        reading: As ``FrozenBackbone`` takes it.
    Raises:
        UserError: Anything that cannot work; another process works in ``out``; it holds another
            evaluation, or this one and ``resume`` is not set.
    """

    def __init__(
        self, config: LinearConfig, source: str, train: str, val: str, out: Path, *,
        branch: Branch = "online", features: Path | None = None, resume: bool = False,
        **reading: Any,
    ) -> None:  # fmt: skip
        self.config, self._out, self._features_folder = config, out, features or out / "features"
        self.device = dist.choose_device(config.device)
        dist.start(self.device.type)
        out.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        if dist.rank() == 0:
            self._lock.enter_context(files.held(out / files.LOCK))
        dist.wait()  # no process looks at what is there before
        exists = [(out / name).exists() for name in (NAME, checkpoint.NAME)]
        require(
            resume or not any(exists),
            f"{out} holds an evaluation already: go on with --resume, or choose another --out",
        )
        self._seconds: dict[str, float] = {}
        self._feature_bytes = 0
        with self._timed("open"):
            self.backbone = FrozenBackbone(
                source, config, branch=branch, device=self.device, **reading
            )
            self.sets = open_sets(train, val, config)
        self.identity = {
            "weights": self.backbone.description["weights_hash"],
            "train": self.sets.chosen.fingerprint,
            "val": self.sets.val.fingerprint,
            "view": {k: v for k, v in self.backbone.view.items() if k != "precision"},
            "config": {k: v for k, v in to_plain(config).items() if k not in _NOT_COMPARED},
        }
        self._finished = files.read_record_or_none(
            out / NAME, {"identity": dict, "top1": (*files.NUMBER, type(None))}
        )
        if exists[0] and not self._finished and dist.rank() == 0:
            print(f"warning: {out / NAME} is damaged, and is made again", file=sys.stderr)
        if any(exists):
            remedy = f"remove {out} and start again"
            form = {"identity": dict}
            known = self._finished or files.read_record(out / IDENTITY, form, remedy=remedy)
            changes = [
                line for line in different_keys(known["identity"], self.identity)
                if not line.startswith("config.image_size:")  # of an earlier version
            ]  # fmt: skip
            require(
                not changes,
                f"{out} holds another evaluation: {'; '.join(changes)}. Restore these values to "
                "resume, or choose another --out",
            )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the wall time of what is done within to a part of the work."""
        start = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def run(self) -> dict[str, Any] | None:
        """The result, written to ``linear.json``; None in all processes but the first.

        Raises:
            UserError: A picture does not decode, or knn_k is above the number of samples.
            StoppedBySignal: After the state was saved.
        """
        out, sets, is_main = self._out, self.sets, dist.rank() == 0
        with closing(sets.train), closing(sets.val), self._lock:
            if self._finished:
                return self._finished if is_main else None
            if is_main:
                files.write_json(out / IDENTITY, {"identity": self.identity})
                if sets.chosen.num_samples < sets.train.num_samples:
                    names = map(sets.chosen.key_name, range(sets.chosen.num_samples))
                    files.write_text(out / SUBSET, "".join(f"{name}\n" for name in names))
            protocols = {"full": self._full, "cached": self._cached, "knn": self._knn}
            figures = protocols[self.config.protocol]()
            if figures is None:
                return None
            result = json.loads(json.dumps(self._result(figures)))
            files.write_json(out / NAME, result)
            return result

    # -- the protocols: figures, or None in a process that the end does not need --

    def _full(self) -> dict[str, Any] | None:
        """The published protocol: pictures are cropped and pass the network in every epoch."""
        config, sets = self.config, self.sets
        dataset = ViewDataset(
            sets.part(sets.fitted), image_size=self.backbone.view["image_size"],
            views=(config.view_policy,), seed=config.seed,
        )  # fmt: skip
        loader = Loader(
            dataset, batch_size=config.batch_size, rank=dist.rank(), world_size=dist.world_size(),
            num_workers=config.num_workers, shuffle_window=config.shuffle_window,
            last_batch=config.last_batch,
        )  # fmt: skip
        batches = CropBatches(loader, self.backbone)
        heads = self._train("train", batches, config.peak_rates(), self._out)
        held_out = sets.part(sets.held_out)
        central = self._features("held_out", held_out) if held_out.num_samples else None
        val = self._features("val", sets.val)
        if not self._is_needed():
            return None
        rows = np.arange(held_out.num_samples)
        training_top1 = (heads.num_right / heads.num_seen).tolist()
        return self._choice(heads, val, central, rows) | {"training_top1": training_top1}

    def _cached(self) -> dict[str, Any] | None:
        """Classifiers on stored features, and once more at the chosen rate with all labels."""
        config, sets, out = self.config, self.sets, self._out
        rates = config.peak_rates()
        stored = central = self._features("train", sets.chosen, config.passes)
        if config.passes and len(sets.held_out):
            central = self._features("train", sets.chosen, part="extract_central")
        val = self._features("val", sets.val)
        if not self._is_needed():
            return None
        heads = self._train("sweep", StoredBatches(stored, sets.fitted, config), rates, out)
        result = self._choice(heads, val, central, sets.held_out)
        if not (len(sets.held_out) and config.refit):
            return result
        batches = StoredBatches(stored, np.arange(sets.chosen.num_samples), config)
        heads = self._train("refit", batches, [rates[result["chosen"]]], out / "refit")
        (scores,) = score(heads, val, sets.classes, np.arange(sets.val.num_samples))
        return result | asdict(scores) | {"refitted": True}

    def _knn(self) -> dict[str, Any] | None:
        """Every k with every temperature."""
        num = self.sets.chosen.num_samples
        ks = self.config.knn_k or [k for k in _KS if k <= num]
        temperatures = self.config.knn_temperature or list(_TEMPERATURES)
        require(max(ks) <= num, f"knn_k={max(ks)}, but only {num} training samples are used")
        train, val = self._features("train", self.sets.chosen), self._features("val", self.sets.val)
        if not self._is_needed():
            return None
        with self._timed("neighbours"):
            arrays = train.values, train.labels, val.values, val.labels
            top1 = knn_grid(
                *map(torch.from_numpy, arrays), ks=ks, temperatures=temperatures, device=self.device
            )
        k, temperature = HEADLINE
        is_there = k in ks and temperature in temperatures
        headline = top1[ks.index(k)][temperatures.index(temperature)] if is_there else None
        knn = {"ks": ks, "temperatures": temperatures, "top1": top1, "headline": list(HEADLINE)}
        return {"knn": knn, "top1": headline, "n": self.sets.val.num_samples}

    # -- their parts --

    def _features(
        self, name: str, samples: Samples, passes: int = 0, part: str | None = None
    ) -> Features:
        """The features of a set, computed as far as the file lacks them."""
        with self._timed(part or f"extract_{name}"):
            features = extract(
                self.backbone, samples, name, self.config, self._features_folder, passes=passes
            )
        self._feature_bytes += features.values.nbytes
        return features

    def _is_needed(self) -> bool:
        """Whether this process does the rest, which takes one; the group ends."""
        is_main = dist.rank() == 0
        dist.stop()
        return is_main

    def _train(self, part: str, batches: Batches, rates: list[float], folder: Path) -> LinearHeads:
        """Classifiers at the end of the last epoch; exact resume from the folder's checkpoint."""
        config, device = self.config, self.device
        dim, num_classes = self.backbone.model.output_dim, len(self.sets.classes)
        heads = LinearHeads(config, rates, dim, num_classes, batches.num_steps, device)
        folder.mkdir(exist_ok=True)
        engine = EngineConfig(
            log_every_steps=LOG_EVERY_STEPS,
            checkpoint_every_steps=config.checkpoint_every_steps,
            keep_checkpoints=0,
        )
        log, writer = ProgressLog(part), Checkpoints(folder, engine)
        parts = [log, StopOnSignal(log, writer), writer]
        trainer = Trainer(heads, batches, parts, config.epochs, engine, device)
        path = folder / checkpoint.NAME
        if path.exists():
            try:
                state = checkpoints.read(path)
                checkpoints.check_sum(state, path)
            except UserError as error:  # they cost minutes
                log.notes.append(f"{error}. These classifiers are trained from the start")
            else:
                trainer.load_state_dict(state)
        with closing(batches), self._timed(part):
            trainer.train()
        return heads

    def _choice(
        self, heads: LinearHeads, val: Features, central: Features | None, rows: np.ndarray
    ) -> dict[str, Any]:
        """Figures of each rate, and of the one that is best on the held-out part.

        Of equal rates the lowest is chosen.

        Args:
            heads: A classifier for each rate.
            val: Features of the validation set, which decides nothing.
            central: Those that the held-out part is among.
            rows: Of the held-out part; none where there is nothing to select.
        """
        base, peak, classes = self.config.rates(), self.config.peak_rates(), self.sets.classes
        held_out, selection, chosen = [None] * len(base), None, 0
        with self._timed("evaluate"):
            if central is not None and len(rows):
                held_out = [scores.top1 for scores in score(heads, central, classes, rows)]
                chosen = min(range(len(base)), key=lambda i: (-held_out[i], base[i]))
                selection = {"by": "held-out part of the training set", "n": len(rows)}
            scores = score(heads, val, classes, np.arange(len(val.labels)))
        keys = ("base_lr", "peak_lr", "held_out_top1", "val_top1", "val_top5")
        columns = base, peak, held_out, [s.top1 for s in scores], [s.top5 for s in scores]
        rates = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
        choice = {"selection": selection, "chosen": chosen, "chosen_base_lr": base[chosen]}
        return {"rates": rates, **choice, **asdict(scores[chosen])}

    def _result(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The figures, what was evaluated, on what, and how, and what it cost."""
        config, sets, view = self.config, self.sets, self.backbone.view
        is_cpu = self.device.type == "cpu"
        is_cropped = config.protocol == "full" or (config.protocol == "cached" and config.passes)
        data: dict[str, Any] = {
            part: {"name": index.name, "fingerprint": index.fingerprint,
                   "num_samples": index.num_samples}
            for part, index in (("train", sets.train), ("val", sets.val))
        }  # fmt: skip
        data["train"] |= {"num_used": sets.chosen.num_samples, "num_held_out": len(sets.held_out)}
        training_view = config.random_crop if is_cropped else {"crop": view["crop"]}
        return {
            "format": FORMAT,
            "protocol": config.protocol,
            "identity": self.identity,
            "checkpoint": self.backbone.description,
            "preprocessing": {**view, "training": training_view},
            "data": data | {"num_classes": len(sets.classes)},
            "config": to_plain(config),
            **_NO_FIGURES,
            **figures,
            "seconds": self._seconds,
            "peak_memory_bytes": provenance.peak_memory_bytes(),
            "peak_gpu_memory_bytes": None if is_cpu else torch.cuda.max_memory_allocated(),
            "feature_bytes": self._feature_bytes,
            "device": "cpu" if is_cpu else torch.cuda.get_device_name(),
            "versions": provenance.versions(),
        }


def table(result: dict[str, Any]) -> str:
    """The figures for people, in percent."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    source, data, knn = result["checkpoint"], result["data"], result["knn"]
    lines = [
        f"{result['protocol']} evaluation of {source['name']}",
        f"{data['train']['num_used']:,} of {data['train']['num_samples']:,} labels, "
        f"{data['val']['num_samples']:,} validation pictures, {data['num_classes']} classes",
    ]
    if knn:
        lines.append("k, temperature  " + "".join(f"{t:>9g}" for t in knn["temperatures"]))
        for k, row in zip(knn["ks"], knn["top1"], strict=True):
            lines.append(f"{k:>16}" + "".join(f"{percent(value):>9}" for value in row))
    else:
        lines.append(f"{'base rate':>12}{'held out':>10}{'val top-1':>11}{'val top-5':>11}")
        for row in result["rates"]:
            lines.append(
                f"{row['base_lr']:>12.4g}{percent(row['held_out_top1']):>10}"
                f"{percent(row['val_top1']):>11}{percent(row['val_top5']):>11}"
            )
        if result["selection"] is not None:
            rates, chosen = [row["base_lr"] for row in result["rates"]], result["chosen_base_lr"]
            lines.append(f"the held-out part chose {chosen:.4g}")
            if chosen in (min(rates), max(rates)):
                lines.append("note: that is an end of the sweep, there may be a better rate beyond")
        again = ", trained again with the held-out part" if result["refitted"] else ""
        top1, top5 = percent(result["top1"]), percent(result["top5"])
        lines.append(f"top-1 {top1} %, top-5 {top5} % of {result['n']:,}{again}")
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    lines.append(f"seconds: {seconds}; peak memory {result['peak_memory_bytes'] / 1e6:,.0f} MB")
    return "\n".join(lines)
