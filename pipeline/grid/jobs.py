"""The commands of one run as a submitit job: one after another, each skipped if it is done.

`job.json` in the run's folder says how the last attempt ended. A request to stop (SIGTERM, or the
cluster's signal) goes on to the command, which saves and ends; the next attempt goes on from there.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from common.errors import UserError
from common.files import lock_file, read_json_or_none, write_json

RESULT = "job.json"
_LAST_LINES = 3  # of a failed command's output, kept as the reason
_ECHO_SECONDS = 5.0  # a second request within this is an echo of the first; a later one is final
_LOCAL_MINUTES = 60 * 24 * 365  # submitit ends local jobs after a time; nobody asked for it


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Of its log.
        command: Argument list; never passed to a shell.
        product: File that exists when it is done.
    """

    name: str
    command: tuple[str, ...]
    product: Path


@dataclass
class CommandJob:
    """The steps of one run; submitit calls it, and `checkpoint` before it queues it again.

    Attributes:
        steps: In their order.
        folder: Where logs and job.json go.
        working_folder: Where the commands run: the repository.
    """

    steps: tuple[Step, ...]
    folder: Path
    working_folder: Path
    _pid: int = 0
    _stopped_at: float | None = None

    def __call__(self) -> None:
        """Run what is missing. How it ended stands in job.json; nothing is raised for a failure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        old = signal.signal(signal.SIGTERM, self._stop)
        try:
            with (self.folder / ".job.lock").open("a") as file:
                # An attempt that outlived the program that started it ends first.
                lock_file(file, self.folder, wait=True)
                started = time.monotonic()
                (self.folder / RESULT).unlink(missing_ok=True)
                result = {"status": "finished", "error": None}
                for step in self.steps:
                    if not step.product.exists():
                        result = self._run(step)
                    if result["status"] != "finished":
                        break
                write_json(self.folder / RESULT, result | {"seconds": time.monotonic() - started})
        finally:
            signal.signal(signal.SIGTERM, old)

    def _run(self, step: Step) -> dict[str, Any]:
        log = self.folder / "logs" / f"{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        if self._stopped_at is not None:
            return {"status": "stopped", "error": f"stopped before {step.name}"}
        with log.open("ab") as stream:
            process = subprocess.Popen(
                step.command,
                cwd=self.working_folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through this job, and once
            )
            self._pid = process.pid
            # No Popen.wait: `checkpoint` waits for the same child, in a signal handler within this.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            self._pid = 0
            status = process.wait()
        if status == 0 and step.product.exists():
            return {"status": "finished", "error": None}
        if self._stopped_at is not None:
            return {"status": "stopped", "error": f"stopped in {step.name}"}
        how = f"exit status {status}" if status else f"exit status 0 without {step.product.name}"
        return {"status": "failed", "error": f"{step.name}: {how}: {last_lines(log)}"}

    def checkpoint(self) -> Any:
        """Let the command save and end; what submitit queues then is the same again."""
        import submitit

        self._stop()
        if self._pid:
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        again = CommandJob(self.steps, self.folder, self.working_folder)
        return submitit.helpers.DelayedSubmission(again)

    def _stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        is_first, now = self._stopped_at is None, time.monotonic()
        self._stopped_at = self._stopped_at or now
        if self._pid and (is_first or now - self._stopped_at > _ECHO_SECONDS):
            os.killpg(self._pid, signal.SIGTERM if is_first else signal.SIGKILL)


def last_lines(log: Path) -> str:
    """The end of a log as one line; what stands after the last `error:` if there is one."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()][-40:]
    errors = [line for line in lines if line.startswith("error:")]
    return " / ".join(errors[-1:] or lines[-_LAST_LINES:])[:500] or "no output"


def read_result(folder: Path) -> dict[str, Any]:
    """How the last attempt ended; a job that left nothing has failed."""
    found = read_json_or_none(folder / RESULT)
    if not isinstance(found, dict) or "status" not in found:
        return {"status": "failed", "error": "ended without a result (killed?)", "seconds": 0.0}
    return found


@dataclass
class Handle:
    """A job that was submitted."""

    job: Any
    is_local: bool

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.job.done()

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.done():
            return
        if self.is_local:
            os.kill(int(self.job.job_id), signal.SIGTERM)  # submitit's controller passes it on
        else:
            self.job.cancel(check=False)  # scancel: SIGTERM, later SIGKILL


class Executor(Protocol):
    """Takes jobs."""

    def submit(self, job: CommandJob) -> Handle:
        """Start a job, or queue it."""
        ...


class SubmititExecutor:
    """Runs as submitit jobs."""

    def __init__(
        self,
        folder: Path,
        root: Path,
        *,
        cluster: str = "local",
        gpus: int = 0,
        cpus: int = 1,
        minutes: int = 240,
        partition: str | None = None,
        slurm_options: Mapping[str, str] | None = None,
    ) -> None:
        """Get ready.

        Args:
            folder: Of submitit's files.
            root: The repository; jobs find their code there.
            cluster: "local" or "slurm".
            gpus: Of each run.
            cpus: Of each run.
            minutes: SLURM's time limit; then the job saves and is queued again.
            partition: Of SLURM.
            slurm_options: Further lines for sbatch.
        Raises:
            UserError: If there is no such cluster.
        """
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))  # runs inherit it
        path = os.environ.get("PYTHONPATH")
        if str(root) not in (path or "").split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), path]))
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # else warns where nothing accounts
        self._is_local = cluster == "local"
        extra = {"signal": "USR1@120", "requeue": True, **(slurm_options or {})}
        try:
            self._executor = submitit.AutoExecutor(
                folder=folder, cluster=cluster,
                slurm_max_num_timeout=100, local_max_num_timeout=100,
            )  # fmt: skip
            self._executor.update_parameters(
                name="cell", nodes=1, tasks_per_node=1, cpus_per_task=cpus,
                gpus_per_node=gpus,
                timeout_min=_LOCAL_MINUTES if self._is_local else minutes,
                slurm_partition=partition, slurm_additional_parameters=extra,
            )  # fmt: skip
        except RuntimeError as error:  # no srun
            raise UserError(f"submitit cannot use --cluster {cluster}: {error}") from error

    def submit(self, job: CommandJob) -> Handle:
        """Start a job, or queue it.

        Raises:
            UserError: If the cluster refuses it.
        """
        # Ctrl-C is for this program, which tells its runs; what it starts inherits the setting.
        old = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return Handle(self._executor.submit(job), self._is_local)
        except (RuntimeError, OSError) as error:
            raise UserError(f"submitit cannot submit a run: {error}") from error
        finally:
            signal.signal(signal.SIGINT, old)
