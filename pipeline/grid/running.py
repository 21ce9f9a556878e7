"""What tools/ablate.py and tools/run_trials.py share: options, signals, progress, exit status."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from common import provenance
from common.errors import UserError
from common.slurm import add_slurm_option
from pipeline.grid.executors import Executor, Resources, SubmititExecutor
from pipeline.grid.schedule import SAVE_SECONDS, Limits, Outcome, Scheduler, Work
from pipeline.grid.store import Row, Store

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
