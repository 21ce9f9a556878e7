"""Random numbers that are functions of what they are for: no generator, no state.

A hash of (purpose, seed, repeat index, view) names a stream, from which vectorised SplitMix64
takes the k-th number of each sample. So a number does not depend on the batch, the worker or what
was drawn before, and one number can be drawn alone.
"""

import hashlib
from functools import lru_cache

import numpy as np


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


def draw_uniforms(
    purpose: str,
    sample_hashes: np.ndarray,
    repeats: np.ndarray | int,
    num_draws: int,
    *,
    seed: int,
    view_index: int,
) -> np.ndarray:
    """Uniform numbers for each sample: a function of its arguments and the draw alone.

    Args:
        purpose: What the numbers are for; two purposes draw independently.
        sample_hashes: int64 [n], the samples' hashed names.
        repeats: int64 [n], how often each sample was due before; or one number for all.
        num_draws: Draws per sample.
        seed: Seed of the run.
        view_index: Number of the view, from 0.
    Returns:
        float64 [num_draws, n] in [0, 1), multiples of 2**-53.
    """
    repeats = np.asarray(repeats)
    if repeats.size and (repeats == repeats.flat[0]).all():  # as nearly always
        base = np.uint64(_base(purpose, seed, int(repeats.flat[0]), view_index))
        return uniforms(sample_hashes, base, num_draws)
    kinds, which = np.unique(repeats, return_inverse=True)
    bases = np.array([_base(purpose, seed, int(kind), view_index) for kind in kinds], np.uint64)
    return uniforms(sample_hashes, bases[which.reshape(repeats.shape)], num_draws)


@lru_cache(maxsize=64)
def _base(purpose: str, seed: int, kind: int, view_index: int) -> int:
    digest = stable_hash(purpose, seed, kind, view_index, num_bytes=8)
    return int.from_bytes(digest, "little")


def uniforms(
    sample_hashes: np.ndarray, base: np.ndarray | np.uint64 | int, num_draws: int
) -> np.ndarray:
    """Counter-based uniform numbers in [0, 1): SplitMix64's mixer over (base, hash, draw).

    Args:
        sample_hashes: int64 or uint64 [n].
        base: 64-bit number of the stream; or uint64 [n], one for each hash.
        num_draws: Draws per hash.
    Returns:
        float64 [num_draws, n], multiples of 2**-53.
    """
    sample_hashes = np.ascontiguousarray(sample_hashes).view(np.uint64)
    counters = np.arange(1, num_draws + 1, dtype=np.uint64)[:, None]
    counters *= np.uint64(0x9E3779B97F4A7C15)
    state = _mix(_mix(sample_hashes ^ np.asarray(base, np.uint64))[None, :] + counters)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, element by element, modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
