"""Zero some dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float

from common.errors import require
from common.lazy import Tensor
from pretrain.features.augmentations.base import AugmentationContext, FeatureAugmentation, keep_norm


@dataclass(frozen=True)
class Mask(FeatureAugmentation):
    """z * m, m ~ Bernoulli(1 - ratio) for each dimension; at least one is kept."""

    ratio: float = 0.2

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"fa.mask.ratio must be in [0, 1), got {self.ratio}")

    def __call__(
        self, z: Float[Tensor, "n d"], others: Tensor | None, context: AugmentationContext
    ) -> Float[Tensor, "n d"]:
        """See the class."""
        return keep_norm(z * kept_dimensions(z, self.ratio, context).to(z.dtype), z)


def kept_dimensions(
    z: Float[Tensor, "n d"], ratio: float, context: AugmentationContext
) -> Bool[Tensor, "n d"]:
    """Dimensions that stay: each with probability 1 - ratio, and that of the largest draw."""
    draws = context.random.uniform(z.shape[1])
    is_largest = draws == draws.amax(dim=1, keepdim=True)
    return (draws >= context.strength * ratio) | is_largest
