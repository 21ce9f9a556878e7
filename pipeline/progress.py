"""What a person sees while stages run: live lines on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from dataclasses import dataclass
from typing import TextIO

_PLAIN_EVERY_SECONDS = 30.0
_LIVE_EVERY_SECONDS = 0.2


def clock(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class _Running:
    label: str
    shown_at: float
    shown_line: str = ""
    live_text: str = ""


class Progress:
    """Shows stage k of n, the time it takes and its own last line; may be called from threads."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        """Show `total` stages on `stream` (standard output)."""
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._total = total
        self._running: dict[str, _Running] = {}
        self._drawn_at = 0.0
        self._drawn_lines = 0
        self._lock = threading.RLock()

    def start(self, number: int, name: str, why: str) -> None:
        """A stage begins."""
        with self._lock:
            label = f"[{number}/{self._total}] {name}"
            self._running[name] = _Running(label, time.monotonic())
            self._write(f"{label}: {why}\n")

    def tick(self, name: str, seconds: float, line: str) -> None:
        """Show a stage's last line; on a terminal in place, else now and then."""
        now = time.monotonic()
        with self._lock:
            stage = self._running[name]
            text = f"{stage.label}  {clock(seconds)}  {line}"
            if len(self._running) > 1:
                text = f"{name:<{max(map(len, self._running))}} | {line or clock(seconds)}"
            if self._live:
                stage.live_text = text
                if now - self._drawn_at >= _LIVE_EVERY_SECONDS:
                    self._drawn_at = now
                    self._write("")
            elif now - stage.shown_at >= _PLAIN_EVERY_SECONDS and line != stage.shown_line:
                stage.shown_at, stage.shown_line = now, line
                self._write(f"{text}\n")

    def finish(self, name: str, text: str = "") -> None:
        """A stage ended; says how, if it is known and was not said yet."""
        with self._lock:
            stage = self._running.pop(name, None)
            if stage is not None and text:
                self._write(f"{stage.label}: {text}\n")

    def others(self, name: str) -> list[str]:
        """Return the stages that run beside this one."""
        with self._lock:
            return [other for other in self._running if other != name]

    def skip(self, number: int, name: str, seconds: float) -> None:
        """A stage is left as it is."""
        label = f"[{number}/{self._total}] {name}"
        with self._lock:
            self._write(f"{label}: unchanged ({clock(seconds)} when it ran)\n")

    def _write(self, text: str) -> None:
        """Write lines that stay, above the live lines of the stages that run."""
        erase = "\r\x1b[K" + "\x1b[A\x1b[K" * (self._drawn_lines - 1) if self._drawn_lines else ""
        size = shutil.get_terminal_size()
        live = [stage.live_text for stage in self._running.values() if stage.live_text]
        live = [line[: size.columns - 1] for line in live[: size.lines - 1]]
        self._drawn_lines = len(live)
        self._stream.write(erase + text + "\n".join(live))
        self._stream.flush()
