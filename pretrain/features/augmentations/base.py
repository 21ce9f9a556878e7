"""What a method of feature augmentation is: parameters, and a function of features.

Each method is a module of this package with one subclass of ``FeatureAugmentation``, whose fields
are the config's section ``fa.<name>``. The definitions are ours (docs/method.md); the idea is that
of arXiv 2410.12396. These modules import no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float

from common.errors import require
from common.lazy import Tensor, functional
from common.registry import Registry

if TYPE_CHECKING:
    from pretrain.features.row_random import RowRandom


@dataclass(frozen=True)
class AugmentationContext:
    """What a method uses beside the features.

    Attributes:
        random: Draws for the global batch and hands out these rows, so that the number of
            processes changes nothing.
        strength: In [0, 1], scales every method; 0 is the identity, and draws as much.
        number: Which of N augmented features is made; None if it is the only one.
    """

    random: RowRandom
    strength: float = 1.0
    number: int | None = None


@dataclass(frozen=True)
class FeatureAugmentation:
    """Features in, similar features out, with their input's norm.

    Attributes:
        is_random: Whether another call gives other features; the identity does not.
    """

    registry: ClassVar[Registry[FeatureAugmentation]]
    is_random: ClassVar[bool] = True

    def check(self, num_features: int, min_fill: int) -> None:
        """Refuse what does not go with ``fa.num_features`` and ``fa.min_fill``.

        Raises:
            UserError: Naming both keys.
        """

    def __call__(
        self, z: Float[Tensor, "n d"], others: Tensor | None, context: AugmentationContext
    ) -> Float[Tensor, "n d"]:
        """Augment features.

        Args:
            z: Features.
            others: What the kind of method needs; see the subclasses below.
            context: Random numbers and strength.
        """
        raise NotImplementedError


FeatureAugmentation.registry = Registry("pretrain.features.augmentations", FeatureAugmentation)


@dataclass(frozen=True)
class PartnerAugmentation(FeatureAugmentation):
    """``others`` holds another feature for each row, z_j: [n, d]; ``fa.partner`` says which."""


@dataclass(frozen=True)
class NeighbourAugmentation(FeatureAugmentation):
    """``others`` holds the nearest entries of the support queue: [n, top_k, d], nearest first."""

    top_k: int = 1
    distance: Literal["cosine", "truncated"] = "cosine"  # truncated: resists outlier dimensions

    def check(self, num_features: int, min_fill: int) -> None:
        """See the base class."""
        require(
            1 <= self.top_k <= min_fill,
            f"fa: 1 <= top_k ({self.top_k}) <= min_fill ({min_fill}) must hold",
        )
        require(
            num_features == 1 or self.top_k >= num_features,
            f"fa: num_features={num_features} takes the N nearest and needs top_k >= N, "
            f"got top_k={self.top_k}",
        )


def keep_norm(
    augmented: Float[Tensor, "... d"], original: Float[Tensor, "... d"]
) -> Float[Tensor, "... d"]:
    """Rescale each augmented row to the norm of its original."""
    return functional.normalize(augmented, dim=-1) * original.norm(dim=-1, keepdim=True)
