"""Move away from another feature."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from common.errors import at_least
from common.lazy import Tensor
from pretrain.features.augmentations.base import AugmentationContext, PartnerAugmentation, keep_norm


@dataclass(frozen=True)
class Extrapolate(PartnerAugmentation):
    """z + lambda (z - z_j), lambda = scale Beta(2, 2).

    One lambda for each row, or one for each of its dimensions (as arXiv 2108.02982 draws them).
    """

    scale: float = 0.5
    per_dimension: bool = False

    def __post_init__(self) -> None:
        at_least(self, "fa.extrapolate", scale=0)

    def __call__(
        self, z: Float[Tensor, "n d"], others: Float[Tensor, "n d"], context: AugmentationContext
    ) -> Float[Tensor, "n d"]:
        """See the class."""
        num_draws = z.shape[1] if self.per_dimension else 1
        lam = context.strength * self.scale * context.random.beta(2.0, num_draws, dtype=z.dtype)
        return keep_norm(z + lam * (z - others), z)
