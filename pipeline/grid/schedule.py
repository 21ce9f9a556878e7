"""Works off a list of cells: so many at once, up to a deadline, up to so many failures."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from common import provenance
from common.errors import UserError
from common.slurm import add_slurm_option
from pipeline.grid.jobs import (
    CommandJob,
    Executor,
    Handle,
    Resources,
    Step,
    SubmititExecutor,
    read_result,
)
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


ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Defaults:
    """What a preset says about running."""

    parallel: int = 1
    gpus: int = 0
    max_minutes: float | None = None


def add_cluster(main_parser: argparse.ArgumentParser) -> None:
    """The options that say how long and where runs go."""
    add = main_parser.add_argument
    add("--max-minutes", type=float, metavar="N",
        help=f"stop in time: {SAVE_SECONDS:g} s before, runs save (default: the preset's, or "
        "none)")  # fmt: skip
    add("--max-failures", type=int, default=3, metavar="N",
        help="start nothing more after more than N failed runs (default: 3)")  # fmt: skip
    add("--retry-failed", action="store_true", help="run failed ones again")
    group = main_parser.add_argument_group("where runs go, through submitit")
    add = group.add_argument
    add("--cluster", choices=("local", "slurm"), default="local", help="default: local")
    add("--parallel", type=int, metavar="N", help="runs at once (default: the preset's, or 1)")
    add("--gpus-per-run", type=int, metavar="N", help="default: the preset's, or 0")
    add("--cpus-per-run", type=int, default=1, metavar="N",
        help="threads of a run, and processors where it is queued (default: 1)")  # fmt: skip
    add("--time-minutes", type=int, default=240, metavar="T",
        help="SLURM: time limit; then the run is queued again (default: 240)")  # fmt: skip
    add("--partition", metavar="P", help="SLURM partition")
    add_slurm_option(group)


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers that cannot be.

    Raises:
        UserError: Naming the option.
    """
    for name in ("seeds", "parallel", "cpus_per_run", "time_minutes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    for name in ("gpus_per_run", "max_failures"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 0 or more")
    if options.max_minutes is not None and 60 * options.max_minutes <= SAVE_SECONDS:
        raise UserError(
            f"--max-minutes {options.max_minutes:g}: the last {SAVE_SECONDS:g} s are for saving; "
            "give more"
        )


def run_work(
    todo: Sequence[Work],
    store: Store,
    options: argparse.Namespace,
    defaults: Defaults,
    executor: Executor | None,
    started: float,
    signals: StopSignals,
) -> Outcome:
    """Hand the work to the executor, up to the limits.

    Args:
        todo: Runs, in the order in which they start.
        store: Held open by the caller.
        options: Of the command line; add_cluster's, and out, max_minutes, max_failures.
        defaults: Where the command line says nothing.
        executor: Instead of submitit; for tests.
        started: time.monotonic() when the call began.
        signals: Asked whether to stop.
    """
    gpus = options.gpus_per_run
    resources = Resources(
        options.cluster,
        defaults.gpus if gpus is None else gpus,
        options.cpus_per_run,
        options.time_minutes,
        options.partition,
        dict(options.slurm_option),
    )
    minutes = options.max_minutes or defaults.max_minutes
    limits = Limits(
        options.parallel or defaults.parallel,
        options.max_failures,
        started + 60 * minutes if minutes else float("inf"),
    )
    if todo and executor is None:
        executor = SubmititExecutor(options.out / "submitit/%j", resources, ROOT)
    if not todo or executor is None:
        return Outcome()
    print(f"{len(todo)} runs to do, {limits.parallel} at once", flush=True)
    log = ProgressLog(len(todo), limits.parallel)
    scheduler = Scheduler(
        *(store, executor, limits, ROOT, provenance.commit(ROOT)),
        on_change=log, stop_requested=signals.reason,
    )  # fmt: skip
    return scheduler.run(todo)


class ProgressLog:
    """A line for each run that ended, with what is left."""

    def __init__(self, total: int, parallel: int) -> None:
        self._total, self._parallel = total, parallel
        self._ended, self._started = 0, time.monotonic()

    def __call__(self, row: Row) -> None:
        """Print it; nothing for a run that begins."""
        if row.status == "running":
            return
        self._ended += 1
        figures = ", ".join(
            f"{name} {value:.2f}" for name, value in row.metrics.items() if ":" not in name
        )
        rest = (time.monotonic() - self._started) / self._ended * (self._total - self._ended)
        print(
            f"[{self._ended}/{self._total}] {row.label}, seed {row.seed}: {row.status} "
            f"({row.seconds:.0f} s) {figures or row.error or ''}; about {rest / 60:.0f} min left",
            flush=True,
        )


class StopSignals:
    """Notes SIGINT and SIGTERM while runs go on."""

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def reason(self) -> str:
        """Why to stop, or nothing."""
        return f"stopped by {signal.Signals(self.number).name}" if self.number else ""


def exit_status(outcome: Outcome, counts: dict[str, int], signals: StopSignals) -> int:
    """Say how the call ended; returns the exit status."""
    failed = counts.get("failed", 0)
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "cells")
    print(
        f"{counts['cells']} runs: {shown or 'none'}" + f"; {outcome.reason}" * bool(outcome.reason)
    )
    if signals.number:
        return 128 + signals.number
    if failed:
        print(f"error: {failed} runs failed; see the tables, --retry-failed", file=sys.stderr)
        return 1
    return 3 if outcome.reason else 0
