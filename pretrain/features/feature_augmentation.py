"""A: the chosen feature augmentation with its queue, partners, strength and gradient stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain import collectives as dist
from pretrain.config import FAConfig
from pretrain.features import operations
from pretrain.features.memory_bank import SupportQueue
from pretrain.features.row_random import RowRandom

_QUEUE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class AugmentationContext:
    """What A uses beside the features: random numbers, and its strength in [0, 1]."""

    random: RowRandom
    strength: float


class FeatureAugmenter(nn.Module):
    """Features in, N augmented features out.

    Args:
        fa: The method and everything about it.
        dim: Width of a feature.
    """

    def __init__(self, fa: FAConfig, dim: int) -> None:
        super().__init__()
        self.fa, self.chains = fa, fa.chains()
        self.queue: SupportQueue | None = None
        if fa.uses_queue():
            self.queue = SupportQueue(fa.queue_size, dim, dtype=_QUEUE_DTYPES[fa.queue_dtype])

    def is_ready(self) -> bool:
        """Whether every link acts: those that read the queue wait until it is filled."""
        return self.queue is None or self.queue.num_entries >= self.fa.min_fill

    def strength(self, progress: float) -> float:
        """The strength after this share of the training, 0..1."""
        start, end = self.fa.strength_start, self.fa.strength
        if start is None:
            return end
        if self.fa.strength_curve == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return start + (end - start) * progress

    def forward(
        self,
        z: Float[Tensor, "n d"],
        other_view: Float[Tensor, "n d"],
        context: AugmentationContext,
    ) -> Float[Tensor, "N n d"]:
        """A(z). The one place where FA's gradient stops.

        Args:
            z: Features of one view.
            other_view: The same samples' features of the other view, for ``partner: view``.
            context: Random numbers and strength.
        """
        if self.chains == (("none",),):  # the base method
            return z.unsqueeze(0)
        if self.fa.stop_gradient:
            z, other_view = z.detach(), other_view.detach()
        # Where the first link is a search, its result serves all N features.
        nearest = self._nearest(z) if self.chains[0][0] == "nn" else None
        features = []
        for number in range(self.fa.num_features):
            alternatives = []
            for chain in self.chains:
                x = z
                for name in chain:
                    found = nearest if x is z else None
                    x = self._link(name, x, other_view, found, number, context)
                alternatives.append(x)
            if len(alternatives) == 1:
                features += alternatives
                continue
            # One of the alternatives for each row, at random.
            which = context.random.integers(len(alternatives))
            rows = torch.arange(len(which), device=which.device)
            features.append(torch.stack(alternatives)[which, rows])
        return torch.stack(features)

    def _link(
        self,
        name: str,
        x: Tensor,
        other_view: Tensor,
        nearest: Tensor | None,
        number: int,
        context: AugmentationContext,
    ) -> Tensor:
        fa, random, strength = self.fa, context.random, context.strength
        if name == "identity":
            return x
        if name == "mask":
            return operations.mask(x, random, ratio=fa.mask_ratio, strength=strength)
        if name == "noise":
            return operations.noise(x, random, sigma=fa.noise_sigma, strength=strength)
        if name == "nn":
            if not self.is_ready():
                return x
            nearest = self._nearest(x) if nearest is None else nearest
            assert nearest is not None
            rank = number if fa.num_features > 1 else None
            return operations.neighbour(
                x, nearest, random, choice=fa.nn_choice, number=rank, strength=strength
            )
        partner = self._partner(x, other_view, random)
        if partner is None:
            return x
        if name == "mixup":
            return operations.mixup(x, partner, random, alpha=fa.mixup_alpha, strength=strength)
        if name == "cutmix":
            return operations.cutmix(x, partner, random, ratio=fa.cutmix_ratio, strength=strength)
        assert name == "extrapolate"
        return operations.extrapolate(
            x, partner, random, scale=fa.extrapolate_scale,
            per_dimension=fa.extrapolate_per_dimension, strength=strength,
        )  # fmt: skip

    def nearest_indices(self, z: Float[Tensor, "n d"], k: int) -> Tensor:
        """Where the k nearest entries of the queue stand: [n, k]."""
        assert self.queue is not None
        return self.queue.nearest_indices(z, k, distance=self.fa.nn_distance)

    def _nearest(self, z: Tensor) -> Tensor | None:
        """The top_k neighbours of each row, [n, k, d]; None until the queue is filled."""
        if self.queue is None or not self.is_ready():
            return None
        return self.queue.features[self.nearest_indices(z, self.fa.top_k)]

    def _partner(self, x: Tensor, other_view: Tensor, random: RowRandom) -> Tensor | None:
        """z_j of each row: another sample of the batch, the other view, or a queue entry."""
        if self.fa.partner == "view":
            return other_view
        if self.fa.partner == "queue":
            assert self.queue is not None
            if not self.is_ready():
                return None
            entries = self.queue.features[random.integers(self.queue.num_entries)]
            return operations.keep_norm(entries.to(x.dtype), x.detach())
        batch, first = dist.gather(x), random.rows.start
        assert batch.shape[0] == random.num_rows, "partners come from the whole batch"
        rows = torch.arange(first, first + x.shape[0], device=x.device)
        return batch[(rows + random.shift()) % batch.shape[0]]
