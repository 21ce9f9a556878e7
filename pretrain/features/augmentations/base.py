"""What a method of feature augmentation is: parameters, a function of features, random numbers.

Each method is a module of this package with one subclass of ``FeatureAugmentation``, whose fields
are the config's section ``fa.<name>``. The definitions are ours (docs/method.md); the idea is that
of arXiv 2410.12396. These modules import no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float

from common.config import Registry
from common.errors import require
from common.lazy import Tensor, functional, torch


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


class RowRandom:
    """Draws numbers for the whole batch and hands out those of some rows.

    So what a row gets depends on (seed, step, its place in the global batch), and not on how many
    processes or micro-batches share the work.

    Args:
        generator: The source; draws advance it by the same amount whatever ``rows`` is.
        rows: The rows that are here, out of ``num_rows``.
        num_rows: Rows of the global batch.
    """

    def __init__(self, generator: torch.Generator, rows: slice, num_rows: int) -> None:
        assert 0 <= rows.start < rows.stop <= num_rows, (rows, num_rows)
        self.generator, self.rows, self.num_rows = generator, rows, num_rows

    @classmethod
    def whole(cls, generator: torch.Generator, num_rows: int) -> RowRandom:
        """All rows are here."""
        return cls(generator, slice(0, num_rows), num_rows)

    def _source(self, dtype: torch.dtype | None) -> dict:
        device = self.generator.device
        return {"generator": self.generator, "device": device, "dtype": dtype or torch.float32}

    def uniform(self, *tail: int, dtype: torch.dtype | None = None) -> Tensor:
        """U(0, 1), fp32 unless given: [rows, *tail]."""
        return torch.rand((self.num_rows, *tail), **self._source(dtype))[self.rows]

    def normal(self, *tail: int, dtype: torch.dtype | None = None) -> Tensor:
        """N(0, 1), fp32 unless given: [rows, *tail]."""
        return torch.randn((self.num_rows, *tail), **self._source(dtype))[self.rows]

    def integers(self, high: int, *tail: int) -> Tensor:
        """Uniform in 0..high-1, int64: [rows, *tail]."""
        shape = (self.num_rows, *tail)
        return torch.randint(high, shape, **self._source(torch.int64))[self.rows]

    def shift(self) -> Tensor:
        """One number in 1..num_rows-1, for all rows: int64, on the generator's device."""
        return torch.randint(1, self.num_rows, (), **self._source(torch.int64))

    def beta(self, alpha: float, *tail: int, dtype: torch.dtype | None = None) -> Tensor:
        """Beta(alpha, alpha), fp32 unless given: [rows, *tail]."""
        if alpha == 1.0:
            return self.uniform(*tail, dtype=dtype)
        # As g1 / (g1 + g2) of two Gamma(alpha, 1) draws; their logarithms are those of
        # Gamma(alpha + 1) U^(1 / alpha), which cannot underflow.
        source, logarithms = self._source(torch.float64), []
        ones = torch.ones((self.num_rows, *tail), dtype=torch.float64, device=source["device"])
        for _ in range(2):
            uniform = torch.rand(ones.shape, **source)
            logarithm = uniform.clamp_min(torch.finfo(torch.float64).tiny).log()
            # Only this private op of torch's takes a generator.
            gamma = torch._standard_gamma((alpha + 1) * ones, generator=self.generator)  # type: ignore
            logarithms.append(gamma.log() + logarithm / alpha)
        share = torch.sigmoid(logarithms[0] - logarithms[1])
        return share.to(dtype or torch.float32)[self.rows]


def fa_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """FA's random numbers of one optimiser step: a pure function of (seed, step)."""
    digest = hashlib.blake2b(f"fa|{seed}|{step}".encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator
