"""Weighted k-nearest-neighbour classification of frozen features, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pretrain.features.memory_bank import exact_products

QUERY_CHUNK = 1024
BANK_CHUNK = 8192
"""Rows looked at together: similarities never take more than 1024 x 8192 x 4 bytes, 34 MB."""
_ALLOCATOR_BYTES = 40_000_000
"""What the C library's allocator keeps of what was freed; 15 to 35 MB were measured."""


def working_bytes(num_queries: int, dim: int, k: int) -> int:
    """Upper bound of what ``nearest_rows`` holds besides the bank and the queries.

    A chunk of each in float32, their similarities, the found ones, the lists of the k nearest, and
    a fixed amount for the allocator.
    """
    chunks = 4 * dim * (QUERY_CHUNK + BANK_CHUNK)
    similarities = 4 * QUERY_CHUNK * BANK_CHUNK
    best = (4 + 8) * 4 * QUERY_CHUNK * k  # of a chunk, joined with those before, and chosen
    return chunks + similarities + best + (4 + 8) * num_queries * k + _ALLOCATOR_BYTES


@torch.no_grad()
def nearest_rows(
    bank: Float[Tensor, "m d"],
    queries: Float[Tensor, "n d"],
    k: int,
    *,
    excluded: Int[Tensor, " n"] | None = None,
    device: torch.device | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k rows of the bank with the highest cosine similarity to each query, highest first.

    Bank and queries pass in chunks, and each query's k best are kept on the way: memory beyond the
    two sets is bounded by ``working_bytes``. Rows may have half precision; each chunk is computed
    with in float32. Which of several equally similar rows come in is not defined.

    Args:
        bank: Features, of any length.
        queries: Features, of any length.
        k: At most the number of rows.
        excluded: For each query a row that it must not find, itself for instance.
        device: Where chunks are compared; that of the bank if None.

    Returns:
        Similarities (float32) and row numbers, on the CPU.
    """
    device = device or bank.device
    n, m = len(queries), len(bank)
    best = torch.full((n, k), -float("inf"))
    rows = torch.zeros((n, k), dtype=torch.int64)
    for start in range(0, m, BANK_CHUNK):
        entries = _unit(bank[start : start + BANK_CHUNK], device)
        for first in range(0, n, QUERY_CHUNK):
            part = slice(first, min(first + QUERY_CHUNK, n))
            avoided = None if excluded is None else excluded[part] - start
            values, found = _best(_unit(queries[part], device), entries, k, avoided)
            values = torch.cat([best[part], values], dim=1)
            found = torch.cat([rows[part], found + start], dim=1)
            best[part], chosen = values.topk(k, dim=1)
            rows[part] = found.gather(1, chosen)
        del entries  # before the next chunk is made
    return best, rows


def _unit(rows: Tensor, device: torch.device) -> Tensor:
    """A copy in float32 with rows of length 1."""
    copy = rows.to(device, torch.float32, copy=True)
    return copy.div_(copy.norm(dim=1, keepdim=True).clamp_min_(1e-12))


def _best(
    queries: Tensor, entries: Tensor, k: int, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k highest similarities of one chunk to another, and their columns; on the CPU."""
    with exact_products(queries.device):
        similarity = queries @ entries.T
    if excluded is not None:
        column = excluded.to(similarity.device)
        inside = (column >= 0) & (column < similarity.shape[1])
        similarity[inside.nonzero()[:, 0], column[inside]] = -float("inf")
    values, found = similarity.topk(min(k, len(entries)), dim=1)
    return values.cpu(), found.cpu()


@torch.no_grad()
def knn_top1(
    bank: Float[Tensor, "m d"],
    bank_labels: Int[Tensor, " m"],
    queries: Float[Tensor, "n d"],
    query_labels: Int[Tensor, " n"],
    *,
    k: int,
    temperature: float,
    device: torch.device | None = None,
) -> float:
    """Share of queries classified right by exp(similarity / temperature) votes of the k nearest.

    The protocol of Wu et al. (arXiv 1805.01978), in the memory of ``nearest_rows``.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If a set is empty or the bank has fewer than k entries.
    """
    ks, temperatures, sets = [k], [temperature], (bank, bank_labels, queries, query_labels)
    return knn_grid(*sets, ks=ks, temperatures=temperatures, device=device)[0][0]


@torch.no_grad()
def knn_grid(
    bank: Float[Tensor, "m d"],
    bank_labels: Int[Tensor, " m"],
    queries: Float[Tensor, "n d"],
    query_labels: Int[Tensor, " n"],
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    device: torch.device | None = None,
) -> list[list[float]]:
    """``knn_top1`` for every k with every temperature, in one pass over the similarities.

    Returns:
        Accuracies in [0, 1]: a row for each k, in it a value for each temperature.

    Raises:
        ValueError: If a set is empty or the bank has fewer than the largest k entries.
    """
    largest = max(ks)
    if len(queries) == 0 or len(bank) < largest:
        raise ValueError(
            f"kNN with k={largest} needs queries and a bank of at least k, got {len(bank)}"
        )
    similarity, rows = nearest_rows(bank, queries, largest, device=device)
    bank_labels, query_labels = bank_labels.cpu(), query_labels.cpu()
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    correct = [[0] * len(temperatures) for _ in ks]
    for start in range(0, len(queries), QUERY_CHUNK):
        part = slice(start, start + QUERY_CHUNK)
        found = bank_labels[rows[part]]
        for column, temperature in enumerate(temperatures):
            weights = (similarity[part] / temperature).exp_()
            for row, k in enumerate(ks):
                votes = torch.zeros(len(weights), num_classes)
                votes.scatter_add_(1, found[:, :k], weights[:, :k])
                correct[row][column] += int((votes.argmax(dim=1) == query_labels[part]).sum())
    return [[count / len(queries) for count in row] for row in correct]
