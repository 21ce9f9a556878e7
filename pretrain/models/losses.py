"""The base objectives as pure functions. No loss detaches: the assembly does, in one place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def _require_rows(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"{name} must be [n, d] with n >= 1, got shape {tuple(x.shape)}")


def byol_loss(p: Float[Tensor, "n d"], t: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean of 2 - 2 cos(p, t) over the rows (BYOL, arXiv 2006.07733, eq. 2).

    Args:
        p: Predictions of one view.
        t: Targets from the other view; the caller decides whether they are detached.

    Returns:
        Dimensionless scalar in [0, 4]; 0 means aligned.

    Raises:
        ValueError: If the batch is empty or not two-dimensional, or the two differ in rows.
    """
    _require_rows("p", p)
    _require_rows("t", t)
    if p.shape[0] != t.shape[0]:  # cosine_similarity would broadcast
        raise ValueError(f"p has {p.shape[0]} rows, t has {t.shape[0]}: one target per prediction")
    return (2 - 2 * functional.cosine_similarity(p, t, dim=1)).mean()


def infonce_loss(
    rows: Float[Tensor, "n d"],
    columns: Float[Tensor, "m d"],
    *,
    temperature: float,
    first_positive: int = 0,
) -> Float[Tensor, ""]:
    """Cross entropy of cosine similarities, one positive per row (NNCLR's form, rows to columns).

    Args:
        rows: Targets A(t_2)_i, the local part of the batch.
        columns: Predictions q(z_1)_j of the global batch.
        temperature: Divides the similarities.
        first_positive: Column of row 0's positive; row i's is ``first_positive + i``.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: If a batch is empty, or a row's positive lies outside the columns.
    """
    _require_rows("rows", rows)
    _require_rows("columns", columns)
    if not 0 <= first_positive <= columns.shape[0] - rows.shape[0]:
        raise ValueError(
            f"rows {first_positive}..{first_positive + rows.shape[0] - 1} have no positive among "
            f"{columns.shape[0]} columns"
        )
    logits = functional.normalize(rows, dim=1) @ functional.normalize(columns, dim=1).T
    positives = torch.arange(rows.shape[0], device=rows.device) + first_positive
    return functional.cross_entropy(logits / temperature, positives)
