"""The base objectives: the loss of one view's online features against the other view's target."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pretrain import collectives as dist
from pretrain.config import ObjectiveConfig
from pretrain.features.memory_bank import SupportQueue
from pretrain.objectives import losses

Features = Float[Tensor, "n d"]


class Prototypes(nn.Module):
    """Directions to which features are assigned (SwAV, arXiv 2006.09882).

    Only the direction of a row of ``weight`` counts: it is normalised in every forward pass, where
    SwAV normalises the parameter itself before each step. Rows start uniform on the unit sphere.

    Args:
        num_prototypes: Rows K of ``weight``.
        dim: Width d of a feature.
    """

    def __init__(self, num_prototypes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(functional.normalize(torch.randn(num_prototypes, dim), dim=1))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n K"]:
        """Cosine similarity of each feature to each prototype, in [-1, 1]."""
        return functional.normalize(x, dim=1) @ functional.normalize(self.weight, dim=1).T


class Objective(nn.Module):
    """L( online, target ) for one direction of the two views; nothing is detached here.

    Args:
        config: Which loss, and its constants.
        dim: Width of a feature.
    """

    def __init__(self, config: ObjectiveConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.negatives: nn.ModuleList | None = None
        if config.name == "moco":  # plain keys of view 1 and of view 2
            self.negatives = nn.ModuleList(
                SupportQueue(config.num_negatives, dim) for _ in range(2)
            )

    @property
    def scale(self) -> float:
        """Factor on the sum of both directions: BYOL adds them, all others take the mean."""
        return 1.0 if self.config.name == "byol" else 0.5

    def forward(
        self,
        online: Features,
        target: Features,
        plain_target: Features,
        target_view: int,
        prototypes: Prototypes | None,
    ) -> Float[Tensor, ""]:
        """The loss of this process's rows.

        Args:
            online: What predicts: z, q(z), q(A(z)) or A(q(z)).
            target: What is predicted: t or A(t).
            plain_target: t without augmentation.
            target_view: Which view t is of, 0 or 1.
            prototypes: Cluster directions (SwAV).
        """
        name, temperature = self.config.name, self.config.temperature
        if name == "byol":
            return losses.byol_loss(online, target)
        if name == "simsiam":
            return losses.negative_cosine_loss(online, target)
        if name == "moco":
            keys = self._negatives(target_view)
            return losses.moco_loss(online, target, keys, temperature=temperature)
        if name == "swav":
            assert prototypes is not None
            codes = losses.sinkhorn(
                prototypes(target), epsilon=self.config.sinkhorn_epsilon,
                num_iterations=self.config.sinkhorn_iterations,
            )  # fmt: skip
            return losses.swav_loss(prototypes(online), codes, temperature=temperature)
        first = dist.local_rows(target.shape[0]).start
        columns = dist.gather(online)
        if name == "infonce":
            return losses.infonce_loss(
                target, columns, temperature=temperature, first_positive=first
            )
        assert name == "simclr"
        others = dist.gather(plain_target)
        return losses.nt_xent_loss(
            target, columns, others, temperature=temperature, first_positive=first
        )

    def _negatives(self, view: int) -> Float[Tensor, "K d"]:
        assert self.negatives is not None
        queue = self.negatives[view]
        assert isinstance(queue, SupportQueue)
        return queue.features[: queue.num_entries]

    def put(self, keys: Float[Tensor, "2 n d"]) -> None:
        """Let the plain keys of both views of the global batch enter (MoCo)."""
        if self.negatives is not None:
            for queue, rows in zip(self.negatives, keys, strict=True):
                assert isinstance(queue, SupportQueue)
                queue.put(rows)
