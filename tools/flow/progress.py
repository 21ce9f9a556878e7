"""What a person sees while the stages run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_PLAIN_EVERY_SECONDS = 30.0


def clock(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows stage k of n, the time it takes and its own last line."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        """Show `total` stages on `stream` (standard output)."""
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._total = total
        self._label = ""
        self._shown_at = 0.0
        self._shown_line = ""

    def start(self, number: int, name: str, why: str) -> None:
        """A stage begins."""
        self._label = f"[{number}/{self._total}] {name}"
        self._shown_at = time.monotonic()
        self._write(f"{self._label}: {why}\n")

    def tick(self, seconds: float, line: str) -> None:
        """Show the stage's last line; on a terminal in place, else now and then."""
        now = time.monotonic()
        if self._live:
            if now - self._shown_at >= 0.2:
                self._shown_at = now
                width = shutil.get_terminal_size().columns - 1
                text = f"{self._label}  {clock(seconds)}  {line}"
                self._write(f"\r\x1b[K{text[:width]}")
        elif now - self._shown_at >= _PLAIN_EVERY_SECONDS and line != self._shown_line:
            self._shown_at, self._shown_line = now, line
            self._write(f"{self._label}  {clock(seconds)}  {line}\n")

    def finish(self, text: str) -> None:
        """A stage ended."""
        self._write(f"{self._clear()}{self._label}: {text}\n")

    def skip(self, number: int, name: str, seconds: float) -> None:
        """A stage is left as it is."""
        self._write(f"[{number}/{self._total}] {name}: unchanged ({clock(seconds)} when it ran)\n")

    def _clear(self) -> str:
        return "\r\x1b[K" if self._live else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
