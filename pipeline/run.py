"""Runs stages in order: skips what is unchanged, continues what was interrupted, says why.

Neighbours of one group run side by side, each in a thread that waits for its process.
"""

from __future__ import annotations

import functools
import itertools
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import provenance
from common.errors import RunFailed, StoppedBySignal, UserError
from common.files import inside, remove
from pipeline.process import Child, Finished, signals_noted, stop_reason
from pipeline.progress import Progress, clock
from pipeline.stages import (
    Stage,
    StageStore,
    digest,
    explain,
    fingerprint_parts,
    input_digest,
    lock,
    now,
    product_digest,
)

_AUTO_AT_MOST = 4
_HEARTBEAT_SECONDS = 5.0
_LOG_LINES_SHOWN = 15


@dataclass(frozen=True)
class Decision:
    """What is done with a stage, and why."""

    action: Literal["skip", "run", "resume", "maybe"]
    reason: str
    parts: dict[str, Any] = field(default_factory=dict)


class Runner:
    """Runs a list of stages in one folder.

    Attributes:
        root: The repository; the stages' working folder.
        out: The run's folder.
        go_on_command: What a person types to continue, for messages.
        store: The record of the stages that ran.
        parallel: How many stages of one group run side by side.
    """

    def __init__(
        self, root: Path, out: Path, go_on_command: Sequence[str], parallel: int = 1
    ) -> None:
        """Read the record in `out` if there is one; nothing is written yet."""
        self.root = root
        self.out = out
        self.go_on_command = shlex.join(go_on_command)
        self.store = StageStore(out)
        self.parallel = parallel
        self._signals: list[int] = []
        self._between = threading.Lock()

    def plan(self, stages: Sequence[Stage]) -> dict[str, Decision]:
        """Foretell what a run would do; `maybe` is decided by what an earlier stage will make.

        Raises:
            UserError: If a stage would have to remove something that this pipeline did not make.
        """
        input_digest.cache_clear()
        decisions: dict[str, Decision] = {}
        for stage in stages:
            open_ones = [name for name in stage.upstream if decisions[name].action != "skip"]
            if stage.name in self.store.stages and open_ones:
                reason = f"only if {open_ones[0]} makes something else than before"
                decisions[stage.name] = Decision("maybe", reason)
            else:
                decisions[stage.name] = self._decide(stage)
        return decisions

    def run(
        self,
        stages: Sequence[Stage],
        progress: Progress,
        *,
        until: str | None = None,
        before_first: Callable[[], None] = lambda: None,
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        """Run what has to run, in order.

        Args:
            stages: The stages, every one after those that it reads.
            progress: What a person sees.
            until: The last stage to run; None runs all.
            before_first: Called once, when the folder is locked.
            after_each: Called after every stage, skipped ones included, also after a failure;
                never twice at once.
        Raises:
            RunFailed: If a stage fails; no further one begins, those beside it are let finish.
            StoppedBySignal: After SIGINT or SIGTERM.
        """
        names = [stage.name for stage in stages]
        todo = stages if until is None else stages[: names.index(until) + 1]
        with lock(self.out) as descriptor, signals_noted() as self._signals:
            self.store.load()  # Another run may have written before the lock was ours.
            decisions = self.plan(stages)
            # Which stages belong to this run, and which records speak of its settings. What is
            # skipped is known only when its turn comes.
            self.store.data["plan"] = names
            for name, record in self.store.stages.items():
                record["current"] = name in decisions and decisions[name].action == "skip"
                record["skipped"] = False
            self.store.write()
            before_first()

            def job(number: int, stage: Stage) -> None:
                try:
                    self._skip_or_run(stage, number, progress, descriptor)
                finally:
                    with self._between:
                        after_each()

            numbered = enumerate(todo, 1)
            for _, neighbours in itertools.groupby(numbered, lambda n: n[1].group or n[1].name):
                jobs = [functools.partial(job, number, stage) for number, stage in neighbours]
                run_in_order(jobs, self.parallel)

    def log_path(self, stage: Stage) -> Path:
        """Return where the stage's output goes."""
        return self.out / "logs" / f"{stage.name}.log"

    def _skip_or_run(self, stage: Stage, number: int, progress: Progress, descriptor: int) -> None:
        self._stop_if_asked()
        decision = self._decide(stage)
        if decision.action == "skip":
            self.store.update(stage.name, current=True, skipped=True)
            progress.skip(number, stage.name, self.store.stages[stage.name].get("seconds", 0.0))
            return
        progress.start(number, stage.name, decision.reason)
        try:
            self._run_stage(stage, decision, progress, descriptor)
        finally:
            progress.finish(stage.name)

    def _decide(self, stage: Stage) -> Decision:
        made = {name: self.store.stages.get(name, {}).get("product") for name in stage.upstream}
        parts = fingerprint_parts(stage, self.root, self.out, made)
        record = self.store.stages.get(stage.name)
        action: Literal["skip", "run", "resume"] = "run"
        missing = [name for name in stage.outputs if not inside(self.out, name).exists()]
        if record is None:
            for name in (*stage.owns, *stage.outputs):
                path = inside(self.out, name)
                if path.exists() or path.is_symlink():
                    raise UserError(
                        f"{path} exists already but was not made by this pipeline "
                        f"(stage {stage.name}); move it away or choose another --out"
                    )
            reason = "first run"
        elif record.get("fingerprint") != digest(parts):
            reason = explain(record.get("parts") or {}, parts)
        elif record.get("status") == "finished" and not missing:
            action, reason = "skip", "unchanged"
        elif record.get("status") == "finished":
            reason = f"{missing[0]} is missing"
        elif stage.resumable:
            action, reason = "resume", "continues where it stopped"
        else:
            reason = "did not finish last time"
        return Decision(action, reason, parts)

    def _run_stage(
        self, stage: Stage, decision: Decision, progress: Progress, descriptor: int
    ) -> None:
        resumed = decision.action == "resume"
        before = self.store.stages[stage.name].get("seconds") or 0.0 if resumed else 0.0
        if not resumed:
            for name in dict.fromkeys((*stage.owns, *stage.outputs)):
                remove(self.out, name)
        self.store.update(
            stage.name,
            fingerprint=digest(decision.parts),
            parts=decision.parts,
            status="running",
            seconds=before,
            started=now(),
            resumed=resumed,
            exit_status=None,
            current=True,
            commit=provenance.commit(self.root),
        )

        # Run the stage as a child process, with its share of the cores. The share follows from
        # `parallel`, not from how many stages happen to run.
        own = {}
        if stage.group and self.parallel > 1 and not os.environ.get("OMP_NUM_THREADS"):
            own["OMP_NUM_THREADS"] = str(max(1, provenance.usable_cores() // self.parallel))
        path = self.log_path(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        beat, passed_on = time.monotonic(), 0
        with path.open("a" if resumed else "w", encoding="utf-8") as log:
            shown = [*(f"{name}={value}" for name, value in own.items()), *stage.command]
            log.write(f"# {now()} {shlex.join(shown)}\n")
            child = Child(
                stage.command,
                folder=self.root,
                log=log,
                environment=os.environ | {"PYTHONUNBUFFERED": "1"} | own,
                keep_open=[descriptor],
            )

            def tick() -> None:
                nonlocal beat, passed_on
                for number in self._signals[passed_on:]:
                    passed_on += 1
                    child.stop(number)
                progress.tick(stage.name, before + child.seconds, child.lines.last_line)
                if time.monotonic() - beat > _HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    self.store.update(stage.name, seconds=round(before + child.seconds, 2))

            try:
                ended = child.wait(tick)
            except BaseException:
                child.stop(signal.SIGKILL)
                raise

        # Note and say how it ended.
        missing = [name for name in stage.outputs if not (self.out / name).exists()]
        good = ended.exit_status == 0 and not missing and ended.stopped_by is None
        status = "finished" if good else "stopped" if ended.stopped_by else "failed"
        self.store.update(
            stage.name,
            status=status,
            seconds=round(before + ended.seconds, 2),
            ended=now(),
            exit_status=ended.exit_status,
            peak_memory_bytes=ended.peak_memory_bytes,
            product=product_digest(stage, self.out) if good else None,
        )
        if good:
            progress.finish(stage.name, f"finished in {clock(before + ended.seconds)}")
            return
        others = "" if self._signals else ", ".join(progress.others(stage.name))
        hint = f"; no further stage begins, these are let finish: {others}" if others else ""
        progress.finish(stage.name, f"{status} after {clock(before + ended.seconds)}{hint}")
        self._stop_if_asked()
        raise RunFailed(self._failure(stage, ended, missing))

    def _failure(self, stage: Stage, ended: Finished, missing: Sequence[str]) -> str:
        log = self.log_path(stage)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        what = ended.description or f"ended without leaving {', '.join(missing)}"
        tail = "\n".join(f"  | {line}" for line in lines[-_LOG_LINES_SHOWN:])
        message = f"stage {stage.name} {what} after {clock(ended.seconds)}\n{tail}\n"
        message += f"  whole log: {log}\n  to go on: {self.go_on_command}"
        if stage.resumable:
            message += f"\n  to start this stage anew, first remove {self.out / stage.owns[0]}"
        return message

    def _stop_if_asked(self) -> None:
        if self._signals:
            message = f"{stop_reason(self._signals)}\n  to go on: {self.go_on_command}"
            raise StoppedBySignal(self._signals[0], message)


def run_in_order(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Begin jobs in their order, at most `workers` at once, and wait for all.

    After an error no further job begins; those that run go on to their end.

    Raises:
        RunFailed: For one or several failed stages.
        Exception: The first error of another kind.
    """
    errors: list[BaseException] = []

    def begin(job: Callable[[], None]) -> None:
        if not errors:
            try:
                job()
            except BaseException as error:
                errors.append(error)

    with ThreadPoolExecutor(max_workers=workers) as pool:
        for job in jobs:
            pool.submit(begin, job)
    for error in errors:
        if len(errors) == 1 or not isinstance(error, RunFailed):
            raise error
    if errors:
        raise RunFailed("\nerror: ".join(sorted(map(str, errors))))


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
