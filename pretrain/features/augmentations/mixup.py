"""Mix with another feature."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from common.errors import positive
from common.lazy import Tensor, torch
from pretrain.features.augmentations.base import AugmentationContext, PartnerAugmentation, keep_norm


@dataclass(frozen=True)
class Mixup(PartnerAugmentation):
    """lambda z + (1 - lambda) z_j, l ~ Beta(alpha, alpha) for each row, lambda = max(l, 1 - l).

    So the row itself weighs most. The strength scales (1 - lambda).
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "fa.mixup", "alpha")

    def __call__(
        self, z: Float[Tensor, "n d"], others: Float[Tensor, "n d"], context: AugmentationContext
    ) -> Float[Tensor, "n d"]:
        """See the class."""
        lam = context.random.beta(self.alpha, 1, dtype=z.dtype)
        share = context.strength * torch.minimum(lam, 1 - lam)
        return keep_norm((1 - share) * z + share * others, z)
