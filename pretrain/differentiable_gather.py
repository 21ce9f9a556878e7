"""Gathering with gradient: a module of its own, since its class needs torch when it is imported."""

from typing import Any

from torch import Tensor, distributed
from torch.autograd import Function


class Gather(Function):
    """All processes' rows in rank order: [n, ..] -> [world_size * n, ..], the same n everywhere.

    Each row's gradient is the sum of those that all processes have for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Gather the rows."""
        rows = x.new_empty(distributed.get_world_size() * len(x), *x.shape[1:])
        distributed.all_gather_into_tensor(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Each process sums what all have for its rows."""
        world_size, gradient = distributed.get_world_size(), gradient.contiguous()
        if gradient.is_cuda:
            own = gradient.new_empty(len(gradient) // world_size, *gradient.shape[1:])
            distributed.reduce_scatter_tensor(own, gradient)
            return own
        parts = gradient.new_empty(gradient.shape)  # of all processes; Gloo cannot reduce-scatter
        distributed.all_to_all_single(parts, gradient)
        return parts.unflatten(0, (world_size, -1)).sum(dim=0)
