"""Processes of a group, for tests: forked from a server that has loaded torch and the trainer."""

import atexit
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
# DistributedDataParallel needs torch._dynamo: 2 s in each process.
_SERVER.set_forkserver_preload(["pretrain.__main__", "pretrain.run", "torch._dynamo"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(function: Callable, words: Sequence, variables: dict[str, str], log: str) -> None:
    """What a process does: nothing of it is seen but the exit status and the log."""
    multiprocessing.set_start_method(None, force=True)  # its loaders start workers as ever
    os.environ |= variables
    file = os.open(log, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    try:
        status = function(*words)
    finally:
        atexit._run_exitfuncs()  # loaders end their workers there; multiprocessing leaves it out
    sys.exit(status)


class Rank:
    """A process that calls a module's function as torchrun's rank of so many.

    Its exit status is what the function returns (None: 0), or 1 after an exception.
    """

    def __init__(self, function: Callable, words: Sequence, rank=0, world_size=1, port=0) -> None:
        self._log = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        variables = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        }  # fmt: skip
        arguments = (function, words, variables, self._log.name)
        self._process = _SERVER.Process(target=_work, args=arguments)
        self._process.start()

    def end(self, deadline: float) -> tuple[Any, str]:
        """Exit status and what was printed; one that is late is killed."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        with self._log:
            return self._process.exitcode, self._log.read()


def ends_of(ranks: Sequence[Rank], seconds: float = 300) -> list[tuple[Any, str]]:
    """Exit status and what was printed, by rank, once all have ended or were late."""
    deadline = time.monotonic() + seconds
    return [rank.end(deadline) for rank in ranks]


def run_group(function: Callable, words: Sequence, num=2, seconds=300) -> list[tuple[Any, str]]:
    """The function in so many Gloo processes."""
    port = free_port()
    return ends_of([Rank(function, words, rank, num, port) for rank in range(num)], seconds)


def assert_well(ends: Sequence[tuple[Any, str]]) -> None:
    for status, printed in ends:
        assert status == 0, printed
