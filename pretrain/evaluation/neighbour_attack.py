"""How easily adversarial pictures lose their nearest neighbour: tools/adversarial_neighbours.py."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from common.backbone import Preprocessing
from common.config import one_line
from common.errors import UserError, require
from common.resnet import read_arch
from pretrain.config import AdversarialConfig, HeadConfig
from pretrain.data.loader import central_crops
from pretrain.data.shards import Samples
from pretrain.engine.accumulation import perturb
from pretrain.features.memory_bank import SupportQueue
from pretrain.model.backbones.resnet import ResNetBackbone
from pretrain.model.joint_embedding import OnlineNetwork

BATCH_SIZE = 64  # pictures looked at together


class NeighbourStudy:
    """A frozen network, the queries, and a queue with the projections of all other samples.

    Args:
        state: A checkpoint of ours.
        index: The samples; as many as ``num_queries`` of them, evenly spaced, are queries.
        num_queries: At least 1; at least one sample must remain for the queue.
        device: Where the network runs.
    Attributes:
        images: The queries, normalised [n, 3, s, s].
        is_query: For each sample whether it is a query, bool [m].
        queue: Projections of the other samples.
    Raises:
        UserError: If the shards hold too few samples, or the checkpoint does not fit this version.
    """

    def __init__(
        self, state: dict[str, Any], index: Samples, num_queries: int, device: torch.device
    ) -> None:
        num_rest = index.num_samples - num_queries
        require(
            num_queries >= 1 and num_rest >= 1,
            f"{num_queries} queries of {index.num_samples} samples leave {num_rest} for the queue: "
            "give fewer queries or more shards",
        )
        # Backbone and projector, without gradients of their parameters.
        try:
            backbone = ResNetBackbone(**vars(read_arch(state["arch"])))
            heads = HeadConfig(**state["config"]["heads"])
            network = OnlineNetwork(backbone, heads, 1.0, has_predictor=False)
            parts = ("backbone.", "projector.")
            weights = {k: v for k, v in state["model"].items() if k.startswith(parts)}
            network.load_state_dict(weights)
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint does not fit this version ({type(error).__name__}: "
                f"{one_line(error)}); pretrain again"
            ) from error
        self.network = network.eval().requires_grad_(False).to(device)
        self.pixels = Preprocessing(
            *(tuple(state["preprocessing"][key]) for key in ("mean", "std"))
        )
        self.is_query = torch.zeros(index.num_samples, dtype=torch.bool)
        self.is_query[torch.linspace(0, index.num_samples - 1, num_queries).long()] = True
        self.queue = SupportQueue(num_rest, state["config"]["heads"]["output_dim"]).to(device)
        queries = []
        image_size = state["config"]["data"]["image_size"]
        for batch in central_crops(index, image_size, BATCH_SIZE):
            x = self.pixels.normalise(batch.views[0])
            is_query = self.is_query[batch.sample_ids]
            queries.append(x[is_query])
            self.queue.put(self.network.project(x[~is_query].to(device)))
        self.images = torch.cat(queries).to(device)

    def changed(
        self, images: Tensor, epsilon: float, num_steps: int, control: torch.Generator | None = None
    ) -> Tensor:
        """Pictures at most epsilon / 255 away that are less similar to their nearest entry.

        With a generator they are the control: each pixel value moves by epsilon / 255 up or down,
        at random.
        """
        if control is None:
            entries = self.queue.features[self.nearest(images)]
        else:
            sign = 2 * torch.randint(0, 2, images.shape, generator=control).to(images) - 1

        def loss_of(x: Tensor) -> Tensor:
            if control is not None:
                return (x * sign).sum()
            return -functional.cosine_similarity(self.network.project(x), entries).sum()

        return perturb(loss_of, images, AdversarialConfig(epsilon, num_steps), self.pixels)

    def nearest(self, images: Float[Tensor, "n 3 s s"]) -> Tensor:
        """Position of each picture's nearest entry in the queue, int64 [n]."""
        return self.queue.nearest_indices(self.network.project(images), 1)[:, 0]

    def flips(self, epsilon: float, steps: int, control: torch.Generator | None = None) -> float:
        """Share of queries whose nearest entry is another one in the changed picture."""
        flips = [
            self.nearest(self.changed(x, epsilon, steps, control)) != self.nearest(x)
            for x in self.images.split(BATCH_SIZE)
        ]
        return float(torch.cat(flips).double().mean())
