"""The few collective operations that pretraining needs; all are the identity in one process.

``pretrain.engine.rendezvous`` starts and ends the process group.
"""

from __future__ import annotations

from common.lazy import Tensor, distributed, torch


def is_on() -> bool:
    """Whether a process group of more than one process is up."""
    return distributed.is_available() and distributed.is_initialized() and world_size() > 1


def world_size() -> int:
    """Processes in the group; 1 without a group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number in the group; 0 without a group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait() -> None:
    """Until all processes are here."""
    if is_on():
        distributed.barrier()


def local_rows(num_local: int) -> slice:
    """Where this process's rows stand in a gathered batch of equal parts."""
    return slice(rank() * num_local, (rank() + 1) * num_local)


def gather(x: Tensor) -> Tensor:
    """All processes' rows in rank order, with gradient: [n, d] -> [world_size * n, d]."""
    if not is_on():
        return x
    from torch.distributed.nn import functional as dist_functional

    return torch.cat(dist_functional.all_gather(x.contiguous()))


def total(x: Tensor) -> Tensor:
    """Sum over the processes, without gradient."""
    x = x.detach()
    if is_on():
        x = x.clone()
        distributed.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """Mean over the processes, without gradient."""
    return total(x) / world_size() if is_on() else x.detach()


def highest(x: Tensor) -> Tensor:
    """Largest value over the processes, without gradient."""
    x = x.detach().clone()
    if is_on():
        distributed.all_reduce(x, op=distributed.ReduceOp.MAX)
    return x


def total_of(number: float, device: torch.device) -> float:
    """Sum of a number over the processes; one process does not wait for its device."""
    if not is_on():
        return number
    return float(total(torch.tensor(float(number), device=device)))
