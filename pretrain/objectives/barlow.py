"""Barlow Twins (arXiv 2103.03230)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float

from common.errors import at_least, positive
from common.lazy import Tensor, functional, nn
from pretrain import collectives as dist
from pretrain.objectives.base import Objective, Pair


@dataclass(frozen=True)
class Barlow(Objective):
    """The cross-correlation of both views over the global batch is drawn to the identity."""

    architecture: ClassVar = "basic"

    name: Literal["barlow"] = "barlow"
    off_diagonal_weight: float = 0.005  # lambda of the paper
    loss_weight: float = 0.025  # on the whole loss; solo-learn's scale_loss

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "objective", off_diagonal_weight=0)
        positive(self, "objective", "loss_weight")

    def loss(self, pair: Pair, state: nn.Module | None) -> Float[Tensor, ""]:
        """See ``barlow_loss``."""
        online, target = dist.gather(pair.online), dist.gather(pair.target)
        weight = self.off_diagonal_weight
        return self.loss_weight * barlow_loss(online, target, off_diagonal_weight=weight)


def barlow_loss(
    o: Float[Tensor, "m d"], t: Float[Tensor, "m d"], *, off_diagonal_weight: float
) -> Float[Tensor, ""]:
    """Sum over the cross-correlation matrix C of (1 - C_ii)^2 and lambda C_ij^2 (eq. 1).

    Each dimension has mean 0 and variance 1 over the batch, with 1e-5 added to the variance as in
    the paper's code, which is a BN.

    Args:
        o: Features of one view, of the global batch, at least 2 rows.
        t: Those of the other view; the caller decides whether they are detached.
        off_diagonal_weight: lambda.

    Returns:
        Dimensionless scalar, at least 0.
    """
    assert o.shape == t.shape, "one target for each row"
    o, t = (functional.batch_norm(x, None, None, training=True) for x in (o, t))
    correlation: Float[Tensor, "d d"] = o.T @ t / len(o)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal_weight * off_diagonal
