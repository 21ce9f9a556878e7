"""Weighted k-nearest-neighbour classification of frozen features, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pretrain.features.memory_bank import top_k

QUERY_CHUNK = 512
BANK_CHUNK = 8192
"""Rows compared together: similarities never take more than 512 x 8192 x 4 bytes, 17 MB."""
_ALLOCATOR_BYTES = 60_000_000
"""What the C library's allocator keeps of what was freed; 15 to 55 MB were measured."""


def working_bytes(num_queries: int, dim: int, k: int) -> int:
    """Upper bound of what ``knn_grid`` holds besides the bank and the queries.

    A chunk of each in float32, their similarities, the lists of the k nearest, and a fixed amount
    for the allocator.
    """
    chunks = 4 * dim * (QUERY_CHUNK + BANK_CHUNK)
    similarities = 4 * QUERY_CHUNK * BANK_CHUNK
    best = (4 + 8) * 4 * QUERY_CHUNK * k  # of a chunk, joined with those before, and chosen
    return chunks + similarities + best + (4 + 8) * num_queries * k + _ALLOCATOR_BYTES


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

    The protocol of Wu et al. (arXiv 1805.01978), in the memory of ``working_bytes``.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If a set is empty or the bank has fewer than k entries.
    """
    grid = knn_grid(
        bank, bank_labels, queries, query_labels, ks=[k], temperatures=[temperature], device=device
    )
    return grid[0][0]


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
    similarity, nearest = top_k(
        queries, bank, largest, is_unit=False, chunk_rows=QUERY_CHUNK, chunk_entries=BANK_CHUNK,
        device=device,
    )  # fmt: skip
    similarity, nearest = similarity.cpu(), nearest.cpu()
    bank_labels, query_labels = bank_labels.cpu(), query_labels.cpu()
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    correct = [[0] * len(temperatures) for _ in ks]
    for start in range(0, len(queries), QUERY_CHUNK):
        part = slice(start, start + QUERY_CHUNK)
        labels = bank_labels[nearest[part]]
        for column, temperature in enumerate(temperatures):
            weights = (similarity[part] / temperature).exp_()
            for row, k in enumerate(ks):
                votes = torch.zeros(len(weights), num_classes)
                votes.scatter_add_(1, labels[:, :k], weights[:, :k])
                correct[row][column] += int((votes.argmax(dim=1) == query_labels[part]).sum())
    return [[count / len(queries) for count in row] for row in correct]
