"""Replace a feature by a neighbour in the support queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float

from common.errors import require
from common.lazy import Tensor
from pretrain.features.augmentations.base import (
    AugmentationContext,
    NeighbourAugmentation,
    keep_norm,
)


@dataclass(frozen=True)
class NearestNeighbour(NeighbourAugmentation):
    """A neighbour's value with z's gradient (straight-through).

    Of N features each is the neighbour of its own rank. A strength s below 1 gives a mixture of
    directions: (1 - s) z + s NN(z).
    """

    choice: Literal["random", "consensus"] = "random"  # one of the top_k, or their robust centre

    def check(self, num_features: int, min_fill: int) -> None:
        """See the base class."""
        super().check(num_features, min_fill)
        require(
            num_features == 1 or self.choice == "random",
            "fa: nn.choice=consensus makes one feature of the top_k, so num_features must be 1, "
            f"got {num_features}",
        )

    def __call__(
        self, z: Float[Tensor, "n d"], others: Float[Tensor, "n k d"], context: AugmentationContext
    ) -> Float[Tensor, "n d"]:
        """See the class."""
        from pretrain.features.memory_bank import consensus

        num, original = others.shape[1], z.detach()
        if context.number is not None:
            found = others[:, context.number]
        elif self.choice == "consensus":
            found = consensus(others, original)
        elif num == 1:
            found = others[:, 0]
        else:
            which = context.random.integers(num, 1, 1).expand(-1, 1, others.shape[2])
            found = others.gather(1, which).squeeze(1)
        found = keep_norm(found.to(z.dtype), original)
        if context.strength < 1:
            mixture = (1 - context.strength) * original + context.strength * found
            found = keep_norm(mixture, original)
        return z + (found - z).detach()
