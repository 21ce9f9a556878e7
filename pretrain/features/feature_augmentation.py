"""A: the chosen feature augmentation with its queue, partners, strength and gradient stop."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain import collectives as dist
from pretrain.config import FAConfig
from pretrain.features.augmentations.base import (
    AugmentationContext,
    FeatureAugmentation,
    NeighbourAugmentation,
    PartnerAugmentation,
    RowRandom,
    keep_norm,
)
from pretrain.features.memory_bank import Distance, SupportQueue

_QUEUE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


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
        """Whether every method acts: those that read the queue wait until it is filled."""
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
        random: RowRandom,
        strength: float,
    ) -> Float[Tensor, "N n d"]:
        """A(z). The one place where FA's gradient stops.

        Args:
            z: Features of one view.
            other_view: The same samples' features of the other view, for ``partner: view``.
            random: Draws for these rows.
            strength: In [0, 1].
        """
        if not self.chains:  # the objective alone
            return z.unsqueeze(0)
        if self.fa.stop_gradient:
            z, other_view = z.detach(), other_view.detach()
        neighbours: dict[FeatureAugmentation, Tensor] = {}  # of z: they serve all N features
        features = []
        for number in range(self.fa.num_features):
            number = number if self.fa.num_features > 1 else None
            context = AugmentationContext(random, strength, number)
            # Each alternative is a chain of methods, of which each takes what the last one made.
            alternatives = []
            for chain in self.chains:
                x = z
                for method in chain:
                    if self.fa.reads_queue(method) and not self.is_ready():
                        continue
                    others = None
                    if isinstance(method, PartnerAugmentation):
                        others = self._partner(x, other_view, random)
                    elif isinstance(method, NeighbourAugmentation):
                        found = neighbours if x is z else {}
                        if method not in found:
                            found[method] = self._neighbours(method, x)
                        others = found[method]
                    x = method(x, others, context)
                alternatives.append(x)
            if len(alternatives) == 1:
                features += alternatives
                continue
            # One of the alternatives for each row, at random.
            which = random.integers(len(alternatives))
            rows = torch.arange(len(which), device=which.device)
            features.append(torch.stack(alternatives)[which, rows])
        return torch.stack(features)

    def nearest_entry(self, z: Float[Tensor, "n d"]) -> Tensor:
        """Where each row's nearest entry of the queue stands, by the method's distance: [n]."""
        assert self.queue is not None
        searches = (m for m in self.fa.methods() if isinstance(m, NeighbourAugmentation))
        distances: list[Distance] = [method.distance for method in searches] or ["cosine"]
        return self.queue.nearest_indices(z, 1, distance=distances[0])[:, 0]

    def _neighbours(self, method: NeighbourAugmentation, x: Tensor) -> Float[Tensor, "n k d"]:
        assert self.queue is not None
        found = self.queue.nearest_indices(x, method.top_k, distance=method.distance)
        return self.queue.features[found]

    def _partner(self, x: Tensor, other_view: Tensor, random: RowRandom) -> Float[Tensor, "n d"]:
        """z_j of each row: another sample of the batch, the other view, or a queue entry."""
        if self.fa.partner == "view":
            return other_view
        if self.fa.partner == "queue":
            assert self.queue is not None
            entries = self.queue.features[random.integers(self.queue.num_entries)]
            return keep_norm(entries.to(x.dtype), x.detach())
        batch, first = dist.gather(x), random.rows.start
        assert batch.shape[0] == random.num_rows, "partners come from the whole batch"
        rows = torch.arange(first, first + x.shape[0], device=x.device)
        return batch[(rows + random.shift()) % batch.shape[0]]
