"""Candidates take turns, round by round; rivals do so in processes of their own.

What is counted is processor time of a whole process, all its threads together, so that other work
on the machine disturbs the figures little and nobody gains by a thread of his own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

SERVE = Path(__file__).resolve().parent / "peers" / "serve.py"
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Lap:
    """What one turn of a candidate cost and gave."""

    seconds: float  # processor time
    num_pictures: int

    @property
    def rate(self) -> float:
        """Source pictures per second of processor time."""
        return self.num_pictures / self.seconds


Candidate = Callable[[], Lap]


def in_process(
    work: Callable[[], object], num_pictures: int, min_seconds: float = 0.0
) -> Candidate:
    """A candidate that works in this process.

    Args:
        work: Takes all pictures once.
        num_pictures: How many those are.
        min_seconds: Processor time of a turn; the work is repeated until it is reached.
    """

    def turn() -> Lap:
        start, repeats, seconds = time.process_time(), 0, 0.0
        while not repeats or seconds < min_seconds:
            work()
            repeats += 1
            seconds = time.process_time() - start
        return Lap(seconds, repeats * num_pictures)

    return turn


def rates(candidates: Mapping[str, Candidate], num_rounds: int) -> dict[str, list[float]]:
    """Pictures per second of each candidate in each round, after a round that warms up."""
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(num_rounds + 1):
        for name, turn in candidates.items():
            lap = turn()
            if number:
                measured[name].append(lap.rate)
    return measured


class Peer:
    """A process that runs rivals' recipes when it is asked to; `greet` it first.

    Args:
        python: The interpreter; its environment has the rival's library.
        library: Name of a module in benchmarks/peers, without "_recipes".
        folder: Folder of JPEG files.
    Attributes:
        missing: Why the library cannot be used; None if it can.
        version: Of the library.
        recipes: Names of what it can run.
    """

    def __init__(self, python: str, library: str, folder: Path) -> None:
        self._library = library
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "CUDA_VISIBLE_DEVICES": ""}
        try:
            self._process = subprocess.Popen(
                [python, str(SERVE), library, str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env=environment,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise UserError(
                f"--peers {python}: cannot be started ({error.strerror}); it must be the "
                "interpreter of the environment that benchmarks/peers/make_env.sh makes"
            ) from error
        self.missing: str | None = None
        self.version, self.recipes = "", []

    def greet(self) -> None:
        """Wait until the library is there, or is known to be missing."""
        hello = self._read()
        self.missing = hello.get("missing")
        self.version, self.recipes = hello.get("version", ""), hello.get("recipes", [])

    def candidate(self, recipe: str, size: int) -> Candidate:
        """One recipe at one size of the views."""

        def turn() -> Lap:
            return Lap(**self._ask({"recipe": recipe, "size": size}))

        return turn

    def _ask(self, question: dict) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().strip().splitlines()[-5:]
        self.close()
        raise UserError(
            f"the process of {self._library} ended with status {status}: " + " | ".join(tail)
        )

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        self._process.wait()  # it ends at the end of its input
        self._errors.close()


def start_peers(python: str | None, folder: Path) -> dict[str, Peer]:
    """Rivals by library: torchvision from this environment, the others from that of `python`."""
    peers: dict[str, Peer] = {}
    try:
        peers["torchvision"] = Peer(sys.executable, "torchvision", folder)
        for library in ("lightly", "dali", "ffcv") if python is not None else ():
            peers[library] = Peer(python, library, folder)  # type: ignore[arg-type]
        for peer in peers.values():
            peer.greet()
    except BaseException:
        for peer in peers.values():
            peer.close()
        raise
    return peers
