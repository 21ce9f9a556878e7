"""Pictures that are the same, or nearly, whatever a backbone makes of them.

Two pictures are near duplicates if their grey thumbnails correlate, 16 x 16 and 32 x 32 alike, as
they are or mirrored. This finds copies that were saved anew, shrunk, mirrored or made grey. Cosines
of features are a worse rule: after a short pretraining, or none, different pictures are as close to
each other as such copies (docs/api.md has the figures).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

SIDE, COARSE = 32, 16  # of the thumbnails, pixels
THRESHOLD = 0.99
MIN_CONTRAST = 3.0  # standard deviation in grey levels; below, rounding would decide
BLOCK = 2048  # thumbnails compared together: three tables of 2048 x 2048 x 4 bytes exist at once
PAIRS = 2048  # candidates whose finer thumbnails are compared together


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a picture: a grey thumbnail, uint8 [32, 32], and a hash of all its pixels."""

    thumbnail: np.ndarray
    digest: bytes

    @classmethod
    def of(cls, pixels: np.ndarray) -> Fingerprint:
        """Of uint8 RGB [h, w, 3]."""
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        thumbnail = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels).data)
        return cls(thumbnail, digest.digest())


@dataclass(frozen=True)
class DuplicateGroup:
    """Pictures that belong together.

    Attributes:
        kind: "same pixels" if all have the same, else "near".
        members: Positions, ascending.
        correlations: Of each member's 32 x 32 thumbnail with that of the first, the higher one of
            both ways round. It may lie below the threshold, where others are in between.
    """

    kind: Literal["same pixels", "near"]
    members: list[int]
    correlations: list[float]


def find_groups(prints: list[Fingerprint], threshold: float = THRESHOLD) -> list[DuplicateGroup]:
    """Groups of two pictures or more, largest first; who is linked to one member belongs to all.

    Time grows with the square of the number of pictures, memory with the number.

    Args:
        prints: One for each picture.
        threshold: Lowest correlation of near duplicates.
    """
    # Pictures of the same pixels are represented by the first one.
    first: dict[bytes, int] = {}
    root = np.array([first.setdefault(one.digest, i) for i, one in enumerate(prints)], np.int64)
    kept = np.array(sorted(first.values()), np.int64)
    thumbnails = np.stack([one.thumbnail for one in prints]) if prints else np.empty((0, 32, 32))
    kept = kept[thumbnails[kept].std(axis=(1, 2)) >= MIN_CONTRAST]
    for left, right in _candidates(thumbnails[kept], threshold):
        for start in range(0, len(left), PAIRS):
            one, other = kept[left[start : start + PAIRS]], kept[right[start : start + PAIRS]]
            is_new = root[one] != root[other]
            one, other = one[is_new], other[is_new]
            is_near = correlation(thumbnails[one], thumbnails[other]) >= threshold
            if is_near.any():
                root = _merged(root, one[is_near], other[is_near])

    order = np.argsort(root, kind="stable")
    cuts = np.flatnonzero(np.diff(root[order])) + 1
    groups = []
    for members in np.split(order, cuts):
        if len(members) > 1:
            is_same = len({prints[i].digest for i in members.tolist()}) == 1
            leader = np.broadcast_to(thumbnails[members[0]], (len(members), SIDE, SIDE))
            values = np.ones(len(members)) if is_same else correlation(leader, thumbnails[members])
            correlations = [round(float(value), 4) for value in values]
            kind = "same pixels" if is_same else "near"
            groups.append(DuplicateGroup(kind, members.tolist(), correlations))
    return sorted(groups, key=lambda group: (-len(group.members), group.members[0]))


def correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of thumbnails [n, s, s] with others, row by row, mirrored or not: float32 [n]."""
    one, other, mirrored = (_unit(x) for x in (first, second, second[:, :, ::-1]))
    return np.maximum((one * other).sum(axis=1), (one * mirrored).sum(axis=1))


def _unit(thumbnails: np.ndarray) -> np.ndarray:
    """Rows without mean, of length 1 (0 where there is no contrast): float32 [n, s * s]."""
    count, height, width = thumbnails.shape
    rows = thumbnails.reshape(count, height * width).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _candidates(
    thumbnails: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions, first < second, whose 16 x 16 thumbnails correlate, block by block."""
    step = SIDE // COARSE
    coarse = np.empty((len(thumbnails), COARSE, COARSE), np.float32)
    for start in range(0, len(thumbnails), BLOCK):
        part = thumbnails[start : start + BLOCK].astype(np.float32)
        coarse[start : start + BLOCK] = part.reshape(-1, COARSE, step, COARSE, step).mean((2, 4))
    plain, mirrored = _unit(coarse), _unit(coarse[:, :, ::-1])
    for start in range(0, len(plain), BLOCK):
        rows = plain[start : start + BLOCK]
        for begin in range(start, len(plain), BLOCK):
            columns = slice(begin, begin + BLOCK)
            likeness = np.maximum(rows @ plain[columns].T, rows @ mirrored[columns].T)
            left, right = np.nonzero(likeness >= threshold)
            left, right = left + start, right + begin
            is_pair = left < right
            yield left[is_pair], right[is_pair]


def _merged(root: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`root` of every picture, a number of its group alone, after pairs were joined."""
    from scipy.sparse import coo_array  # takes a while, where nothing is joined
    from scipy.sparse.csgraph import connected_components

    edges = np.ones(len(first), np.int8), (root[first], root[second])
    return connected_components(coo_array(edges, (len(root), len(root))), directed=False)[1][root]
