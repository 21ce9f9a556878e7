"""Several shard sets as one, by weight; one set is the plain case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from pretrain.data.index import NO_LABEL
from pretrain.data.order import SourceSizes, stable_hash
from pretrain.data.shards import ShardIndex
from pretrain.data.sources.cache import CacheOptions


class Subset:
    """Chosen samples of a shard set, numbered anew in the order of their numbers there.

    It reads as `ShardIndex` does; keys stay those of the samples, so that each is augmented as in
    the whole set.

    Args:
        parent: The whole set.
        sample_ids: int64 [n], the chosen ones, each once.
    Attributes:
        sample_ids: int64 [n], ascending: the number in the whole set of each sample here.
    """

    def __init__(self, parent: ShardIndex, sample_ids: np.ndarray) -> None:
        self.parent = parent
        self.sample_ids = np.unique(np.asarray(sample_ids, np.int64))
        assert len(self.sample_ids) == len(sample_ids), "a sample is chosen twice"
        self.name, self.classes = parent.name, parent.classes
        self.num_samples = len(self.sample_ids)
        self.samples = parent.samples[self.sample_ids]
        num_shards = len(parent.shard_sizes)
        counts = np.bincount(self.samples["shard"], minlength=num_shards)
        self.shard_sizes: list[int] = [int(count) for count in counts if count]
        self.skipped = parent.skipped

    @property
    def is_remote(self) -> bool:
        """True if the shards pass through the cache."""
        return self.parent.is_remote

    @property
    def fingerprint(self) -> str:
        """Hash of what the samples are."""
        return stable_hash(self.parent.fingerprint, self.sample_ids.tobytes().hex()).hex()

    @property
    def labels(self) -> np.ndarray:
        """Labels of all samples, int64 [num_samples]; -1 where there is none."""
        return self.samples["label"].astype(np.int64)

    @property
    def has_labels(self) -> bool:
        """True if every sample has a label."""
        return self.num_samples > 0 and bool((self.labels >= 0).all())

    def read_bytes(self, i: int) -> bytes:
        """The encoded picture of sample `i`; raises as `ShardIndex.read_bytes`."""
        return self.parent.read_bytes(int(self.sample_ids[i]))

    def read_many(self, sample_ids: np.ndarray) -> list[memoryview]:
        """The encoded pictures of some samples, in the order asked for."""
        return self.parent.read_many(self.sample_ids[np.asarray(sample_ids, np.int64)])

    def fetch(self, sample_ids: np.ndarray) -> None:
        """Make sure that the shards of these samples are on this machine."""
        self.parent.fetch(self.sample_ids[np.asarray(sample_ids, np.int64)])

    def key_name(self, i: int) -> str:
        """WebDataset key of sample `i`."""
        return self.parent.key_name(int(self.sample_ids[i]))

    def describe(self, i: int) -> str:
        """What to call sample `i` in a message."""
        return self.parent.describe(int(self.sample_ids[i]))

    def close(self) -> None:
        """Close the open shards of the whole set."""
        self.parent.close()


def source_sizes(samples: Samples) -> list[SourceSizes]:
    """Sizes and weights for the order of an epoch."""
    if isinstance(samples, Mixture):
        pairs = zip(samples.sources, samples.weights, strict=True)
        return [SourceSizes(source.shard_sizes, weight) for source, weight in pairs]
    return [SourceSizes(samples.shard_sizes)]


def open_samples(
    spec: str | Sequence[str] | Mapping[str, float], cache: CacheOptions | None = None
) -> Samples:
    """Open one shard set, or several as a mixture.

    Args:
        spec: What `ShardIndex.open` takes; a list of such; or a mapping from such to weights.
        cache: Where remote shards are kept; all sets share it.
    Raises:
        UserError: If there is nothing to open, a set is named twice, a weight is not above 0; and
            all that `ShardIndex.open` refuses.
    """
    if isinstance(spec, str):
        return ShardIndex.open(spec, cache)
    weights = dict(spec) if isinstance(spec, Mapping) else dict.fromkeys(spec, 1.0)
    if not weights:
        raise UserError("data.shards: an empty list; name at least one shard set")
    if len(weights) < len(spec):
        twice = next(name for name in weights if list(spec).count(name) > 1)
        raise UserError(
            f"data.shards: {twice} is listed twice; give it a weight instead: {{{twice}: 2}}"
        )
    sources = [ShardIndex.open(name, cache) for name in weights]
    if list(weights.values()) == [1.0]:
        return sources[0]
    return Mixture(sources, list(weights.values()))


class Mixture:
    """Samples of several shard sets under one row of numbers.

    Keys of all but the first set are mixed with the set's number, so that pictures of the same name
    in two sets are augmented independently. Labels are kept only if all sets have the same classes.

    Args:
        sources: The sets, in the order of their sample numbers.
        weights: For each set, how often each of its samples comes per epoch.
    Raises:
        UserError: If a weight is not a positive number.
    """

    def __init__(self, sources: Sequence[ShardIndex], weights: Sequence[float]) -> None:
        for source, weight in zip(sources, weights, strict=True):
            if not (np.isfinite(weight) and weight > 0):
                raise UserError(
                    f"data.shards: weight {weight} of {source.name}: must be above 0; "
                    "1 shows each sample once per epoch"
                )
        self.sources, self.weights = list(sources), list(weights)
        sizes = [source.num_samples for source in sources]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_samples = int(self._first[-1])
        self.skipped = [item for source in sources for item in source.skipped]
        first = sources[0].classes
        self.has_common_classes = all(source.classes == first for source in sources)
        self.classes = first if self.has_common_classes else None
        self.samples = _Rows(self)

    @property
    def labels(self) -> np.ndarray:
        """Labels of all samples, int64 [num_samples]; -1 where there is none."""
        labels = np.concatenate([source.labels for source in self.sources])
        return labels if self.has_common_classes else np.full_like(labels, NO_LABEL)

    @property
    def has_labels(self) -> bool:
        """True if every sample has a label and all sets have the same classes."""
        return self.has_common_classes and all(source.has_labels for source in self.sources)

    @property
    def is_remote(self) -> bool:
        """True if shards of any set pass through the cache."""
        return any(source.is_remote for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Hash of what the samples are, in their order, and of the weights."""
        pairs = zip(self.sources, self.weights, strict=True)
        parts = [f"{source.fingerprint} {float(weight)!r}" for source, weight in pairs]
        return stable_hash(*parts).hex()

    def locate(self, i: int) -> tuple[ShardIndex, int]:
        """The set that holds sample `i`, and the sample's number there."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.num_samples}")
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        return self.sources[number], int(i - self._first[number])

    def groups(self, sample_ids: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For each set that occurs: its number, the rows of `sample_ids`, the numbers there."""
        which = np.searchsorted(self._first, sample_ids, side="right") - 1
        found = []
        for number in np.unique(which):
            rows = np.flatnonzero(which == number)
            found.append((int(number), rows, sample_ids[rows] - self._first[number]))
        return found

    def read_bytes(self, i: int) -> bytes:
        """The encoded picture of sample `i`; raises as `ShardIndex.read_bytes`."""
        source, own = self.locate(i)
        return source.read_bytes(own)

    def read_many(self, sample_ids: np.ndarray) -> list[memoryview]:
        """The encoded pictures of some samples, in the order asked for."""
        found: list[memoryview] = [memoryview(b"")] * len(sample_ids)
        for number, rows, own in self.groups(sample_ids):
            for row, data in zip(rows, self.sources[number].read_many(own), strict=True):
                found[row] = data
        return found

    def fetch(self, sample_ids: np.ndarray) -> None:
        """Make sure that the shards of these samples are on this machine."""
        for number, _, own in self.groups(sample_ids):
            self.sources[number].fetch(own)

    def key_name(self, i: int) -> str:
        """WebDataset key of sample `i`."""
        source, own = self.locate(i)
        return source.key_name(own)

    def describe(self, i: int) -> str:
        """What to call sample `i` in a message."""
        source, own = self.locate(i)
        return source.describe(own)

    def close(self) -> None:
        """Close the open shards of all sets."""
        for source in self.sources:
            source.close()


class _Rows:
    """The table of a mixture, one part per set; nothing is copied until rows are asked for."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __getitem__(self, which: Any) -> np.ndarray:
        ids = np.atleast_1d(np.asarray(which, np.int64))
        sources = self._mixture.sources
        rows = np.empty(len(ids), sources[0].samples.dtype)
        for number, places, own in self._mixture.groups(ids):
            part = sources[number].samples[own]
            if number:
                salt = np.frombuffer(stable_hash("source", number, num_bytes=8), "<u8")
                part["key"] ^= salt[0]
            if not self._mixture.has_common_classes:
                part["label"] = NO_LABEL
            rows[places] = part
        return rows if np.ndim(which) else rows[0]


Samples = ShardIndex | Mixture | Subset
