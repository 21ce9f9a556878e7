"""Works off a list of runs, so many at once, up to a deadline and up to so many failures.

The store keeps one JSON file per run, written by this process alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import provenance
from common.errors import UserError, require
from common.files import write_text
from common.slurm import add_slurm_option
from pipeline.grid.jobs import (
    RESULT,
    CommandJob,
    Executor,
    Handle,
    Step,
    SubmititExecutor,
    read_result,
)
from pipeline.process import signals_noted, stop_reason

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "job_results"
"""Of the store, in the folder of a study."""
SAVE_SECONDS = 20.0  # before the end of a slice running jobs are asked to save
_STOP_PATIENCE_SECONDS = 60.0  # after that they are asked for the last time
_POLL_SECONDS = 0.2


Key = tuple[str, int]
"""Fingerprint and seed of a run."""


@dataclass(frozen=True)
class Row:
    """One cell with one seed, as stored.

    Attributes:
        axes: {table: {axis: level}}.
        settings: What the fingerprint hashes.
        status: planned, running, stopped, failed or finished.
        seconds: Of all attempts that ended by themselves or by a request to stop.
        code: Commit of the last attempt.
    """

    fingerprint: str
    seed: int
    label: str
    axes: dict[str, dict[str, str]]
    settings: dict[str, Any]
    status: str = "planned"
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 0
    error: str | None = None
    code: str | None = None

    @property
    def key(self) -> Key:
        """What the store finds it by."""
        return self.fingerprint, self.seed


class Store:
    """The rows by cell and seed; each change is written at once, by rename.

    Only the process that holds the lock of the study's folder may change rows.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is there. Rows that 'run' were killed with the program that started them.

        Raises:
            UserError: Naming a file that is no such row.
        """
        self._folder = folder
        self._rows: dict[Key, Row] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                row = Row(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(
                    f"{path}: is no result of a study ({error}); delete it, and its cell is looked "
                    "at again, or choose another --out"
                ) from None
            self._rows[row.key] = row
            if row.status == "running":
                error = "killed together with the program that started it"
                self.update(row.key, status="stopped", error=error)

    def plan(self, key: Key, label: str, axes: Mapping, settings: Mapping) -> Row:
        """Enter a cell, or add its names where it is there already; returns it."""
        known = self._rows.pop(key, None)  # rows stand in the order of planning
        if known is None:
            return self._put(Row(*key, label, dict(axes), dict(settings)))
        return self._put(replace(known, label=label, axes=known.axes | dict(axes)))

    def update(self, key: Key, **changes: Any) -> Row:
        """Set fields of a row; returns it."""
        return self._put(replace(self._rows[key], **changes))

    def row(self, key: Key) -> Row:
        """One cell with one seed."""
        return self._rows[key]

    def rows(self) -> list[Row]:
        """All of them, in the order in which they were planned last."""
        return list(self._rows.values())

    def _put(self, row: Row) -> Row:
        text = json.dumps(asdict(row), indent=1, sort_keys=True) + "\n"
        write_text(self._folder / f"{row.fingerprint}-{row.seed}.json", text)
        self._rows[row.key] = row
        return row


def count_statuses(rows: Sequence[Row], total: int) -> dict[str, int]:
    """{"cells": total, status: how many, ..}."""
    return {"cells": total, **Counter(row.status for row in rows)}


@dataclass(frozen=True)
class Work:
    """One cell with one seed, ready to be run.

    Attributes:
        steps: Commands.
        folder: Of the cell with this seed.
        read_metrics: What the finished run measured; raises ValueError if it left no figures.
    """

    key: Key
    steps: tuple[Step, ...]
    folder: Path
    read_metrics: Callable[[], Mapping[str, float]]


@dataclass
class Scheduler:
    """Runs work, keeps the store, and prints a line for each run that ended.

    Attributes:
        store: Nobody else writes to it.
        executor: Where jobs run.
        working_folder: Of the commands.
        parallel: Runs at once.
        max_failures: After more than these nothing more is started.
        deadline: On time.monotonic's clock.
        code: Commit, noted with each attempt.
        stop_requested: Asked between polls: the reason to stop, or "".
    """

    store: Store
    executor: Executor
    working_folder: Path
    parallel: int = 1
    max_failures: int = 0
    deadline: float = float("inf")
    code: str | None = None
    stop_requested: Callable[[], str] = lambda: ""
    _running: list[tuple[Work, Handle]] = field(default_factory=list)
    _num_failed: int = 0
    _num_ended: int = 0
    _total: int = 0
    _started: float = 0.0

    def run(self, todo: Sequence[Work]) -> str:
        """Work off the list; running jobs are asked to save when a limit is met.

        Returns:
            Why it ended early; empty if it did not.
        """
        waiting, ended_early = list(todo)[::-1], ""
        self._total, self._started = len(todo), time.monotonic()
        stop_at = self.deadline - SAVE_SECONDS
        while waiting or self._running:
            reason = self.stop_requested() or ("time is up" if time.monotonic() > stop_at else "")
            if reason:
                self._stop_all()
                return reason
            if self._num_failed > self.max_failures:
                waiting.clear()
                ended_early = f"more than {self.max_failures} runs failed"
            while waiting and len(self._running) < self.parallel:
                self._start(waiting.pop())
            self._collect()
            if self._running:
                time.sleep(_POLL_SECONDS)
        return ended_early

    def _start(self, work: Work) -> None:
        attempts = self.store.row(work.key).attempts + 1
        self.store.update(work.key, status="running", attempts=attempts, code=self.code)
        (work.folder / RESULT).unlink(missing_ok=True)
        job = CommandJob(work.steps, work.folder, self.working_folder)
        self._running.append((work, self.executor.submit(job)))

    def _collect(self) -> None:
        """Note what the jobs that ended have left."""
        for work, handle in list(self._running):
            if not handle.done():
                continue
            self._running.remove((work, handle))
            result, metrics = read_result(work.folder), {}
            if result["status"] == "finished":
                try:
                    metrics = work.read_metrics()
                except ValueError as error:
                    result |= {"status": "failed", "error": str(error)}
            seconds = self.store.row(work.key).seconds + float(result["seconds"])
            row = self.store.update(
                work.key, status=result["status"], metrics=dict(metrics), seconds=seconds,
                error=result["error"],
            )  # fmt: skip
            self._num_failed += row.status == "failed"
            self._num_ended += 1
            figures = ", ".join(f"{k} {v:.2f}" for k, v in row.metrics.items() if ":" not in k)
            rest = (time.monotonic() - self._started) * (self._total / self._num_ended - 1)
            print(
                f"[{self._num_ended}/{self._total}] {row.label}, seed {row.seed}: {row.status} "
                f"({row.seconds:.0f} s) {figures or row.error or ''}; about {rest / 60:.0f} min "
                "left",
                flush=True,
            )

    def _stop_all(self) -> None:
        """Ask running jobs to save and end; twice, since the second request is final."""
        for _ in range(2):
            for _, handle in self._running:
                handle.stop()
            give_up = time.monotonic() + _STOP_PATIENCE_SECONDS
            while self._running and time.monotonic() < give_up:
                self._collect()
                time.sleep(_POLL_SECONDS)
        for work, _ in self._running:
            error = "did not end in time"
            self.store.update(work.key, status="stopped", metrics={}, error=error)


# -- what tools/ablate.py and tools/run_trials.py share -------------------------------------------


def add_run_options(main_parser: argparse.ArgumentParser) -> None:
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


def check_run_options(options: argparse.Namespace) -> None:
    """Refuse numbers that cannot be.

    Raises:
        UserError: Naming the option.
    """
    least = {"seeds": 1, "parallel": 1, "cpus_per_run": 1, "time_minutes": 1}
    for name, smallest in (least | {"gpus_per_run": 0, "max_failures": 0}).items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {smallest} or more")
    minutes = options.max_minutes
    require(
        minutes is None or 60 * minutes > SAVE_SECONDS,
        f"--max-minutes {minutes or 0:g}: the last {SAVE_SECONDS:g} s are for saving; give more",
    )


@dataclass(frozen=True)
class Outcome:
    """Why a call ended early, or nothing, and the signal that ended it, if one did."""

    reason: str = ""
    signal: int | None = None


def run_work(
    todo: Sequence[Work],
    store: Store,
    options: argparse.Namespace,
    executor: Executor | None,
    started: float,
    *,
    parallel: int = 1,
    gpus: int = 0,
    max_minutes: float | None = None,
) -> Outcome:
    """Hand the work to submitit, up to the limits.

    Args:
        todo: Runs, in the order in which they start.
        store: Its folder's lock is held by the caller.
        options: Of the command line: those of add_run_options, and out.
        executor: Instead of submitit; for tests.
        started: time.monotonic() when the call began.
        parallel: Runs at once, where the command line says nothing.
        gpus: Of each run, where the command line says nothing.
        max_minutes: Length of the call, where the command line says nothing; None: to the end.
    """
    if not todo:
        return Outcome()
    gpus = gpus if options.gpus_per_run is None else options.gpus_per_run
    minutes = options.max_minutes or max_minutes
    parallel = options.parallel or parallel
    executor = executor or SubmititExecutor(
        *(options.out / "submitit/%j", ROOT), cluster=options.cluster, gpus=gpus,
        cpus=options.cpus_per_run, minutes=options.time_minutes, partition=options.partition,
        slurm_options=dict(options.slurm_option),
    )  # fmt: skip
    print(f"{len(todo)} runs to do, {parallel} at once", flush=True)
    with signals_noted() as signals:
        scheduler = Scheduler(
            *(store, executor, ROOT, parallel, options.max_failures),
            deadline=started + 60 * minutes if minutes else float("inf"),
            code=provenance.commit(ROOT), stop_requested=lambda: stop_reason(signals),
        )  # fmt: skip
        return Outcome(scheduler.run(todo), signals[0] if signals else None)


def exit_status(outcome: Outcome, counts: Mapping[str, int]) -> int:
    """Say how the call ended; returns the exit status."""
    failed = counts.get("failed", 0)
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "cells")
    print(
        f"{counts['cells']} runs: {shown or 'none'}" + f"; {outcome.reason}" * bool(outcome.reason)
    )
    if outcome.signal:
        return 128 + outcome.signal
    if failed:
        print(f"error: {failed} runs failed; see the tables, --retry-failed", file=sys.stderr)
        return 1
    return 3 if outcome.reason else 0
