"""Works off a list of cells: so many at once, up to a deadline, up to so many failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.grid.executors import Executor, Handle
from pipeline.grid.jobs import CommandJob, Step, read_result
from pipeline.grid.store import Row, Store

SAVE_SECONDS = 20.0  # before the end of a slice running cells are asked to save
_STOP_PATIENCE_SECONDS = 60.0  # after that they are asked for the last time
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """One cell with one seed, ready to be run.

    Attributes:
        steps: Commands.
        folder: Of the cell with this seed.
        read_metrics: What the finished cell measured; raises ValueError if it left no figures.
    """

    fingerprint: str
    seed: int
    label: str
    steps: tuple[Step, ...]
    folder: Path
    read_metrics: Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Limits:
    """When to stop; `deadline` on time.monotonic's clock."""

    parallel: int = 1
    max_failures: int = 0
    deadline: float = float("inf")


@dataclass
class Outcome:
    """How a call ended.

    Attributes:
        num_finished, num_failed, num_stopped: Cells of this call.
        reason: Why it ended early; empty if it did not.
    """

    num_finished: int = 0
    num_failed: int = 0
    num_stopped: int = 0
    reason: str = ""


@dataclass
class Scheduler:
    """Runs work and keeps the store.

    Attributes:
        store: The only writer's.
        executor: Where cells run.
        limits: When to stop.
        working_folder: Of the commands.
        code: Commit, noted with each attempt.
        on_change: Called with a row whenever a cell began or ended.
        stop_requested: Asked between polls: the reason to stop, or "".
    """

    store: Store
    executor: Executor
    limits: Limits
    working_folder: Path
    code: str | None = None
    on_change: Callable[[Row], None] = lambda row: None
    stop_requested: Callable[[], str] = lambda: ""
    _running: list[tuple[Work, Handle]] = field(default_factory=list)
    _outcome: Outcome = field(default_factory=Outcome)

    def run(self, todo: Sequence[Work]) -> Outcome:
        """Work off the list; running cells are asked to save when a limit is met."""
        waiting = list(todo)[::-1]
        stop_at = self.limits.deadline - SAVE_SECONDS
        while waiting or self._running:
            reason = self.stop_requested() or ("time is up" if time.monotonic() > stop_at else "")
            if reason:
                self._stop_all(reason)
                break
            if self._outcome.num_failed > self.limits.max_failures:
                waiting.clear()
                self._outcome.reason = f"more than {self.limits.max_failures} cells failed"
            while waiting and len(self._running) < self.limits.parallel:
                self._start(waiting.pop())
            self._collect()
            if self._running:
                time.sleep(_POLL_SECONDS)
        return self._outcome

    def _start(self, work: Work) -> None:
        self.store.start(work.fingerprint, work.seed, self.code)
        (work.folder / "job.json").unlink(missing_ok=True)
        handle = self.executor.submit(CommandJob(work.steps, work.folder, self.working_folder))
        self._running.append((work, handle))
        self.on_change(self.store.row(work.fingerprint, work.seed))

    def _collect(self) -> None:
        for work, handle in list(self._running):
            if handle.done():
                self._running.remove((work, handle))
                self._note(work)

    def _note(self, work: Work) -> None:
        result, metrics = read_result(work.folder), {}
        if result["status"] == "finished":
            try:
                metrics = work.read_metrics()
            except ValueError as error:
                result |= {"status": "failed", "error": str(error)}
        status = result["status"]
        self.store.finish(
            *(work.fingerprint, work.seed, status),
            metrics=metrics, seconds=float(result["seconds"]), error=result["error"],
        )  # fmt: skip
        name = f"num_{status}"
        setattr(self._outcome, name, getattr(self._outcome, name) + 1)
        self.on_change(self.store.row(work.fingerprint, work.seed))

    def _stop_all(self, reason: str) -> None:
        """Ask running cells to save and end; twice, since the second request is final."""
        self._outcome.reason = reason
        for _ in range(2):
            for _, handle in self._running:
                handle.stop()
            give_up = time.monotonic() + _STOP_PATIENCE_SECONDS
            while self._running and time.monotonic() < give_up:
                self._collect()
                time.sleep(_POLL_SECONDS)
        for work, _ in self._running:
            self.store.finish(work.fingerprint, work.seed, "stopped", error="did not end in time")
