"""Runs stages in order: skips what is unchanged, continues what was interrupted, says why.

One loop starts stages while slots are free, looks at those that run, and records how they ended.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, Literal, TextIO

from common import provenance
from common.errors import RunFailed, StoppedBySignal, UserError, duration
from common.files import LOCK, check_out_folder, held, inside, is_whole, remove
from pipeline.jobs import ClusterJob, CommandJob, Finished, LocalJob, SlurmSettings, last_line
from pipeline.plan import (
    Stage,
    StageStore,
    digest,
    explain,
    input_digest,
    now,
    without_places,
)

SAVE_SECONDS = 20.0  # before the end of a call that is limited, stages are asked to save
GRACE_SECONDS = 30.0
"""Time between passing a signal on and ending a stage for good."""
LOCK_WAIT_SECONDS = 10.0  # a loader's workers look for their killed parent every 5 s
_AUTO_AT_MOST = 4
_POLL_SECONDS = 0.1
_SHOWN_EVERY_SECONDS = {True: 0.2, False: 30.0}  # on a terminal, and elsewhere
_LOG_LINES_SHOWN = 15


class TimeIsUp(RuntimeError):
    """The time of a limited call is over; the same command goes on (exit status 3)."""


@dataclass(frozen=True)
class Limits:
    """How one call runs the stages.

    Attributes:
        parallel: How many stages run side by side.
        threads: CPU threads of each of those, unless OMP_NUM_THREADS says it; None: all cores.
        max_failures: After more than these nothing more begins.
        rerun: Stages, or groups of them, that run again though nothing has changed.
        minutes: Length of the call; None: to the end.
        cluster: Where stages that can resume are queued; None: all are children of this process.
    """

    parallel: int = 1
    threads: int | None = None
    max_failures: int = 0
    rerun: tuple[str, ...] = ()
    minutes: float | None = None
    cluster: SlurmSettings | None = None


@dataclass(frozen=True)
class Decision:
    """What is done with a stage, and why."""

    action: Literal["skip", "run", "resume", "maybe"]
    reason: str
    parts: dict[str, Any] = field(default_factory=dict)


@dataclass
class _RunningStage:
    stage: Stage
    job: LocalJob | ClusterJob
    before: float  # seconds of earlier attempts
    started: float
    stopped_by: int | None = None
    kill_at: float = float("inf")


@dataclass
class _Work:
    """What a call has still to do, and what came of the rest.

    Attributes:
        waiting: Stages that have not begun, by their number.
        running: Those that run, by name.
        failures: Messages by stage.
        blocked: Stages that read a failed one.
        stopping: Why nothing more begins, or empty.
        num_signals: How many have been passed on.
    """

    waiting: dict[int, Stage]
    running: dict[str, _RunningStage] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    blocked: set[str] = field(default_factory=set)
    stopping: str = ""
    num_signals: int = 0


def is_named(stage: str, name: str) -> bool:
    """Whether a stage is meant by a name; `random` means all of `random/...`."""
    return stage == name or stage.startswith(f"{name}/")


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of ending the process; yields their numbers as they come."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Progress:
    """Lines that stay, and what runs now: below them on a terminal, else a line now and then."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        """Show `total` stages on `stream` (standard output)."""
        self.total, self._stream = total, stream or sys.stdout
        self._is_live = self._stream.isatty()
        self._shown_at = time.monotonic()

    def say(self, text: str) -> None:
        """Write a line that stays."""
        print("\r\x1b[K" * self._is_live + text, file=self._stream, flush=True)

    def show(self, running: Sequence[str]) -> None:
        """Show a text for each stage that runs, side by side."""
        now = time.monotonic()
        if running and now - self._shown_at >= _SHOWN_EVERY_SECONDS[self._is_live]:
            self._shown_at = now
            if self._is_live:
                share = (shutil.get_terminal_size().columns - 1) // len(running)
                line = "".join(text[: share - 1].ljust(share) for text in running)
                print("\r\x1b[K" + line, end="", file=self._stream, flush=True)
            else:
                self.say(" | ".join(running))


class Runner:
    """Runs a list of stages in one folder.

    Attributes:
        root: The repository; the stages' working folder.
        out: The run's folder.
        go_on_command: What a person types to continue, for messages.
        limits: How this call runs them.
        store: The records of the stages that ran.
    """

    def __init__(
        self, root: Path, out: Path, go_on_command: Sequence[str], limits: Limits | None = None
    ) -> None:
        """Read the records in `out` if there are some; nothing is written yet."""
        self.root, self.out = root, out
        self.go_on_command = shlex.join(go_on_command)
        self.limits = limits or Limits()
        self.store = StageStore(out)
        self._again: set[str] = set()  # stages of --rerun

    def plan(self, stages: Sequence[Stage]) -> dict[str, Decision]:
        """Foretell what a run would do; `maybe` is decided by what an earlier stage will make.

        Raises:
            UserError: If a stage would have to remove something that no stage has made.
        """
        input_digest.cache_clear()
        self._again = {s.name for s in stages for n in self.limits.rerun if is_named(s.name, n)}
        decisions: dict[str, Decision] = {}
        for stage in stages:
            open_ones = [name for name in stage.upstream if decisions[name].action != "skip"]
            if stage.name in self.store.stages and open_ones and stage.name not in self._again:
                reason = f"only if {open_ones[0]} makes something else than before"
                decisions[stage.name] = Decision("maybe", reason)
            else:
                decisions[stage.name] = self._decide(stage)
        return decisions

    def expected_seconds(self, stage: Stage) -> float | None:
        """How long a stage will take: what it took, or what others of its kind took here."""
        ran = [record for record in self.store.stages.values()
               if record["status"] == "finished" and record.get("kind") == stage.kind]  # fmt: skip
        own = [r for r in ran if r is self.store.stages.get(stage.name)]
        return median(record["seconds"] for record in own or ran) if ran else None

    def run(
        self,
        stages: Sequence[Stage],
        progress: Progress,
        *,
        chosen: Collection[str] | None = None,
        before_first: Callable[[dict[str, Decision]], None] = lambda decisions: None,
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        """Run what has to run, in order.

        Args:
            stages: The stages, every one after those that it reads.
            progress: What a person sees.
            chosen: Names of the stages that this call runs; None: all.
            before_first: Called once with the plan, when the folder is locked.
            after_each: Called after every stage that ran, also after a failure, and at the end.
        Raises:
            RunFailed: If more than `max_failures` fail, no further one begins; those beside it are
                let finish. If fewer fail, after all.
            StoppedBySignal: After SIGINT or SIGTERM.
            TimeIsUp: Shortly before `minutes` are over.
        """
        limits, start = self.limits, time.monotonic()
        stop_at = start + 60 * limits.minutes - SAVE_SECONDS if limits.minutes else float("inf")
        self.out.mkdir(parents=True, exist_ok=True)
        check_out_folder(self.out)
        # Stages inherit the lock: the folder stays locked while one of a killed run goes on.
        lock = held(self.out / LOCK, patience=LOCK_WAIT_SECONDS, of_process=False)
        with lock as descriptor, signals_noted() as signals:
            self.store.load()  # Another run may have written before the lock was ours.
            for name in sorted(self.store.damaged):
                progress.say(f"warning: the record of {name} in {self.out} is damaged")
            decisions = self.plan(stages)
            before_first(decisions)
            # Which records speak of the present settings. What is skipped is known only when its
            # turn comes.
            for name in self.store.stages:
                is_current = name in decisions and decisions[name].action == "skip"
                self.store.update(name, current=is_current, skipped=False)
            submitter = None
            if limits.cluster is not None:
                submitter = limits.cluster.submitter(self.out / "submitit/%j")

            todo = [stage for stage in stages if chosen is None or stage.name in chosen]
            work = _Work(waiting=dict(enumerate(todo, 1)))
            while work.waiting or work.running:
                self._stop(work, signals, stop_at)
                if work.stopping or len(work.failures) > limits.max_failures:
                    work.waiting.clear()
                self._start_ready(work, descriptor, submitter, progress)
                self._look(work, progress, after_each)
                if work.running:
                    time.sleep(_POLL_SECONDS)
            after_each()

        if signals:
            text = f"{work.stopping}\n  to go on: {self.go_on_command}"
            raise StoppedBySignal(signals[0], text)
        if work.failures:
            raise RunFailed("\nerror: ".join(sorted(work.failures.values())))
        if work.stopping:
            raise TimeIsUp(work.stopping)

    def _stop(self, work: _Work, signals: Sequence[int], stop_at: float) -> None:
        """After a signal, or at the end of the time: stages that run save and end."""
        is_over = not work.stopping and time.monotonic() > stop_at
        new = signals[work.num_signals :]
        work.num_signals += len(new)
        for number in new or [signal.SIGTERM] * is_over:
            work.stopping = work.stopping or (
                f"stopped by {signal.Signals(number).name}" if signals else "time is up"
            )
            for one in work.running.values():
                one.job.stop(signal.SIGKILL if one.stopped_by else number)
                one.stopped_by = number
                one.kill_at = min(one.kill_at, time.monotonic() + GRACE_SECONDS)

    def _start_ready(
        self, work: _Work, descriptor: int, submitter: Any, progress: Progress
    ) -> None:
        """Start, in order, what has all that it reads while slots are free."""
        for number, stage in list(work.waiting.items()):
            if (work.failures.keys() | work.blocked) & set(stage.upstream):
                work.blocked.add(stage.name)
                del work.waiting[number]
                continue
            unfinished = {s.name for s in work.waiting.values()} | work.running.keys()
            if unfinished & set(stage.upstream):
                continue
            queue = submitter if stage.resumable else None
            kind = ClusterJob if queue else LocalJob
            beside = [one for one in work.running.values() if isinstance(one.job, kind)]
            # Jobs of a cluster have cores of their own; here the groups take turns.
            groups = {one.stage.group for one in beside}
            is_alone = not queue and (not stage.group or groups != {stage.group})
            if beside and (is_alone or len(beside) >= self.limits.parallel):
                break
            del work.waiting[number]
            decision = self._decide(stage)
            if decision.action == "skip":
                self.store.update(stage.name, current=True, skipped=True)
                took = duration(self.store.stages[stage.name]["seconds"])
                text = f"unchanged ({took} when it ran)"
            else:
                text = decision.reason
                work.running[stage.name] = self._start(stage, decision, descriptor, queue)
            progress.say(f"[{number}/{progress.total}] {stage.title}: {text}")

    def _look(self, work: _Work, progress: Progress, after_each: Callable[[], None]) -> None:
        """Look at the stages that run: show them, record those that have ended, kill the late."""
        shown = []
        for name, one in list(work.running.items()):
            ended = one.job.poll()
            now_is, seconds = time.monotonic(), one.before + time.monotonic() - one.started
            if ended is None:
                if now_is > one.kill_at:
                    one.kill_at = float("inf")
                    one.job.stop(signal.SIGKILL)
                line = last_line(self.log_path(one.stage))
                shown.append(f"{one.stage.title} {duration(seconds)} {line}")
                continue
            del work.running[name]
            status, failure = self._record(one, ended)
            if failure:
                work.failures[name] = failure
            took = duration(self.store.stages[name]["seconds"])
            text = f"{status} {'in' if status == 'finished' else 'after'} {took}"
            progress.say(f"{one.stage.title}: {text}")
            after_each()
        progress.show(shown)

    def log_path(self, stage: Stage) -> Path:
        """Return where the stage's output goes."""
        return self.out / "logs" / f"{stage.name}.log"

    def _decide(self, stage: Stage) -> Decision:
        made = {name: self.store.stages.get(name, {}).get("product") for name in stage.upstream}
        parts = stage.key_parts(self.root, self.out, made)
        record = self.store.stages.get(stage.name)
        missing = [name for name in stage.outputs if not inside(self.out, name).exists()]
        damaged = [name for name in stage.outputs if not is_whole(inside(self.out, name))]
        if stage.name in self.store.damaged:
            return Decision("run", f"stages/{stage.name}.json is damaged", parts)
        if record is None:
            for name in stage.owns:
                path = inside(self.out, name)
                if path.exists() or path.is_symlink():
                    raise UserError(
                        f"{path} exists already but was not made by this pipeline "
                        f"(stage {stage.name}); move it away or choose another --out"
                    )
            return Decision("run", "first run", parts)
        before = record.get("parts") or {}
        if record.get("key") != digest(parts) and without_places(before) != without_places(parts):
            return Decision("run", explain(before, parts), parts)
        if stage.name in self._again:
            return Decision("run", "asked for", parts)
        if record["status"] == "finished":
            if missing:
                return Decision("run", f"{missing[0]} is missing", parts)
            if damaged:  # a program that trains goes on from its checkpoint
                is_trained = stage.resumable and stage.kind != "shards"
                action = "resume" if is_trained else "run"
                return Decision(action, f"{damaged[0]} is damaged", parts)
            return Decision("skip", "unchanged", parts)
        if stage.resumable:
            return Decision("resume", "continues where it stopped", parts)
        return Decision("run", "did not finish last time", parts)

    def _start(
        self, stage: Stage, decision: Decision, descriptor: int, queue: Any
    ) -> _RunningStage:
        resumed = decision.action == "resume"
        record = self.store.stages.get(stage.name, {})
        before = (record.get("seconds") or 0.0) if resumed else 0.0
        path = self.log_path(stage)
        if resumed and record["status"] == "running" and path.exists():
            # An attempt that was killed with its runner lasted until its last line, at least.
            started = datetime.datetime.fromisoformat(record["started"]).timestamp()
            before += max(0.0, path.stat().st_mtime - started)
        if not resumed:
            for name in stage.owns:
                remove(self.out, name)
        self.store.update(
            stage.name, key=digest(decision.parts), parts=decision.parts, kind=stage.kind,
            label=stage.label, status="running", seconds=before, started=now(), resumed=resumed,
            exit_status=None, error=None, current=True, skipped=False,
            commit=provenance.commit(self.root),
        )  # fmt: skip

        # The share of the cores follows from the limits, not from how many stages happen to run.
        own = {}
        if stage.group and self.limits.threads and not os.environ.get("OMP_NUM_THREADS"):
            own["OMP_NUM_THREADS"] = str(self.limits.threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if resumed else "w", encoding="utf-8") as log:
            words = [*(f"{name}={value}" for name, value in own.items()), *stage.command]
            log.write(f"# {now()} {shlex.join(words)}\n")
        if queue is None:
            bars = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "1"}  # keeps logs short
            job = LocalJob(
                stage.command, folder=self.root, log=path, environment=os.environ | bars | own,
                keep_open=[descriptor],
            )  # fmt: skip
        else:
            result = path.with_suffix(".json")
            job = ClusterJob.submit(queue, CommandJob(stage.command, self.root, path, result))
        return _RunningStage(stage, job, before, time.monotonic())

    def _record(self, one: _RunningStage, ended: Finished) -> tuple[str, str]:
        """Record how a stage ended; returns its status, and what to say of a failure."""
        stage = one.stage
        missing = [name for name in stage.outputs if not (self.out / name).exists()]
        good = ended.exit_status == 0 and not missing and one.stopped_by is None
        status = "finished" if good else "stopped" if one.stopped_by else "failed"
        what = ended.description or f"ended without leaving {', '.join(missing)}"
        log = self.log_path(stage)
        lines = re.split(r"[\r\n]+", log.read_text(errors="replace"))
        lines = [line for line in lines if line.strip() and not line.startswith("#")]
        errors = [line for line in lines[-40:] if line.startswith("error:")]
        reason = " / ".join(errors[-1:] or lines[-3:])[:500] or "no output"
        self.store.update(
            stage.name, status=status, seconds=round(one.before + ended.seconds, 2), ended=now(),
            exit_status=ended.exit_status, peak_memory_bytes=ended.peak_memory_bytes,
            error=None if good else f"{what}: {reason}",
            product=stage.product_digest(self.out) if good else None,
        )  # fmt: skip
        if status != "failed":
            return status, ""
        tail = "\n".join(f"  | {line}" for line in lines[-_LOG_LINES_SHOWN:])
        message = f"stage {stage.title} {what} after {duration(ended.seconds)}\n{tail}\n"
        message += f"  whole log: {log}\n  to go on: {self.go_on_command}"
        if stage.resumable:
            message += f"\n  to start this stage anew, first remove {self.out / stage.owns[0]}"
        return status, message


def side_by_side(setting: int | Literal["auto"], num_arms: int) -> int:
    """Return how many detection stages run at once.

    `auto` does not look at the number of seeds: with it, more seeds would change the threads of
    each, and thereby figures.
    """
    if setting != "auto":
        return setting
    return 1 if has_nvidia_gpu() else min(provenance.usable_cores(), _AUTO_AT_MOST, num_arms)


def has_nvidia_gpu() -> bool:
    """Whether there is an NVIDIA driver and its devices are not hidden from programs.

    Asking torch itself would cost every call of the pipeline its seconds of import.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
