"""The order of samples: a pure function of (seed, epoch) and the sizes of the shards.

Nothing here keeps state. The k-th global batch of an epoch is a slice of one permutation; ranks and
workers only take their parts of it. Exactly-once epochs and exact resume, also with another number
of ranks or workers, follow from that.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from pretrain.errors import UserError


def stable_hash(*parts: int | str, num_bytes: int = 16) -> bytes:
    """Hash of a tuple of integers and strings, the same in every process and on every machine.

    Each part is written with its type and length, so that ("ab", "c") and ("a", "bc"), or 1 and
    "1", differ.

    Args:
        parts: Integers of any size and strings.
        num_bytes: Length of the digest, 1 to 64 bytes.
    Raises:
        TypeError: If a part is neither an integer nor a string.
    """
    digest = hashlib.blake2b(digest_size=num_bytes)
    for part in parts:
        if isinstance(part, (int, np.integer)) and not isinstance(part, bool):
            tag, body = b"i", str(int(part)).encode()
        elif isinstance(part, str):
            tag, body = b"s", part.encode("utf-8", "surrogateescape")
        else:
            raise TypeError(f"a part must be int or str, got {type(part).__name__}: {part!r}")
        digest.update(tag + str(len(body)).encode() + b":" + body)
    return digest.digest()


def counter_rng(*parts: int | str) -> np.random.Generator:
    """Random generator that depends on nothing but `parts` (Philox keyed by their hash)."""
    key = np.frombuffer(stable_hash(*parts), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


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
        int64 array [num_samples] of sample numbers, each exactly once.
    Raises:
        UserError: If `window` is below 1 or a shard size is negative.
    """
    if window < 1:
        raise UserError(
            f"shuffle window {window}: must be at least 1 sample (1 shuffles shards only)"
        )
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    if sizes.size and int(sizes.min()) < 0:
        raise UserError(f"shard size {int(sizes.min())}: must not be negative")
    rng = counter_rng("order", seed, epoch)
    shards = rng.permutation(len(sizes))
    order = _concatenate_ranges(np.cumsum(sizes) - sizes, sizes, shards)
    if window >= len(order):
        return rng.permutation(order)
    num_full = len(order) // window * window
    order[:num_full] = rng.permuted(order[:num_full].reshape(-1, window), axis=1).ravel()
    order[num_full:] = rng.permutation(order[num_full:])
    return order


def _concatenate_ranges(starts: np.ndarray, sizes: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """Join the ranges starts[i] .. starts[i] + sizes[i] - 1 for i in `picked`, in that order."""
    sizes = sizes[picked]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts[picked] - (ends - sizes), sizes)


def num_steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Number of global batches in an epoch; the remainder below one batch is dropped.

    Which samples are dropped changes with the epoch, since each epoch has its own order.

    Raises:
        UserError: If the batch is empty or larger than the data set.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: must be at least 1")
    if num_samples < batch_size:
        raise UserError(
            f"{num_samples} samples do not fill one batch of {batch_size}: "
            f"set a batch size of at most {num_samples}, or add pictures"
        )
    return num_samples // batch_size


def global_batch(order: np.ndarray, k: int, batch_size: int) -> np.ndarray:
    """Sample numbers of the k-th global batch, int64 [batch_size].

    Raises:
        IndexError: If the epoch has no k-th whole batch.
    """
    if not 0 <= k < len(order) // batch_size:
        raise IndexError(f"batch {k} of an epoch with {len(order) // batch_size} batches")
    return order[k * batch_size : (k + 1) * batch_size]


def rank_slice(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous part of a global batch that one rank takes.

    Raises:
        UserError: If the batch does not divide evenly among the ranks.
    """
    if len(batch) % world_size:
        raise UserError(
            f"global batch of {len(batch)} samples does not divide among {world_size} ranks: "
            f"choose a batch size that is a multiple of {world_size}"
        )
    share = len(batch) // world_size
    return batch[rank * share : (rank + 1) * share]
