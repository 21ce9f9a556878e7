"""Some samples of a shard set as a set of their own."""

from __future__ import annotations

import numpy as np

from pretrain.data.index.shards import ShardIndex
from pretrain.data.order import stable_hash


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
