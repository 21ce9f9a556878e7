"""How the processes of a job become a group: all that torchrun announced are there, or one message.

torchrun keeps one store for all starts of a job, so keys of a group that died are still there when
the next one meets. Gloo reads its peers' addresses from such keys: a process that is quicker than
its peer would dial an address that nobody listens to any more, until the group's time-out. So the
processes first agree on a part of the store that no other group can know.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from common.errors import UserError, require

SETUP_SECONDS = 180.0  # until all are there and connected; they start together, and load libraries
COLLECTIVE_SECONDS = 1800.0  # of one collective; the others wait in it while the first one probes
_TOKEN_KEY = "pretrain/rendezvous"
_POLL_SECONDS = 0.1
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def start(device_type: str, seconds: float = SETUP_SECONDS) -> None:
    """Join the group that torchrun describes in the environment, if there is one.

    Args:
        device_type: "cuda" takes NCCL and the GPU of the process's number, "cpu" Gloo.
        seconds: Until all processes are there and connected.

    Raises:
        UserError: If they are not; names the rank, the address and who is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch_dist.is_initialized():
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    require(not missing, f"WORLD_SIZE is set, {', '.join(missing)} not: start through torchrun")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"rank {rank} of {world_size} on {socket.gethostname()}"
    deadline = time.monotonic() + seconds
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else it listens itself
        _connect(address, who, seconds)
    patience, collective = timedelta(seconds=seconds), timedelta(seconds=COLLECTIVE_SECONDS)
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=patience))
        store.set_timeout(patience)
        own = group_store(
            store, rank, world_size, deadline - time.monotonic(), f"{who}, at {address}"
        )
        torch_dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=own,
            rank=rank,
            world_size=world_size,
            timeout=patience,
        )
        store.set_timeout(collective)  # NCCL connects later, through it
        public = getattr(torch_dist, "set_timeout", None)  # newer than the oldest torch allowed
        (public or torch_dist.distributed_c10d._set_pg_timeout)(collective)
    except RuntimeError as error:  # torch's DistError and its kinds, Gloo's own
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{who} could not form the group at {address}: {first_line}; all processes must "
            "reach each other: see the network in docs/scaling.md"
        ) from error


def stop() -> None:
    """Leave the group."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def group_store(store: Store, rank: int, world_size: int, seconds: float, who: str) -> Store:
    """Wait until every rank is there now; what an earlier group left in the store does not count.

    The first process makes a random token and publishes it. Each other process answers under that
    token with a token of its own; the first one writes down all answers, and a process that finds
    its own among them knows that it is meant. A token of an earlier group leads to a list without
    its own.

    Args:
        store: That all processes reach, used or not.
        rank: Of this process.
        world_size: Number of processes.
        seconds: How long to wait.
        who: This process and the address, for the message.

    Returns:
        A part of the store for this group alone.

    Raises:
        UserError: Naming the ranks that did not answer.
    """
    own, others = uuid.uuid4().hex, range(1, world_size)
    absent = [0]
    deadline = time.monotonic() + seconds
    if rank == 0:
        store.set(_TOKEN_KEY, own)
    while time.monotonic() < deadline:
        if rank == 0:
            absent = [r for r in others if not store.check([f"{own}/{r}"])]
            if not absent:
                answers = [store.get(f"{own}/{r}").decode() for r in others]
                store.set(f"{own}/all", json.dumps(answers))
                return PrefixStore(own, store)
        elif store.check([_TOKEN_KEY]):
            token = store.get(_TOKEN_KEY).decode()
            store.set(f"{token}/{rank}", own)
            if store.check([f"{token}/all"]) and own in json.loads(store.get(f"{token}/all")):
                return PrefixStore(token, store)
        time.sleep(_POLL_SECONDS)
    raise UserError(
        f"{who}: rank {', '.join(map(str, absent))} did not answer within {seconds:.0f} s; its log "
        "says whether it started"
    )


def _connect(address: str, who: str, seconds: float) -> None:
    """Wait until something listens at the address."""
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, int(port)), timeout=max(1.0, min(left, 10.0))).close()
            return
        except OSError as error:
            if left <= 0:
                raise UserError(
                    f"{who} does not reach {address}, where the processes meet, within "
                    f"{seconds:.0f} s: {error.strerror or error}; see the network in "
                    "docs/scaling.md"
                ) from error
        time.sleep(min(1.0, max(left, 0.0)))
