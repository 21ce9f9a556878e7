"""Exact nearest neighbours in a bank of features, in bounded memory, and their robust centre.

Shapes: n queries, m entries of the bank, k neighbours, s of a shortlist, d dimensions. Everything
is computed in fp32, whatever the bank is stored in and under autocast too: products that are
rounded to half precision, or to TF32, tie where neighbours are near.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Distance = Literal["cosine", "truncated"]

SEARCH_BYTES = 64 * 2**20  # of similarities, or of differences, that exist at once
CAST_BYTES = 8 * 2**20  # of a half-precision bank that is turned into fp32 at once
MIN_SHORTLIST = 64
SHORTLIST_PER_NEIGHBOUR = 4


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in fp32: neither autocast nor TF32."""
    before = torch.get_float32_matmul_precision()
    is_rounded = before != "highest"  # setting what is set would make torch.compile start anew
    if is_rounded:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if is_rounded:
            torch.set_float32_matmul_precision(before)


@torch.no_grad()
def top_k(
    z: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    k: int,
    *,
    distance: Distance = "cosine",
    truncation: float = 2.0,
    shortlist: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k entries nearest to each row, nearest first.

    ``cosine``: similarity cos(z, b). ``truncated``: a distance in which no single dimension counts
    for more than c^2, c = truncation / sqrt(d), however far apart the vectors are there:

        D(z, b) = sum over dimensions of min((z_d - b_d)^2, c^2),   similarity 1 - D / 2,

    of vectors of unit length; where nothing is truncated, this is the cosine again. It is computed
    for the nearest by cosine only: exact within the shortlist, blind to what lies outside it.

    Args:
        z: Queries of any length.
        bank: Entries of unit length, in fp32, fp16 or bf16.
        k: Neighbours for each query.
        distance: What "nearest" means.
        truncation: In units of 1 / sqrt(d), the typical size of a component.
        shortlist: Entries that ``truncated`` ranks; 4 k, and 64 at least, unless given.
        chunk_rows: Queries that are compared at once, at most; unless given, as many as keep the
            similarities within ``SEARCH_BYTES``. The result does not depend on it, but for the
            rounding of a matrix product of a few rows.
    Returns:
        Similarities in fp32, in [-1, 1] but for rounding, and positions in the bank.
    Raises:
        ValueError: If the bank holds fewer than k entries, or an argument is out of its range.
    """
    num_entries, dim = bank.shape
    if k > num_entries:
        raise ValueError(f"asked for the {k} nearest of {num_entries} valid entries")
    if min(k, 1 if chunk_rows is None else chunk_rows) < 1:
        raise ValueError(f"k and chunk_rows must be at least 1, got {k} and {chunk_rows}")
    num_ranked = k
    if distance == "truncated":
        num_ranked = _shortlist_length(k, num_entries, shortlist)
        if not truncation > 0:
            raise ValueError(f"truncation must be positive, got {truncation}")
    elif distance != "cosine":
        raise ValueError(f"distance must be 'cosine' or 'truncated', got {distance!r}")
    width = num_entries if distance == "cosine" else max(num_entries, num_ranked * dim)
    most = chunk_rows or max(1, SEARCH_BYTES // (4 * width))
    found = []
    with exact_products(z.device):
        z = functional.normalize(z.detach().float(), dim=1)
        for rows in z.split(_even_length(len(z), most)):
            similarity, indices = _by_cosine(rows, bank, num_ranked)
            if distance == "truncated":
                similarity = _truncated_similarity(rows, bank, indices, truncation / math.sqrt(dim))
                similarity, order = similarity.topk(k, dim=1)
                indices = indices.gather(1, order)
            found.append((similarity, indices))
    similarities, positions = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(positions)


@torch.no_grad()
def consensus(
    neighbours: Float[Tensor, "n k d"], z: Float[Tensor, "n d"], *, temperature: float = 0.1
) -> Float[Tensor, "n d"]:
    """A robust centre of each row's k neighbours: one that is unlike the others hardly counts.

    With b_1 .. b_k of unit length,

        m_i = median over j != i of b_i . b_j,   w = softmax(m / temperature),
        centre = sum_i w_i b_i, normalised.

    The median of an even number of values is the mean of the two in the middle. Two neighbours
    weigh the same; of one, the centre is itself. If the sum has no direction, as with two
    opposite neighbours, the neighbour most similar to z takes its place; z has no other part.

    Args:
        neighbours: Of any length; they are normalised here.
        z: The queries.
        temperature: Of the weights; at infinity the centre is the plain mean.
    Returns:
        Centres of unit length in fp32.
    Raises:
        ValueError: If there is no neighbour, or the temperature is not positive.
    """
    k = neighbours.shape[1]
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"a consensus needs neighbours and a positive temperature, got k={k} and {temperature}"
        )
    with exact_products(z.device):
        neighbours = functional.normalize(neighbours.detach().float(), dim=2)
        if k == 1:
            return neighbours[:, 0]
        weights = (_median_of_others(neighbours) / temperature).softmax(dim=1)
        centre = (weights.unsqueeze(2) * neighbours).sum(dim=1)
        length = centre.norm(dim=1, keepdim=True)
        closest = (neighbours * z.detach().float().unsqueeze(1)).sum(dim=2).argmax(dim=1)
        fallback = neighbours[torch.arange(len(z), device=z.device), closest]
        return torch.where(length > 1e-6, functional.normalize(centre, dim=1), fallback)


def _by_cosine(
    z: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k entries of the largest inner product; a bank in fp32 is multiplied in one piece."""
    num_entries, dim = bank.shape
    step = num_entries if bank.dtype == torch.float32 else max(1, CAST_BYTES // (4 * dim))
    similarity = z.new_empty(len(z), num_entries)
    for start in range(0, num_entries, step):
        part = bank[start : start + step].float()
        torch.mm(z, part.T, out=similarity[:, start : start + step])
    values, indices = similarity.topk(k, dim=1)
    return values, indices


def _truncated_similarity(
    z: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], indices: Int[Tensor, "n s"], limit: float
) -> Float[Tensor, "n s"]:
    """1 - D / 2 with D truncated at limit^2 per dimension; in place, on one block [n, s, d]."""
    difference = bank[indices].float().sub_(z.unsqueeze(1))
    return 1 - difference.clamp_(-limit, limit).square_().sum(dim=2) / 2


def _median_of_others(unit: Float[Tensor, "n k d"]) -> Float[Tensor, "n k"]:
    """Median similarity of each of k > 1 vectors to the k - 1 others."""
    num_others = unit.shape[1] - 1
    similarity = unit @ unit.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # sorted behind the others
    ranked = similarity.sort(dim=2, descending=True).values
    return (ranked[..., (num_others - 1) // 2] + ranked[..., num_others // 2]) / 2


def _shortlist_length(k: int, num_entries: int, wanted: int | None) -> int:
    length = max(MIN_SHORTLIST, SHORTLIST_PER_NEIGHBOUR * k) if wanted is None else wanted
    if length < k:
        raise ValueError(f"a shortlist of {length} cannot hold the {k} nearest")
    return min(length, num_entries)


def _even_length(num_rows: int, most: int) -> int:
    """Rows of a chunk: as few chunks of at most ``most`` as can be, all about as long."""
    return max(1, math.ceil(num_rows / math.ceil(max(1, num_rows) / most)))
