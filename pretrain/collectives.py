"""The processes of a run: their devices, how they meet, and the few collective operations.

The operations are the identity in one process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta

from common.errors import StoppedBySignal, UserError
from common.lazy import Tensor, distributed, torch

SETUP_SECONDS = 180.0  # until all are there and connected; they start together, and load libraries
COLLECTIVE_SECONDS = 1800.0  # of one collective; the others wait in it while the first one probes


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Under torchrun each process of a machine takes the GPU of its own number.

    Raises:
        UserError: If ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device=cuda, but torch sees no GPU; use engine.device=auto or cpu")
    is_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", number) if is_cuda else torch.device("cpu")


def start(device_type: str, seconds: float = SETUP_SECONDS) -> None:
    """Join the group that torchrun describes in the environment, if there is one.

    torchrun must make a store for each start of a job (``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, as
    our scripts set it): in a store that it keeps, a process would find the address of a dead one.

    Args:
        device_type: "cuda" takes NCCL and the GPU of the process's number, "cpu" Gloo.
        seconds: Until all processes are there and connected.

    Raises:
        UserError: If they are not; names the rank, the host and the address.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        return
    device = choose_device("cuda") if device_type == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    patience, collective = timedelta(seconds=seconds), timedelta(seconds=COLLECTIVE_SECONDS)
    try:
        store, rank, world_size = next(distributed.rendezvous("env://", timeout=patience))  # type: ignore
        distributed.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=patience,
            device_id=device,  # NCCL connects at once, not in the first collective
        )
        store.set_timeout(collective)
        distributed.distributed_c10d._set_pg_timeout(collective)
    except (RuntimeError, ValueError) as error:  # torch's DistError and its kinds, Gloo's own
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        rank, world_size, address, port = (os.environ.get(name, "?") for name in names)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"rank {rank} of {world_size} on {socket.gethostname()} could not form the group at "
            f"{address}:{port}: {first_line}; all processes must start and reach each other: see "
            "the network in docs/scaling.md"
        ) from error


def stop() -> None:
    """Leave the group, as all of its processes do."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def in_group() -> Iterator[None]:
    """Leave the group at the end, and when a signal has ended all processes together.

    A process that fails alone must not: NCCL would wait there for the others, which wait for this
    one in a collective, and torchrun would learn of nothing.
    """
    try:
        yield
    except StoppedBySignal:
        stop()
        raise
    stop()


def end_process(status: int) -> int:
    """Return the status to end with; one process of a group that has failed ends here, at once."""
    if status and is_on():
        sys.stdout.flush()
        os._exit(status)
    return status


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
    from pretrain.differentiable_gather import Gather

    return Gather.apply(x)  # type: ignore[return-value]


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
