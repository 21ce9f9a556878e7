"""A thread that says where a run hangs, and which process the others wait for."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as torch_dist

from pretrain.config import EngineConfig
from pretrain.engine import dist

STDERR = 2
GRACE_SECONDS = 5.0  # between the report and the end, so that every process can make its report
_STORE_SECONDS = 5.0  # patience with the processes' common store
_COLLECTIVES = os.path.join("torch", "distributed")
_Beat = tuple[int, int, str, float, float]


class Progress:
    """Where the loop stands; written by it, read by the watchdog.

    One assignment of one tuple, so that no lock is needed: (finished steps, phases since then, name
    of the phase, when it began, when the last step was finished), on the monotonic clock.
    """

    def __init__(self) -> None:
        now = time.monotonic()
        self.beat: _Beat = (0, 0, "start", now, now)

    def enter(self, phase: str) -> None:
        """The loop begins something else."""
        step, number, _, _, finished = self.beat
        self.beat = (step, number + 1, phase, time.monotonic(), finished)

    def finished(self, step: int) -> None:
        """So many steps are finished."""
        now = time.monotonic()
        self.beat = (step, 0, "bookkeeping", now, now)


@dataclass(frozen=True)
class Standing:
    """Where one process stands, as the others hear of it.

    Attributes:
        step: Finished steps.
        number: Phases since then.
        is_waiting: Whether it stands in a collective operation.
        phase: Name of the phase.
    """

    step: int
    number: int
    is_waiting: bool
    phase: str

    @property
    def order(self) -> tuple[int, int, bool]:
        """Who is behind comes first; at the same place, who does not wait."""
        return self.step, self.number, self.is_waiting


class Watchdog:
    """Reports when no step was finished for ``engine.watchdog_seconds``, once until one is.

    The report goes to ``watchdog-rank-R.txt`` in the run's folder and to stderr: the phase, who the
    process waits for (the processes tell each other where they stand, through torch.distributed's
    store), and the Python stacks of all threads. With ``engine.on_hang=stop`` the process then
    ends with status 1, so that torchrun starts the job again.

    Should the interpreter itself stand still (an extension that holds its lock), faulthandler's own
    timer writes the stacks to stderr a little later.

    Args:
        config: ``watchdog_seconds`` (0: off) and ``on_hang``.
        folder: The run's folder.
        progress: Where the loop stands.
    """

    def __init__(self, config: EngineConfig, folder: Path, progress: Progress) -> None:
        self._seconds, self._stops = config.watchdog_seconds, config.on_hang == "stop"
        self._interval = min(max(self._seconds / 8, 0.05), 10.0)
        self._progress, self._path = progress, folder / f"watchdog-rank-{dist.rank()}.txt"
        self._main = threading.get_ident()
        self._reported = -1.0  # when the step was finished after which a hang was reported
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._thread is not None:
            self._ended.set()
            self._thread.join(2 * _STORE_SECONDS)
            faulthandler.cancel_dump_traceback_later()

    def start(self) -> None:
        """Begin to watch; a second call does nothing.

        To be called after the loader's workers are started: forking beside a thread is a risk.
        """
        if self._thread is not None or self._seconds == 0:
            return
        if dist.is_on():
            self._store = _own_store()
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _arm(self) -> None:
        """Set faulthandler's timer anew: it goes off only if no Python thread can do so."""
        limit = self._seconds + 2 * self._interval + GRACE_SECONDS
        faulthandler.dump_traceback_later(limit, file=STDERR, exit=self._stops)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._arm()
            self._publish()
            beat = self._progress.beat
            finished = beat[4]
            if time.monotonic() - finished >= self._seconds and finished != self._reported:
                self._reported = finished
                self._report(beat)

    def _report(self, beat: _Beat) -> None:
        step, _, phase, began, finished = beat
        now = time.monotonic()
        line = (
            f"watchdog: rank {dist.rank()} has been in {phase} for {now - began:.1f} s since step "
            f"{step}; no step was finished for {now - finished:.1f} s"
        )
        others = self._others()
        lines = [line, *([explain(dist.rank(), others)] if others else [])]
        if self._stops:
            lines.append("watchdog: this process ends now (engine.on_hang=stop)")
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        text = self._path.read_text(encoding="utf-8")
        print(text[text.rindex(line) :], file=sys.stderr, flush=True)
        is_over = self._ended.wait(min(GRACE_SECONDS, self._seconds)) if self._stops else True
        if not is_over and self._progress.beat[4] == finished:
            os._exit(1)  # the main thread does not listen

    def _publish(self) -> None:
        if self._store is None:
            return
        step, number, phase, _, _ = self._progress.beat
        row = [step, number, self._is_waiting(phase), phase]
        with contextlib.suppress(RuntimeError):  # the other processes are gone: nobody to tell
            self._store.set(_key(dist.rank()), json.dumps(row))

    def _is_waiting(self, phase: str) -> bool:
        """In a collective as far as Python shows it; DDP's reduction is a part of the backward."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if _COLLECTIVES in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return phase == "backward"

    def _others(self) -> dict[int, Standing | None]:
        """Where every process stands; None for one that has told nothing yet."""
        standings: dict[int, Standing | None] = {}
        if self._store is None:
            return standings
        for rank in range(dist.world_size()):
            with contextlib.suppress(RuntimeError):
                found = self._store.check([_key(rank)])
                row = json.loads(self._store.get(_key(rank))) if found else None
                standings[rank] = None if row is None else Standing(*row)
        return standings


def explain(rank: int, standings: Mapping[int, Standing | None]) -> str:
    """Who is behind, seen from one process.

    Args:
        rank: Who speaks.
        standings: Of the processes by rank; None for one that has told nothing yet.
    """
    silent = sorted(r for r, standing in standings.items() if standing is None)
    if silent:
        named = ", ".join(map(str, silent))
        return f"watchdog: rank {rank} waits for rank {named}, heard nothing from there yet"
    known = {r: standing for r, standing in standings.items() if standing is not None}
    least = min(standing.order for standing in known.values())
    behind = sorted(r for r, standing in known.items() if standing.order == least)
    if len(behind) == len(known):
        return "watchdog: all ranks stand at the same place; the stacks say more"
    named = ", ".join(f"rank {r} (in {known[r].phase} since step {known[r].step})" for r in behind)
    if rank in behind:
        return f"watchdog: the others wait in a collective for {named}"
    return f"watchdog: rank {rank} waits in a collective for {named}"


def _key(rank: int) -> str:
    return f"fa-watchdog/{rank}"


def _own_store() -> Any:
    """A connection to the group's store for this thread alone: the loop may wait in the other."""
    store = torch_dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=_STORE_SECONDS))
    return store
