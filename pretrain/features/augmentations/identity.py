"""Leave features as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from common.lazy import Tensor
from pretrain.features.augmentations.base import AugmentationContext, FeatureAugmentation


@dataclass(frozen=True)
class Identity(FeatureAugmentation):
    """z. Unlike no FA at all, it lets ``fa.stop_gradient`` act."""

    is_random: ClassVar = False

    def __call__(
        self, z: Float[Tensor, "n d"], others: Tensor | None, context: AugmentationContext
    ) -> Float[Tensor, "n d"]:
        """See the class."""
        return z
