"""How the processes of a job become a group: all that torchrun announced are there, or one message.

torchrun keeps one store for all starts of a job, so keys of a group that died are still there when
the next one meets. Gloo reads its peers' addresses from such keys: a process that is quicker than
its peer would dial an address that nobody listens to any more, until the group's time-out. So each
group calls its roll first, and then uses a part of the store that no other group can know.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from common.errors import UserError, require

SETUP_SECONDS = 180.0  # until all are there and connected; they start together, and load libraries
COLLECTIVE_SECONDS = 1800.0  # of one collective; the others wait in it while the first one probes
_CALL = "pretrain/roll_call"
_POLL_SECONDS = 0.1
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def join(backend: str, seconds: float = SETUP_SECONDS) -> None:
    """Make the default group of ``torch.distributed`` from what torchrun put in the environment.

    Args:
        backend: "gloo" or "nccl".
        seconds: Patience until all processes are there and connected.
    Raises:
        UserError: If they are not; names the rank, the meeting place and who is missing.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    require(not missing, f"WORLD_SIZE is set, {', '.join(missing)} not: start through torchrun")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"rank {rank} of {world_size} on {socket.gethostname()}"
    deadline = time.monotonic() + seconds
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else it listens itself
        _reach(place, who, seconds)
    patience = timedelta(seconds=seconds)
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=patience))
        store.set_timeout(patience)
        own = roll_call(store, rank, world_size, deadline - time.monotonic(), f"{who}, at {place}")
        torch_dist.init_process_group(
            backend, store=own, rank=rank, world_size=world_size, timeout=patience
        )
        store.set_timeout(timedelta(seconds=COLLECTIVE_SECONDS))  # NCCL connects later, through it
        _set_timeout(timedelta(seconds=COLLECTIVE_SECONDS))
    except RuntimeError as error:  # torch's DistError and its kinds, Gloo's own
        raise UserError(
            f"{who} could not form the group at {place}: {_first_line(error)}; all processes must "
            "reach each other: see the network in docs/scaling.md"
        ) from error


def roll_call(store: Store, rank: int, world_size: int, seconds: float, who: str) -> Store:
    """Wait until every rank is there now; what an earlier group left in the store does not count.

    The first process makes a new word and shows it. Each other process answers under that word with
    a word of its own; the first one writes down all answers, and a process that finds its own among
    them knows that it is meant. A word of an earlier group leads to a list without its own.

    Args:
        store: That all processes reach, used or not.
        rank: Of this process.
        world_size: Number of processes.
        seconds: Patience.
        who: This process and the place, for the message.
    Returns:
        A part of the store for this group alone.
    Raises:
        UserError: Naming the ranks that did not answer.
    """
    own, word = uuid.uuid4().hex, ""
    deadline = time.monotonic() + seconds
    if rank == 0:
        store.set(_CALL, own)
    while time.monotonic() < deadline:
        word = store.get(_CALL).decode() if store.check([_CALL]) else ""
        if rank == 0:
            if not _absent(store, own, world_size):
                answers = [store.get(_key(own, r)).decode() for r in range(1, world_size)]
                store.set(f"{own}/all", json.dumps([own, *answers]))
                return PrefixStore(own, store)
        elif word:
            store.set(_key(word, rank), own)
            if store.check([f"{word}/all"]) and own in json.loads(store.get(f"{word}/all")):
                return PrefixStore(word, store)
        time.sleep(_POLL_SECONDS)
    absent = _absent(store, own, world_size) if rank == 0 else [0]
    raise UserError(
        f"{who}: rank {', '.join(map(str, absent))} did not answer within {seconds:.0f} s; its log "
        "says whether it started"
    )


def _key(word: str, rank: int) -> str:
    return f"{word}/{rank}"


def _absent(store: Store, word: str, world_size: int) -> Sequence[int]:
    return [rank for rank in range(1, world_size) if not store.check([_key(word, rank)])]


def _reach(place: str, who: str, seconds: float) -> None:
    """Wait until something listens at the meeting place."""
    host, port = place.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, int(port)), timeout=max(1.0, min(left, 10.0))).close()
            return
        except OSError as error:
            if left <= 0:
                raise UserError(
                    f"{who} does not reach {place}, where the processes meet, within "
                    f"{seconds:.0f} s: {error.strerror or error}; see the network in "
                    "docs/scaling.md"
                ) from error
        time.sleep(min(1.0, max(left, 0.0)))


def _set_timeout(patience: timedelta) -> None:
    public = getattr(torch_dist, "set_timeout", None)  # newer than the oldest torch allowed here
    (public or torch_dist.distributed_c10d._set_pg_timeout)(patience)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
