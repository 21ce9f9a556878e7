"""SimSiam (arXiv 2011.10566)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float

from common.lazy import Tensor, functional, nn
from pretrain.objectives.base import Objective, Pair


@dataclass(frozen=True)
class SimSiam(Objective):
    """The online branch's own projection, without gradient, is predicted."""

    architecture: ClassVar = "parallel"
    stops_target: ClassVar = True
    is_per_sample: ClassVar = True
    two_views_only: ClassVar = ""

    name: Literal["simsiam"] = "simsiam"

    def loss(self, pair: Pair, state: nn.Module | None) -> Float[Tensor, ""]:
        """See ``negative_cosine_loss``."""
        return negative_cosine_loss(pair.online, pair.target)


def negative_cosine_loss(p: Float[Tensor, "n d"], t: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean of -cos(p, t) over the rows (SimSiam, arXiv 2011.10566, eq. 1).

    Args:
        p: Predictions of one view.
        t: Targets from the other view; the caller decides whether they are detached.

    Returns:
        Dimensionless scalar in [-1, 1]; -1 means aligned.
    """
    assert p.shape == t.shape, "cosine_similarity would broadcast"
    return -functional.cosine_similarity(p, t, dim=1).mean()
