"""The results of a study: one JSON file per cell and seed, written by one process."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text

FOLDER = "job_results"
"""Of the store, in the folder of a study."""
STATUSES = ("planned", "running", "stopped", "failed", "finished")


@dataclass(frozen=True)
class Row:
    """One cell with one seed, as stored.

    Attributes:
        axes: {table: {axis: level}}.
        settings: What the fingerprint hashes.
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


class Store:
    """The rows by cell and seed; each change is written at once, by rename.

    Only the process that holds the study's folder (`hold`) may change rows.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Raises:
            UserError: Naming a file that is no such row.
        """
        self._folder = folder
        self._rows: dict[tuple[str, int], Row] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                row = Row(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(
                    f"{path}: is no result of a study ({error}); delete it, and its cell is looked "
                    "at again, or choose another --out"
                ) from None
            self._rows[row.fingerprint, row.seed] = row

    def _put(self, row: Row) -> Row:
        text = json.dumps(asdict(row), indent=1, sort_keys=True) + "\n"
        write_text(self._folder / f"{row.fingerprint}-{row.seed}.json", text)
        self._rows[row.fingerprint, row.seed] = row
        return row

    def note_killed(self) -> int:
        """Cells that 'run' though nobody holds the folder were killed; returns how many."""
        running = [row for row in self._rows.values() if row.status == "running"]
        for row in running:
            self._put(replace(row, status="stopped", error="killed together with its harness"))
        return len(running)

    def plan(
        self, fingerprint: str, seed: int, label: str, axes: Mapping, settings: Mapping
    ) -> Row:
        """Enter a cell, or add its names where it is there already; returns it."""
        known = self._rows.pop((fingerprint, seed), None)  # rows stand in the order of planning
        if known is None:
            return self._put(Row(fingerprint, seed, label, dict(axes), dict(settings)))
        return self._put(replace(known, label=label, axes=known.axes | dict(axes)))

    def start(self, fingerprint: str, seed: int, code: str | None) -> None:
        """Note that an attempt begins."""
        row = self.row(fingerprint, seed)
        self._put(replace(row, status="running", attempts=row.attempts + 1, code=code))

    def finish(
        self,
        fingerprint: str,
        seed: int,
        status: str,
        *,
        metrics: Mapping[str, float] | None = None,
        seconds: float = 0.0,
        error: str | None = None,
    ) -> None:
        """Note how an attempt ended."""
        assert status in STATUSES, status
        row = self.row(fingerprint, seed)
        self._put(
            replace(
                row,
                status=status,
                metrics=dict(metrics or {}),
                seconds=row.seconds + seconds,
                error=error,
            )
        )

    def row(self, fingerprint: str, seed: int) -> Row:
        """One cell with one seed."""
        return self._rows[fingerprint, seed]

    def rows(self) -> list[Row]:
        """All of them, in the order in which they were planned last."""
        return list(self._rows.values())


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other harnesses out of a study's folder.

    Raises:
        UserError: If another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder}: another study runs there; wait for it, or choose another --out"
            ) from None
        yield
