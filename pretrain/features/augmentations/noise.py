"""Add Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from common.errors import at_least
from common.lazy import Tensor
from pretrain.features.augmentations.base import AugmentationContext, FeatureAugmentation, keep_norm


@dataclass(frozen=True)
class Noise(FeatureAugmentation):
    """z + sigma |z| / sqrt(d) eps with eps ~ N(0, I): noise of about sigma |z|."""

    sigma: float = 0.2

    def __post_init__(self) -> None:
        at_least(self, "fa.noise", sigma=0)

    def __call__(
        self, z: Float[Tensor, "n d"], others: Tensor | None, context: AugmentationContext
    ) -> Float[Tensor, "n d"]:
        """See the class."""
        eps = context.random.normal(z.shape[1], dtype=z.dtype)
        size = context.strength * self.sigma * z.norm(dim=1, keepdim=True) / z.shape[1] ** 0.5
        return keep_norm(z + size * eps, z)
