"""The base objectives as pure functions. No loss detaches: the assembly does, in one place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pretrain import collectives as dist


def _require_rows(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"{name} must be [n, d] with n >= 1, got shape {tuple(x.shape)}")


def _require_pairs(**pair: Tensor) -> None:
    (first, a), (second, b) = pair.items()
    _require_rows(first, a)
    _require_rows(second, b)
    if a.shape[0] != b.shape[0]:  # cosine_similarity would broadcast
        raise ValueError(
            f"{first} has {a.shape[0]} rows, {second} has {b.shape[0]}: one target per prediction"
        )
    _require_width(**pair)


def _require_width(**pair: Tensor) -> None:
    (first, a), (second, b) = pair.items()
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{first} has width {a.shape[1]}, {second} has {b.shape[1]}")


def _require_positives(rows: Tensor, columns: Tensor, first_positive: int) -> None:
    _require_rows("rows", rows)
    _require_rows("columns", columns)
    _require_width(rows=rows, columns=columns)
    if not 0 <= first_positive <= columns.shape[0] - rows.shape[0]:
        raise ValueError(
            f"rows {first_positive}..{first_positive + rows.shape[0] - 1} have no positive among "
            f"{columns.shape[0]} columns"
        )


def byol_loss(p: Float[Tensor, "n d"], t: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean of 2 - 2 cos(p, t) over the rows (BYOL, arXiv 2006.07733, eq. 2).

    Args:
        p: Predictions of one view.
        t: Targets from the other view; the caller decides whether they are detached.

    Returns:
        Dimensionless scalar in [0, 4]; 0 means aligned.

    Raises:
        ValueError: If the batch is empty or not two-dimensional, or the two differ in shape.
    """
    _require_pairs(p=p, t=t)
    return (2 - 2 * functional.cosine_similarity(p, t, dim=1)).mean()


def negative_cosine_loss(p: Float[Tensor, "n d"], t: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean of -cos(p, t) over the rows (SimSiam, arXiv 2011.10566, eq. 1).

    Args:
        p: Predictions of one view.
        t: Targets from the other view; the caller decides whether they are detached.

    Returns:
        Dimensionless scalar in [-1, 1]; -1 means aligned.

    Raises:
        ValueError: If the batch is empty or not two-dimensional, or the two differ in shape.
    """
    _require_pairs(p=p, t=t)
    return -functional.cosine_similarity(p, t, dim=1).mean()


def infonce_loss(
    rows: Float[Tensor, "n d"],
    columns: Float[Tensor, "m d"],
    *,
    temperature: float,
    first_positive: int = 0,
) -> Float[Tensor, ""]:
    """Cross entropy of cosine similarities, one positive per row (arXiv 2104.14548).

    NNCLR's form: rows to columns only.

    Args:
        rows: Targets A(t_2)_i, the local part of the batch.
        columns: Predictions q(z_1)_j of the global batch.
        temperature: Divides the similarities.
        first_positive: Column of row 0's positive; row i's is ``first_positive + i``.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: If a batch is empty, widths differ, or a row's positive is no column.
    """
    _require_positives(rows, columns, first_positive)
    logits = functional.normalize(rows, dim=1) @ functional.normalize(columns, dim=1).T
    positives = torch.arange(rows.shape[0], device=rows.device) + first_positive
    return functional.cross_entropy(logits / temperature, positives)


def nt_xent_loss(
    rows: Float[Tensor, "n d"],
    columns: Float[Tensor, "m d"],
    others: Float[Tensor, "m d"],
    *,
    temperature: float,
    first_positive: int = 0,
) -> Float[Tensor, ""]:
    """Cross entropy of cosine similarities over both views of the batch (arXiv 2002.05709, eq. 1).

    SimCLR's NT-Xent with the anchor on the target side. Without FA and predictor (``rows`` are the
    local part of ``others``) the mean of this loss over the two orders of the views is the textbook
    loss over 2m samples.

    Args:
        rows: Targets A(t_2)_i, the local part of the batch: the anchors.
        columns: Predictions q(z_1)_j of the global batch; row i's positive is its own number.
        others: Un-augmented z_2,j of the global batch, negatives of every row but their own.
        temperature: Divides the similarities.
        first_positive: Number of row 0 in the global batch; row i's is ``first_positive + i``.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: If a batch is empty, widths differ, a row's number lies outside the columns, or
            the others are not as many as the columns.
    """
    _require_positives(rows, columns, first_positive)
    if others.shape != columns.shape:
        raise ValueError(
            f"others must be as columns, {tuple(columns.shape)}, got shape {tuple(others.shape)}"
        )
    rows = functional.normalize(rows, dim=1)
    own = torch.arange(rows.shape[0], device=rows.device) + first_positive
    to_columns = rows @ functional.normalize(columns, dim=1).T
    to_others = rows @ functional.normalize(others, dim=1).T
    is_own = own[:, None] == torch.arange(others.shape[0], device=rows.device)
    logits = torch.cat([to_columns, to_others.masked_fill(is_own, -torch.inf)], dim=1)
    return functional.cross_entropy(logits / temperature, own)


def moco_loss(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "n d"],
    negatives: Float[Tensor, "K d"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross entropy of one positive key against a queue (MoCo, arXiv 1911.05722 and 2003.04297).

    Args:
        queries: Predictions of one view.
        keys: Positive key of each query.
        negatives: Plain keys of the past; none at all (K = 0) makes the loss 0.
        temperature: Divides the cosine similarities.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: If the batch is empty, queries and keys differ in shape, or the negatives in
            width.
    """
    _require_pairs(queries=queries, keys=keys)
    if negatives.ndim != 2:
        raise ValueError(f"negatives must be [K, d], got shape {tuple(negatives.shape)}")
    _require_width(queries=queries, negatives=negatives)
    queries, keys = functional.normalize(queries, dim=1), functional.normalize(keys, dim=1)
    positive = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ functional.normalize(negatives, dim=1).T], dim=1)
    labels = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    return functional.cross_entropy(logits / temperature, labels)


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "n K"], *, epsilon: float, num_iterations: int
) -> Float[Tensor, "n K"]:
    """Codes: soft assignments of the global batch to prototypes in equal shares (arXiv 2006.09882).

    Sinkhorn-Knopp on exp(scores / epsilon), in logarithms, so that no epsilon over- or underflows.
    Each iteration gives all prototypes the same mass over the rows of all processes, then every row
    mass 1. Computed in fp32, or fp64 for fp64 scores. The codes are targets and carry no gradient.

    Args:
        scores: Similarities of the local features to the prototypes.
        epsilon: Entropy of the assignment, in units of the scores; 0.05 in the paper.
        num_iterations: Iterations, at least 1; 3 in the paper.

    Returns:
        Codes of the local rows, each row of sum 1.

    Raises:
        ValueError: If the scores are empty or not two-dimensional, or an option is out of range.
    """
    _require_rows("scores", scores)
    if epsilon <= 0 or num_iterations < 1:
        raise ValueError(
            "sinkhorn needs epsilon > 0 and num_iterations >= 1, "
            f"got epsilon={epsilon}, num_iterations={num_iterations}"
        )
    log_codes = (scores if scores.dtype == torch.float64 else scores.float()) / epsilon
    for _ in range(num_iterations):
        largest = dist.gather(log_codes.amax(dim=0, keepdim=True)).amax(dim=0)  # of all processes
        mass = dist.total((log_codes - largest).exp().sum(dim=0))
        log_codes = log_codes - largest - mass.log()
        log_codes = log_codes.log_softmax(dim=1)
    return log_codes.exp()


def swav_loss(
    logits: Float[Tensor, "n K"], codes: Float[Tensor, "n K"], *, temperature: float
) -> Float[Tensor, ""]:
    """Cross entropy of one view's prototype scores against the other's codes (arXiv 2006.09882).

    Args:
        logits: Similarities of the predicting view's features to the prototypes.
        codes: Soft assignments of the target view (``sinkhorn``), rows of sum 1.
        temperature: Divides the logits.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: If the batch is empty or not two-dimensional, or the two differ in shape.
    """
    _require_pairs(logits=logits, codes=codes)
    return -(codes * functional.log_softmax(logits / temperature, dim=1)).sum(dim=1).mean()
