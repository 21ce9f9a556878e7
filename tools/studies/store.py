"""The results of a study: one SQLite file, written by one process, exported as JSON."""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.flow.errors import UserError

STATUSES = ("planned", "running", "stopped", "failed", "finished")
_FORMAT = "fa-study-store-1"
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    fingerprint TEXT NOT NULL,
    seed INTEGER NOT NULL,
    label TEXT NOT NULL,
    axes TEXT NOT NULL,         -- JSON: {table: {axis: level}}
    settings TEXT NOT NULL,     -- JSON: what the fingerprint hashes
    status TEXT NOT NULL,
    metrics TEXT NOT NULL,      -- JSON: {name: value}
    seconds REAL NOT NULL,      -- of all attempts that ended by themselves or by a request to stop
    attempts INTEGER NOT NULL,
    error TEXT,
    code TEXT,                  -- commit of the last attempt
    changed REAL NOT NULL,      -- seconds since 1970
    PRIMARY KEY (fingerprint, seed)
);
"""


@dataclass(frozen=True)
class Row:
    """One cell with one seed, as stored."""

    fingerprint: str
    seed: int
    label: str
    axes: dict[str, dict[str, str]]
    settings: dict[str, Any]
    status: str
    metrics: dict[str, float]
    seconds: float
    attempts: int
    error: str | None
    code: str | None


class Store:
    """The table of cells. Only the process that holds the folder's lock may open it for writing."""

    def __init__(self, path: Path) -> None:
        """Open or make the file.

        Raises:
            UserError: If it is no such store.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path)
        try:
            with self._database:
                self._database.executescript(_TABLES)
                self._database.execute(
                    "INSERT OR IGNORE INTO meta VALUES ('format', ?)", (_FORMAT,)
                )
            found = self._database.execute("SELECT value FROM meta WHERE key='format'").fetchone()
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise UserError(
                f"{path}: is no results store ({error}); choose another --out"
            ) from None
        if found[0] != _FORMAT:
            self._database.close()
            raise UserError(
                f"{path}: has format {found[0]!r}, not {_FORMAT!r}; choose another --out"
            )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def note_killed(self) -> int:
        """Cells that 'run' though nobody holds the folder were killed; returns how many."""
        with self._database:
            change = "status='stopped', error='killed together with its harness', changed=?"
            done = self._database.execute(
                f"UPDATE cells SET {change} WHERE status='running'", (time.time(),)
            )
            return done.rowcount

    def plan(
        self, fingerprint: str, seed: int, label: str, axes: Mapping, settings: Mapping
    ) -> Row:
        """Enter a cell, or add its names where it is there already; returns it."""
        for row in self._rows("WHERE fingerprint=? AND seed=?", (fingerprint, seed)):
            axes = row.axes | dict(axes)
        names = (label, json.dumps(axes, sort_keys=True))
        with self._database:
            self._database.execute(
                "INSERT INTO cells VALUES (?, ?, ?, ?, ?, 'planned', '{}', 0, 0, NULL, NULL, ?) "
                "ON CONFLICT (fingerprint, seed) DO UPDATE SET label=excluded.label, "
                "axes=excluded.axes",
                (fingerprint, seed, *names, json.dumps(settings, sort_keys=True), time.time()),
            )
        return self.row(fingerprint, seed)

    def start(self, fingerprint: str, seed: int, code: str | None) -> None:
        """Note that an attempt begins."""
        self._update(fingerprint, seed, "status='running', attempts=attempts+1, code=?", (code,))

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
        """Note how an attempt ended; all of it in one transaction."""
        assert status in STATUSES, status
        change = "status=?, metrics=?, seconds=seconds+?, error=?"
        values = (status, json.dumps(dict(metrics or {}), sort_keys=True), seconds, error)
        self._update(fingerprint, seed, change, values)

    def _update(self, fingerprint: str, seed: int, change: str, values: tuple) -> None:
        with self._database:
            done = self._database.execute(
                f"UPDATE cells SET {change}, changed=? WHERE fingerprint=? AND seed=?",
                (*values, time.time(), fingerprint, seed),
            )
            assert done.rowcount == 1, (fingerprint, seed)

    def row(self, fingerprint: str, seed: int) -> Row:
        """One cell with one seed."""
        return next(self._rows("WHERE fingerprint=? AND seed=?", (fingerprint, seed)))

    def rows(self) -> list[Row]:
        """All of them, in the order in which they were planned."""
        return list(self._rows("ORDER BY rowid", ()))

    def _rows(self, tail: str, values: tuple) -> Iterator[Row]:
        columns = ", ".join(Row.__dataclass_fields__)
        with closing(self._database.execute(f"SELECT {columns} FROM cells {tail}", values)) as rows:
            for row in rows.fetchall():
                found = dict(zip(Row.__dataclass_fields__, row, strict=True))
                for name in ("axes", "settings", "metrics"):
                    found[name] = json.loads(found[name])
                yield Row(**found)


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
