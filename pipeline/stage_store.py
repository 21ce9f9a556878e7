"""`stages.json`: what ran in a run's folder, and the lock that keeps two runs apart."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import lock_file, read_json_or_none, write_json

FORMAT = "fa-stages-1"
_LOCK_WAIT_SECONDS = 10.0


class Ledger:
    """The record of every stage of one run's folder; each change is written at once.

    `update` may be called from several threads.
    """

    def __init__(self, out: Path) -> None:
        """Read `out/stages.json`, or start an empty record.

        Raises:
            UserError: If the file is there but is not such a record.
        """
        self.path = out / "stages.json"
        self.skipped: set[str] = set()
        self.data: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.load()

    def load(self) -> None:
        """Read the file again."""
        self.data = {"format": FORMAT, "name": None, "plan": [], "stages": {}}
        if self.path.exists():
            data = read_json_or_none(self.path)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise UserError(
                    f"{self.path} is damaged or not of this version; "
                    f"move {self.path.parent} away or choose another --out"
                )
            self.data = data

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The record of each stage by name."""
        return self.data["stages"]

    def open_run(self, name: str, **facts: Any) -> None:
        """Note the pipeline's name and what is known about this call.

        Raises:
            UserError: If the folder holds a run of another pipeline.
        """
        self.check_name(name)
        self.data |= {"name": name, **facts, "called": now()}
        self.write()

    def check_name(self, name: str) -> None:
        """Raise UserError if the folder holds a run of another pipeline."""
        held = self.data["name"]
        if held not in (None, name):
            raise UserError(
                f"{self.path.parent} holds a run of the pipeline {held!r}, not {name!r}; "
                "choose another --out"
            )

    def update(self, stage: str, **facts: Any) -> None:
        """Set facts of a stage and write the file."""
        with self._lock:
            self.stages.setdefault(stage, {}).update(facts)
            self.write()

    def write(self) -> None:
        """Write the file atomically."""
        write_json(self.path, self.data)


def now() -> str:
    """Return the time of day with the zone, to the second."""
    return datetime.datetime.now(datetime.UTC).astimezone().isoformat(timespec="seconds")


@contextlib.contextmanager
def lock(out: Path) -> Iterator[int]:
    """Hold the lock of a run's folder; yields its file descriptor.

    Stages inherit the descriptor, so that the folder stays locked while a stage of a killed run
    is still going on.

    Raises:
        UserError: If another run holds it.
    """
    path = out / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, out)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, out: Path) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    while True:
        if lock_file(descriptor, out):
            return
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        if _alive(owner) or time.monotonic() > deadline:
            raise UserError(
                f"another run is going on in {out} (process {owner or 'unknown'}); "
                "wait for it, stop it, or choose another --out"
            )
        time.sleep(0.2)  # A stage of a killed run is just ending.


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
