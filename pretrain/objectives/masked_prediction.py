"""Masked features predicted from the visible ones, position by position of the last map.

Our definition (docs/method.md). The FA paper (arXiv 2410.12396) proposes FA for predictive methods;
targets of an EMA branch are those of BYOL (arXiv 2006.07733), and I-JEPA (arXiv 2301.08243)
predicts features of masked positions as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Float

from common.errors import at_least, require
from common.lazy import Tensor, functional, nn
from pretrain.objectives.base import EmaObjective, Pair
from pretrain.objectives.byol import byol_loss


@dataclass(frozen=True)
class MaskedPrediction(EmaObjective):
    """A view's masked map predicts the EMA branch's map of the same view.

    ``fa.method=mask`` masks. Views are different crops, so that positions of one are not those of
    the other: what is compared between them is the mean over the positions, as in BYOL.
    """

    architecture: ClassVar = "pre"
    is_per_sample: ClassVar = True
    scale: ClassVar = 1.0
    min_positions: ClassVar = 4

    name: Literal["masked_prediction"] = "masked_prediction"
    global_weight: float = 1.0  # of BYOL's loss between the views' means over positions; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "objective", global_weight=0)

    def check_fa(self, method: str, architecture: str, views: str, stop_gradient: bool) -> None:
        """See the base class."""
        reasons = {
            "method": (method, "mask", "what is predicted are masked positions, and no other "
                       "method masks any"),
            "architecture": (architecture, "pre", "the predictor comes behind the mask"),
            "views": (views, "both", "each view is masked and predicts its own map"),
            "stop_gradient": (stop_gradient, False, "no gradient would reach the backbone from "
                              "what the visible positions predict"),
        }  # fmt: skip
        for key, (value, needed, reason) in reasons.items():
            require(
                value in (needed, "auto"),
                f"fa.{key}={str(value).lower()} with objective.name={self.name}: {reason}; use "
                f"fa.{key}={str(needed).lower()}",
            )

    def loss(self, pair: Pair, state: nn.Module | None) -> Float[Tensor, ""]:
        """See ``masked_prediction_loss`` and ``byol_loss``."""
        assert pair.own_target is not None
        assert pair.augmented is not None
        is_masked = (pair.augmented == 0).all(dim=1)
        loss = masked_prediction_loss(pair.online, pair.own_target, is_masked)
        if self.global_weight == 0:
            return loss
        means = (x.mean(dim=(2, 3)) for x in (pair.online, pair.target))
        return loss + self.global_weight * byol_loss(*means)


def masked_prediction_loss(
    p: Float[Tensor, "n d y x"], t: Float[Tensor, "n d y x"], is_masked: Bool[Tensor, "n y x"]
) -> Float[Tensor, ""]:
    """Mean of 2 - 2 cos(p, t) over the masked positions of each sample, then over the samples.

    Args:
        p: Predictions, made of the visible positions.
        t: Targets at the same positions; the caller decides whether they are detached.
        is_masked: Which positions count; at least one of each sample.

    Returns:
        Dimensionless scalar in [0, 4]; 0 means that directions agree.
    """
    assert p.shape == t.shape, "cosine_similarity would broadcast"
    distances = (2 - 2 * functional.cosine_similarity(p, t, dim=1)) * is_masked
    return (distances.sum(dim=(1, 2)) / is_masked.sum(dim=(1, 2))).mean()
