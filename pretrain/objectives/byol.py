"""BYOL (arXiv 2006.07733)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float

from common.lazy import Tensor, functional, nn
from pretrain.objectives.base import EmaObjective, Pair


@dataclass(frozen=True)
class Byol(EmaObjective):
    """The EMA branch's projection is predicted; the losses of both directions are added."""

    architecture: ClassVar = "parallel"
    is_per_sample: ClassVar = True
    scale: ClassVar = 1.0
    two_views_only: ClassVar = ""

    name: Literal["byol"] = "byol"

    def loss(self, pair: Pair, state: nn.Module | None) -> Float[Tensor, ""]:
        """See ``byol_loss``."""
        return byol_loss(pair.online, pair.target)


def byol_loss(p: Float[Tensor, "n d"], t: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean of 2 - 2 cos(p, t) over the rows (BYOL, arXiv 2006.07733, eq. 2).

    Args:
        p: Predictions of one view.
        t: Targets from the other view; the caller decides whether they are detached.

    Returns:
        Dimensionless scalar in [0, 4]; 0 means aligned.
    """
    assert p.shape == t.shape, "cosine_similarity would broadcast"
    return (2 - 2 * functional.cosine_similarity(p, t, dim=1)).mean()
