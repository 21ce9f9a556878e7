"""Which samples are trained on, which select the rate, and which are scored in the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import require
from pretrain.data.random_numbers import draw_uniforms
from pretrain.data.shards import ShardIndex, Subset, open_labelled
from pretrain.evaluation.linear.config import LinearConfig


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

    def close(self) -> None:
        """Close the open shards."""
        self.train.close()
        self.val.close()


def open_sets(train: str, val: str, config: LinearConfig) -> Sets:
    """Open and check both sets, choose the subset, and hold a part of it out.

    Raises:
        UserError: Samples without labels, other classes in the two sets, a subset list that does
            not fit, too few samples to hold any out.
    """
    train_index, val_index = open_labelled({"--train": train, "--val": val})
    classes, labels = train_index.classes, train_index.labels
    unseen = np.setdiff1d(val_index.labels, labels)
    names = [classes[i] if classes else str(i) for i in unseen]
    require(
        not names,
        f"--val {val_index.name} has samples of {', '.join(names[:3])}{', ..' if names[3:] else ''}"
        f" ({len(names)} classes), of which --train {train_index.name} has none: nothing can be "
        "learnt of that class",
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
        classes=classes or [str(i) for i in range(int(labels.max()) + 1)],
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
    require(path.is_file(), f"subset list {path} does not exist")
    lines = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
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
            f"subset list {path}: {line!r} names {len(samples) or 'no'} "
            f"{'samples' if samples else 'sample'} of {index.name} (whose first key is "
            f"{index.key_name(0)!r}); each line must be the key of one sample",
        )
        listed_samples.add(samples[0])
    require(bool(listed_samples), f"subset list {path} is empty")
    return np.array(sorted(listed_samples), np.int64)
