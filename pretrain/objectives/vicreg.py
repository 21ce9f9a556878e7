"""VICReg (arXiv 2105.04906)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float

from common.errors import at_least
from common.lazy import Tensor, functional, nn
from pretrain import collectives as dist
from pretrain.objectives.base import Objective, Pair


@dataclass(frozen=True)
class VicReg(Objective):
    """Both views agree; over the global batch each dimension varies, and no two are correlated."""

    architecture: ClassVar = "basic"

    name: Literal["vicreg"] = "vicreg"
    # lambda, mu and nu of the paper, and the defaults of solo-learn
    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "objective", invariance_weight=0, variance_weight=0, covariance_weight=0)

    def loss(self, pair: Pair, state: nn.Module | None) -> Float[Tensor, ""]:
        """See ``invariance``, ``variance`` and ``covariance``; the last two of both branches."""
        o, t = dist.gather(pair.online), dist.gather(pair.target)
        return (
            self.invariance_weight * invariance(o, t)
            + self.variance_weight * (variance(o) + variance(t))
            + self.covariance_weight * (covariance(o) + covariance(t))
        )


def invariance(o: Float[Tensor, "m d"], t: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Mean squared difference, over rows and dimensions (s of algorithm 1)."""
    assert o.shape == t.shape, "mse_loss would broadcast"
    return functional.mse_loss(o, t)


def variance(x: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Mean over the dimensions of max(0, 1 - sqrt(var + 1e-4)) (eq. 1 and 2), at least 2 rows."""
    return functional.relu(1 - (x.var(dim=0) + 1e-4).sqrt()).mean()


def covariance(x: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Sum of the squared covariances of two dimensions each, over d (eq. 3 and 4)."""
    x = x - x.mean(dim=0)
    matrix: Float[Tensor, "d d"] = x.T @ x / (len(x) - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / x.shape[1]
