"""The order of samples: a pure function of (seed, epoch) and the sizes of the shards.

Nothing here keeps state. The k-th global batch of an epoch is a slice of one permutation; ranks and
workers only take their parts of it. Exactly-once epochs and exact resume, also with another number
of ranks or workers, follow from that.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import require
from pretrain.data.random_numbers import counter_rng, stable_hash


def epoch_order(shard_sizes: Sequence[int], *, seed: int, epoch: int, window: int) -> np.ndarray:
    """Permutation of all samples for one epoch.

    The shards are shuffled, then the samples within consecutive windows of that sequence, so that
    at any moment only about `window` samples' worth of shards is being read. A window of at least
    the number of samples is a full shuffle; a window of 1 shuffles the shards only.

    Args:
        shard_sizes: Number of samples of each shard.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        window: Window in samples, at least 1.
    Returns:
        Array [num_samples] of sample numbers, each exactly once; int32 up to 2^31 samples, else
        int64: this is what grows with the set in each process.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    rng = counter_rng("order", seed, epoch)
    shards = rng.permutation(len(sizes))
    # The shards' ranges of sample numbers, joined in the shuffled order; all in one array.
    order = np.empty(sizes.sum(), _smallest_type(sizes.sum()))
    firsts, ends = (np.cumsum(sizes) - sizes)[shards], np.cumsum(sizes[shards])
    ranges = np.stack([firsts, ends, sizes[shards]], axis=1).tolist()
    for first, end, size in ranges:
        order[end - size : end] = np.arange(first, first + size)
    num_full = 0 if window >= len(order) else len(order) // window * window
    if num_full:
        windows = order[:num_full].reshape(-1, window)
        rng.permuted(windows, axis=1, out=windows)
    rng.shuffle(order[num_full:])
    return order


def _smallest_type(num_samples: int) -> type[np.signedinteger]:
    """The type that holds the number of each sample."""
    return np.int32 if num_samples <= 2**31 else np.int64


@dataclass(frozen=True)
class OrderedSamples:
    """Samples of an epoch or of a batch, in their order.

    Attributes:
        sample_ids: int64 [n], numbers in the sources joined end to end; of an epoch int32 where
            that is enough.
        repeats: int64 [n], int32 in an epoch of a mixture, how often each was due before; it
            decides the augmentation, so that a sample that comes again is cropped in another way.
    """

    sample_ids: np.ndarray
    repeats: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, rows: slice) -> "OrderedSamples":
        return OrderedSamples(self.sample_ids[rows], self.repeats[rows])


@dataclass(frozen=True)
class SourceSizes:
    """What the order needs to know of one source: its shards' sizes, and its weight.

    A weight of w lets each sample of the source come w times per epoch.
    """

    shard_sizes: Sequence[int]
    weight: float = 1.0

    @property
    def num_samples(self) -> int:
        """Samples in the source."""
        return int(sum(self.shard_sizes))

    @property
    def num_due(self) -> int:
        """Samples that the source gives to each epoch."""
        return round(self.weight * self.num_samples)


def epoch_samples(
    sources: Sequence[SourceSizes], *, seed: int, epoch: int, window: int
) -> OrderedSamples:
    """Samples and repeats of one epoch of one or several sources.

    The samples of a source form an endless row of cycles, each cycle one `epoch_order`. With
    m = round(weight * size), epoch e takes the m samples from number e * m on. A weight of 1 is
    therefore cycle e: each sample once. Several sources are interleaved in proportion
    to their lengths, so that every batch has about the same mixture, and each source is shuffled in
    its share of the window.

    Args:
        sources: Sizes and weights; sample numbers count through all of them.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        window: Shuffle window over all sources, in samples, at least 1.
    """
    if len(sources) == 1 and sources[0].weight == 1:
        order = epoch_order(sources[0].shard_sizes, seed=seed, epoch=epoch, window=window)
        return OrderedSamples(order, np.broadcast_to(np.int64(epoch), len(order)))
    # Sample k of a source's m has its place at (k + 1/2) / m of the epoch. The places are gone
    # before the numbers are made: both are large.
    stops = list(itertools.accumulate(source.num_due for source in sources))
    total = stops[-1]
    places = np.empty(total)
    for source, stop in zip(sources, stops, strict=True):
        due = source.num_due
        places[stop - due : stop] = (np.arange(due) + 0.5) / due
    merged = np.argsort(places, kind="stable")
    del places
    ids = np.empty(total, _smallest_type(sum(source.num_samples for source in sources)))
    repeats, done, first = np.empty(total, np.int32), 0, 0
    for number, source in enumerate(sources):
        # Of the source's endless row of cycles, this epoch takes the samples start .. stop - 1.
        size, due = source.num_samples, source.num_due
        own_window = max(1, round(window * due / total))
        own_seed = int.from_bytes(stable_hash("source", seed, number, num_bytes=7), "little")
        start, stop = epoch * due, (epoch + 1) * due
        for cycle in range(start // size, (stop - 1) // size + 1) if due else ():
            order = epoch_order(source.shard_sizes, seed=own_seed, epoch=cycle, window=own_window)
            piece = order[max(0, start - cycle * size) : stop - cycle * size]
            rows = slice(done, done + len(piece))
            ids[rows], repeats[rows], done = piece, cycle, rows.stop
            ids[rows] += first
        first += size
    return OrderedSamples(ids[merged], repeats[merged])


LastBatch = Literal["drop", "pad"]


def num_steps_per_epoch(num_samples: int, batch_size: int, last_batch: LastBatch = "drop") -> int:
    """Number of global batches in an epoch.

    Args:
        num_samples: Samples of an epoch.
        batch_size: Global batch size.
        last_batch: What becomes of the remainder below one batch. "drop": left out; which samples
            these are changes with the epoch, since each has its own order. "pad": filled up with
            samples from the epoch's beginning.
    Raises:
        UserError: If the batch is larger than the data set.
    """
    fills = f"{num_samples} samples do not fill one batch of {batch_size}: lower the batch size"
    require(num_samples >= batch_size, fills)
    return -(-num_samples // batch_size) if last_batch == "pad" else num_samples // batch_size


def global_batch(epoch: OrderedSamples, k: int, batch_size: int) -> OrderedSamples:
    """The k-th global batch of `num_steps_per_epoch`: `batch_size` samples with their repeats.

    The last one may be padded with samples from the epoch's beginning. Their repeats are negative,
    so that their views differ from those there.
    """
    batch = epoch[k * batch_size : (k + 1) * batch_size]
    batch = OrderedSamples(batch.sample_ids.astype(np.int64), batch.repeats.astype(np.int64))
    if missing := batch_size - len(batch):
        return OrderedSamples(
            np.concatenate([batch.sample_ids, epoch.sample_ids[:missing]]),
            np.concatenate([batch.repeats, -1 - epoch.repeats[:missing]]),
        )
    return batch


def rank_slice(batch: OrderedSamples, rank: int, world_size: int) -> OrderedSamples:
    """The contiguous part of a global batch that one rank takes; raises as `share_of_rank`."""
    share = share_of_rank(len(batch), world_size)
    return batch[rank * share : (rank + 1) * share]


def share_of_rank(batch_size: int, world_size: int) -> int:
    """Samples of a global batch that each rank takes.

    Raises:
        UserError: If the batch does not divide evenly among the ranks.
    """
    message = f"global batch of {batch_size} samples does not divide among {world_size} ranks"
    require(batch_size % world_size == 0, f"{message}: choose a multiple of {world_size}")
    return batch_size // world_size
