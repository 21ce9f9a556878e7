"""Run one child process: log, progress lines, peak memory, signals; it dies with its parent.

Several threads may each run a child; the thread that starts one must wait for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from common.provenance import memory_of

GRACE_SECONDS = 30.0
"""Time between passing a signal on and ending the child for good."""
_MEMORY_EVERY_SECONDS = 2.0
_PROGRESS_EVERY_SECONDS = 10.0
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PARENT_DEATH = (sys.executable, "-I", "-S", str(Path(__file__).with_name("parent_death.py")))


@dataclass(frozen=True)
class Finished:
    """How a child process ended; `stopped_by` is the signal that this process passed on."""

    exit_status: int
    seconds: float
    peak_memory_bytes: int
    stopped_by: int | None

    @property
    def description(self) -> str:
        """How it ended, as the predicate of a sentence; empty for exit status 0."""
        if self.exit_status > 0:
            return f"failed with exit status {self.exit_status}"
        if self.exit_status == 0:
            return ""
        name = signal.Signals(-self.exit_status).name
        return f"was ended by {name}" + " (out of memory, perhaps)" * (name == "SIGKILL")


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


def stop_reason(received: Sequence[int]) -> str:
    """Why to stop after these signals, or nothing."""
    return f"stopped by {signal.Signals(received[0]).name}" if received else ""


class LineLog:
    """Splits a child's output into lines; progress bars reach the log only now and then."""

    def __init__(self, stream: IO[str]) -> None:
        """Write lines to `stream`."""
        self.last_line = ""
        self._stream = stream
        self._rest = ""
        self._progress_at = 0.0

    def feed(self, text: str) -> None:
        """Take the next piece of output."""
        pieces = re.split(r"(\r\n|\n|\r(?!\Z))", self._rest + text)
        for line, end in zip(pieces[0:-1:2], pieces[1::2], strict=True):
            self._line(line.rstrip("\r"), progress=end == "\r")
        self._rest = pieces[-1]
        self.last_line = _ESCAPE.sub("", self._rest).strip() or self.last_line
        self._stream.flush()

    def close(self) -> None:
        """Take what came after the last line end as a line."""
        if self._rest:
            self._line(self._rest.rstrip("\r"), progress=False)
            self._rest = ""
        self._stream.flush()

    def _line(self, line: str, *, progress: bool) -> None:
        shown = _ESCAPE.sub("", line).strip()
        if shown:
            self.last_line = shown
        now = time.monotonic()
        if progress and now - self._progress_at < _PROGRESS_EVERY_SECONDS:
            return
        if progress:
            self._progress_at = now
        if shown or not progress:
            self._stream.write(_ESCAPE.sub("", line) + "\n")


class Child:
    """One child process in a session of its own, with its output in a log file."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        log: IO[str],
        environment: Mapping[str, str],
        keep_open: Sequence[int] = (),
    ) -> None:
        """Start the process.

        Args:
            command: Argument list.
            folder: Working folder.
            log: Where its output goes, line by line.
            environment: Its whole environment.
            keep_open: File descriptors that it inherits (the run's lock).
        """
        self.lines = LineLog(log)
        self.started = time.monotonic()
        self.stopped_by: int | None = None
        self._deadline = float("inf")
        self._process = subprocess.Popen(
            [*_PARENT_DEATH, str(os.getpid()), *command],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def stop(self, signum: int) -> None:
        """Pass a signal on to the whole group; the second one ends it for good."""
        again = self.stopped_by is not None
        self.stopped_by = signum
        self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
        self._signal_group(signal.SIGKILL if again else signum)

    def wait(self, on_tick: Callable[[], None]) -> Finished:
        """Read the output until the process ends; `on_tick` is called a few times a second."""
        pipe = self._process.stdout
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        memory_at, peak_bytes, is_open = 0.0, 0, True
        with pipe:
            while True:
                if is_open:
                    is_open = self._read(pipe)
                else:
                    time.sleep(0.1)
                ended, status, usage = os.wait4(self._process.pid, os.WNOHANG)
                if ended:
                    if is_open:
                        self._read(pipe)
                    break
                now = time.monotonic()
                if now >= self._deadline:
                    self._deadline = float("inf")
                    self._signal_group(signal.SIGKILL)
                if now - memory_at >= _MEMORY_EVERY_SECONDS:
                    memory_at = now
                    used = sum(memory_of(pid, "Pss:") for pid in session_members(self._process.pid))
                    peak_bytes = max(peak_bytes, used)
                on_tick()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.lines.close()
        for pid in session_members(self._process.pid):  # what the stage left behind
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        rss_unit = 1 if sys.platform == "darwin" else 1024
        peak_bytes = max(peak_bytes, usage.ru_maxrss * rss_unit)
        return Finished(self._process.returncode, self.seconds, peak_bytes, self.stopped_by)

    def _read(self, pipe: IO[bytes]) -> bool:
        """Take what is there, waiting a little for it; False at the end of the output."""
        if not select.select([pipe], [], [], 0.2)[0]:
            return True
        with contextlib.suppress(BlockingIOError):
            while data := os.read(pipe.fileno(), 1 << 16):
                self.lines.feed(data.decode("utf-8", errors="replace"))
            return False
        return True

    def _signal_group(self, signum: int) -> None:
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
