"""One process of a stage: a child that dies with this process, or a job of the cluster.

Both write what they print to the stage's log, are asked with `poll` whether they ended, and stopped
with `stop`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from common import parent_death
from common.errors import UserError
from common.files import NUMBER, lock_file, read_record_or_none, write_json
from common.provenance import memory_of

_MEMORY_EVERY_SECONDS = 2.0
_ECHO_SECONDS = 5.0  # a second request within this is an echo of the first; a later one is final
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PARENT_DEATH = (sys.executable, "-I", "-S", parent_death.__file__)


@dataclass(frozen=True)
class Finished:
    """How a process ended; the exit status is negative after a signal."""

    exit_status: int
    seconds: float
    peak_memory_bytes: int | None = None

    @property
    def description(self) -> str:
        """How it ended, as the predicate of a sentence; empty for exit status 0."""
        if self.exit_status > 0:
            return f"failed with exit status {self.exit_status}"
        if self.exit_status == 0:
            return ""
        name = signal.Signals(-self.exit_status).name
        return f"was ended by {name}" + " (out of memory, perhaps)" * (name == "SIGKILL")


def last_line(log: Path) -> str:
    """The last line of a log, or the last state of the progress bar that stands there."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        for line in reversed(re.split(r"[\r\n]", file.read().decode(errors="replace"))):
            text = _ESCAPE.sub("", line).strip()
            if text and not text.startswith("# "):  # the command
                return text
    return ""


# -- a child of this process ----------------------------------------------------------------------


class LocalJob:
    """A child in a session of its own; the kernel ends it when this process dies (Linux)."""

    def __init__(
        self, command: Sequence[str], *, folder: Path, log: Path,
        environment: Mapping[str, str], keep_open: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Start it.

        Args:
            command: Argument list; never passed to a shell.
            folder: Working folder.
            log: What it prints is appended there.
            environment: Its whole environment.
            keep_open: File descriptors that it inherits (the run's lock).
        """
        self._started, self._memory_at, self._peak_bytes = time.monotonic(), 0.0, 0
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [*_PARENT_DEATH, str(os.getpid()), *command],
                cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, start_new_session=True, pass_fds=tuple(keep_open),
            )  # fmt: skip

    def poll(self) -> Finished | None:
        """How it ended, or None while it runs."""
        pid, now = self._process.pid, time.monotonic()
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if not ended:
            if now - self._memory_at >= _MEMORY_EVERY_SECONDS:
                self._memory_at = now
                used = sum(memory_of(member, "Pss:") for member in session_members(pid))
                self._peak_bytes = max(self._peak_bytes, used)
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        for member in session_members(pid):  # what the stage left behind
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)
        rss_unit = 1 if sys.platform == "darwin" else 1024
        peak_bytes = max(self._peak_bytes, usage.ru_maxrss * rss_unit)
        return Finished(self._process.returncode, now - self._started, peak_bytes)

    def stop(self, signum: int) -> None:
        """Pass a signal on to the whole session; SIGKILL ends it for good."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signum)


def session_members(session: int) -> list[int]:
    """Return the processes of a session, itself included (none where there is no /proc)."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.parent.name))
    return members


# -- a job of the cluster -------------------------------------------------------------------------


@dataclass
class CommandJob:
    """What a job of the cluster does; submitit calls it, and `checkpoint` before it queues it anew.

    Attributes:
        command: Argument list.
        folder: Working folder: the repository.
        log: What the command prints is appended there.
        result: JSON file that says how it ended.
    """

    command: tuple[str, ...]
    folder: Path
    log: Path
    result: Path
    _pid: int = 0
    _stopped_at: float | None = None

    def __call__(self) -> None:
        """Run the command. How it ended stands in the result; nothing is raised for a failure."""
        old = signal.signal(signal.SIGTERM, self._stop)
        try:
            with self.log.open("ab") as stream, self.log.with_suffix(".lock").open("a") as lock:
                # An attempt that outlived the program that started it ends first.
                lock_file(lock, self.log.parent, wait=True)
                started = time.monotonic()
                process = subprocess.Popen(
                    self.command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=stream,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self._pid = process.pid
                # No Popen.wait: `checkpoint` waits for the same child, in a signal handler.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                self._pid = 0
                ended = {"exit_status": process.wait(), "seconds": time.monotonic() - started}
                write_json(self.result, ended)
        finally:
            signal.signal(signal.SIGTERM, old)

    def checkpoint(self) -> Any:
        """Let the command save and end; what submitit queues then is the same again."""
        import submitit

        self._stop()
        if self._pid:
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        again = CommandJob(self.command, self.folder, self.log, self.result)
        return submitit.helpers.DelayedSubmission(again)

    def _stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        is_first, now = self._stopped_at is None, time.monotonic()
        self._stopped_at = self._stopped_at or now
        if self._pid and (is_first or now - self._stopped_at > _ECHO_SECONDS):
            os.killpg(self._pid, signal.SIGTERM if is_first else signal.SIGKILL)


@dataclass
class ClusterJob:
    """A job that was submitted: it was cancelled, or its result says how it ended."""

    job: Any
    result: Path

    @classmethod
    def submit(cls, executor: Any, job: CommandJob) -> ClusterJob:
        """Queue a job.

        Raises:
            UserError: If the cluster refuses it.
        """
        job.result.unlink(missing_ok=True)
        # Ctrl-C is for this program, which stops its jobs; what it starts inherits the setting.
        old = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return cls(executor.submit(job), job.result)
        except (RuntimeError, OSError) as error:
            raise UserError(f"submitit cannot submit a stage: {error}") from error
        finally:
            signal.signal(signal.SIGINT, old)

    def poll(self) -> Finished | None:
        """How it ended, or None while it runs; a job that left no result was killed."""
        if not self.job.done():
            return None
        ended = read_record_or_none(self.result, {"exit_status": int, "seconds": NUMBER})
        ended = ended or {"exit_status": -signal.SIGKILL, "seconds": 0.0}
        return Finished(ended["exit_status"], ended["seconds"])

    def stop(self, signum: int) -> None:
        """Cancel it: scancel sends SIGTERM, and SIGKILL later."""
        self.job.cancel(check=False)


@dataclass(frozen=True)
class SlurmSettings:
    """Where and with what jobs are queued.

    Attributes:
        gpus: Of each job.
        cpus: Of each job.
        minutes: Time limit; then the stage saves and is queued again.
        partition: Of SLURM.
        options: Further lines for sbatch.
    """

    gpus: int = 0
    cpus: int = 1
    minutes: int = 240
    partition: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    def submitter(self, folder: Path) -> Any:
        """What takes jobs.

        Args:
            folder: Of submitit's files.
        Raises:
            UserError: If there is no SLURM.
        """
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
        os.environ.setdefault("OMP_NUM_THREADS", str(self.cpus))  # jobs inherit it
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # else warns where nothing accounts
        extra = {"signal": "USR1@120", "requeue": True, **dict(self.options)}
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=100)
            executor.update_parameters(
                name="stage", nodes=1, tasks_per_node=1, cpus_per_task=self.cpus,
                gpus_per_node=self.gpus, timeout_min=self.minutes, slurm_partition=self.partition,
                slurm_additional_parameters=extra,
            )  # fmt: skip
        except RuntimeError as error:  # no srun
            raise UserError(f"submitit cannot use --cluster slurm: {error}") from error
        return executor
