"""Weighted k-nearest-neighbour classification of frozen features, in bounded memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def knn_top1(
    bank: Float[Tensor, "m d"],
    bank_labels: Int[Tensor, " m"],
    queries: Float[Tensor, "n d"],
    query_labels: Int[Tensor, " n"],
    *,
    k: int,
    temperature: float,
    chunk: int = 1024,
) -> float:
    """Share of queries classified right by exp(similarity / temperature) votes of the k nearest.

    The protocol of Wu et al. (arXiv 1805.01978). Queries pass in chunks, so the similarity matrix
    never has more than ``chunk`` rows.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If a set is empty or the bank has fewer than k entries.
    """
    if len(queries) == 0 or len(bank) < k:
        raise ValueError(f"kNN with k={k} needs queries and a bank of at least k, got {len(bank)}")
    bank = functional.normalize(bank.float(), dim=1)
    num_classes = int(torch.cat([bank_labels, query_labels]).max()) + 1
    correct = 0
    for start in range(0, len(queries), chunk):
        part = functional.normalize(queries[start : start + chunk].float(), dim=1)
        similarity, index = (part @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(part), num_classes, device=part.device)
        votes.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
        correct += int((votes.argmax(dim=1) == query_labels[start : start + chunk]).sum())
    return correct / len(queries)
