"""The support queue: past features among which nearest neighbours are searched."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


class SupportQueue(nn.Module):
    """A ring buffer of normalised features with a valid count.

    It starts empty: nothing is searched that was not put in. Any batch fits any size. The buffers
    are in ``state_dict`` and so in the checkpoint. Under several processes each puts the same
    global batch, so the queues stay equal; the queue lives outside the module that DDP wraps, so
    that no buffer broadcast touches it.

    Args:
        size: Entries.
        dim: Width of a feature.
    """

    features: Tensor
    position: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a support queue needs at least one entry, got size={size}")
        self.size = size
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def put(self, features: Float[Tensor, "n d"]) -> None:
        """Append rows, normalised; the oldest fall out. Of more than ``size`` the last stay."""
        features = functional.normalize(features.detach().float(), dim=1)[-self.size :]
        n = features.shape[0]
        slots = (self.position + torch.arange(n, device=features.device)) % self.size
        self.features[slots] = features
        self.position.copy_((self.position + n) % self.size)
        self.count.copy_(torch.clamp(self.count + n, max=self.size))

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "n d"], k: int) -> Float[Tensor, "n k d"]:
        """The k entries of highest cosine similarity to each row, nearest first.

        Raises:
            ValueError: If fewer than k entries are valid.
        """
        return self.features[self.nearest_indices(z, k)]

    @torch.no_grad()
    def nearest_indices(self, z: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n k"]:
        """Positions of the k nearest entries in the buffer."""
        valid = int(self.count)
        if k > valid:
            raise ValueError(f"asked for the {k} nearest of {valid} valid entries")
        similarity = functional.normalize(z.detach().float(), dim=1) @ self.features[:valid].T
        return similarity.topk(k, dim=1).indices
