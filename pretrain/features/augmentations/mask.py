"""Zero some dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float

from common.errors import require
from common.lazy import Tensor
from pretrain.features.augmentations.base import AugmentationContext, FeatureAugmentation, keep_norm


@dataclass(frozen=True)
class Mask(FeatureAugmentation):
    """z * m, m ~ Bernoulli(1 - ratio) for each dimension; at least one is kept.

    Of a map [n, d, y, x] whole positions are masked, at least one of each sample, and the others
    keep their length.
    """

    ratio: float = 0.2

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"fa.mask.ratio must be in [0, 1), got {self.ratio}")

    def __call__(
        self, z: Float[Tensor, "n d *yx"], others: Tensor | None, context: AugmentationContext
    ) -> Float[Tensor, "n d *yx"]:
        """See the class."""
        if z.ndim == 4:
            positions = z[:, 0].flatten(1)
            kept = kept_dimensions(positions, self.ratio, context, drops_one=True)
            return z * kept.view_as(z[:, :1]).to(z.dtype)
        return keep_norm(z * kept_dimensions(z, self.ratio, context).to(z.dtype), z)


def kept_dimensions(
    z: Float[Tensor, "n d"], ratio: float, context: AugmentationContext, *, drops_one: bool = False
) -> Bool[Tensor, "n d"]:
    """Dimensions that stay: each with probability 1 - ratio, and that of the largest draw.

    With ``drops_one`` that of the smallest draw does not stay.
    """
    draws = context.random.uniform(z.shape[1])
    is_largest = draws == draws.amax(dim=1, keepdim=True)
    kept = (draws >= context.strength * ratio) | is_largest
    return kept & (draws > draws.amin(dim=1, keepdim=True)) if drops_one else kept
