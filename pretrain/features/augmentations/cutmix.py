"""Take some dimensions from another feature."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from common.errors import require
from common.lazy import Tensor, torch
from pretrain.features.augmentations.base import AugmentationContext, PartnerAugmentation, keep_norm
from pretrain.features.augmentations.mask import kept_dimensions


@dataclass(frozen=True)
class CutMix(PartnerAugmentation):
    """z where m, else z_j; m as in ``mask``."""

    ratio: float = 0.2  # share of dimensions taken from the partner

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"fa.cutmix.ratio must be in [0, 1), got {self.ratio}")

    def __call__(
        self, z: Float[Tensor, "n d"], others: Float[Tensor, "n d"], context: AugmentationContext
    ) -> Float[Tensor, "n d"]:
        """See the class."""
        return keep_norm(torch.where(kept_dimensions(z, self.ratio, context), z, others), z)
