"""A stage, the fingerprint of what decides its result, and the record of the stages that ran."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import dotted
from common.errors import UserError
from common.files import lock_file, read_json_or_none, sha256_of, write_json
from common.provenance import library_version

FORMAT = "fa-stages-1"
_LOCK_WAIT_SECONDS = 10.0
_PART_NAMES = {
    "config": "setting",
    "code": "code",
    "upstream": "what was made by",
    "files": "input",
    "libraries": "library",
}  # of a fingerprint, and how messages call them


@dataclass(frozen=True)
class Stage:
    """One process of the pipeline and everything that its result depends on.

    Attributes:
        name: Name in `stages.json` and of the log; slashes make folders.
        command: Argument list; never passed to a shell.
        outputs: Paths relative to the run's folder that must exist when the stage is finished.
        owns: Paths relative to the run's folder that are removed before a fresh start.
        code_version: Raised by hand when a change of the code changes what the stage makes.
        products: Paths relative to the run's folder whose bytes count for the stages that read this
            one; `outputs` if empty. A stage that runs again and makes the same changes nothing.
        upstream: Names of the stages that this one reads.
        files: Inputs from outside: files count by content, folders by their listing.
        config: The settings that this stage sees.
        libraries: Distributions whose versions count.
        resumable: Whether the same command continues an interrupted run of the same fingerprint.
        group: Neighbours in the list with the same group may run side by side; they do not read
            each other. Empty: runs alone.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]
    owns: tuple[str, ...]
    code_version: int = 1
    products: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    resumable: bool = False
    group: str = ""


# -- fingerprints ---------------------------------------------------------------------------------


def fingerprint_parts(
    stage: Stage, root: Path, out: Path, made: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return what the fingerprint hashes, part by part, so that a change can be named.

    Args:
        stage: The stage.
        root: The repository; the command's mentions of it do not count.
        out: The run's folder; the command's mentions of it do not count.
        made: Digests of what the stages before this one made, by name.
    """

    def anonymous(word: str) -> str:
        return word.replace(str(out), "{out}").replace(str(root), "{root}")

    return {
        "command": [anonymous(word) for word in stage.command],
        "config": json.loads(json.dumps(stage.config, sort_keys=True, default=str)),
        "code": {"version": stage.code_version},
        "upstream": {name: made[name] for name in stage.upstream},
        "files": {anonymous(str(path)): input_digest(path) for path in stage.files},
        "libraries": {name: library_version(name) for name in stage.libraries},
    }


def digest(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the parts in one canonical spelling."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def input_digest(path: Path) -> str | None:
    """Return a hash of a file's bytes or of a folder's names, sizes and times; None if missing."""
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return None
    total = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if not entry.is_dir()):
        status = file.stat() if file.exists() else file.lstat()  # a link that leads nowhere
        entry = (file.relative_to(path).as_posix(), status.st_size, status.st_mtime_ns)
        total.update(repr(entry).encode())
    return total.hexdigest()


def product_digest(stage: Stage, out: Path) -> str:
    """Return a hash of the bytes that a finished stage made."""
    total = hashlib.sha256()
    for name in stage.products or stage.outputs:
        path = out / name
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        for file in files:
            total.update(file.relative_to(out).as_posix().encode() + b"\0")
            total.update(sha256_of(file).encode())
    return total.hexdigest()


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say what differs between two fingerprints' parts."""
    changes = []
    for part, word in _PART_NAMES.items():
        before, after = dotted(old.get(part) or {}), dotted(new.get(part) or {})
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                values = f" {before.get(key)} -> {after.get(key)}"
                is_hash = part in ("upstream", "files")
                changes.append(f"{word} {key}" + ("" if is_hash else values))
    if not changes and old.get("command") != new.get("command"):
        changes.append("command")
    if not changes:
        return "changed"
    rest = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return "changed: " + ", ".join(changes[:3]) + rest


# -- the record of a run's folder -----------------------------------------------------------------


class StageStore:
    """`stages.json`: the record of every stage of one run's folder; each change is written at once.

    `update` may be called from several threads.
    """

    def __init__(self, out: Path) -> None:
        """Read `out/stages.json`, or start an empty record.

        Raises:
            UserError: If the file is there but is not such a record.
        """
        self.path = out / "stages.json"
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

    def check_name(self, name: str) -> None:
        """Raise UserError if the folder holds a run of another pipeline."""
        held = self.data["name"]
        if held not in (None, name):
            raise UserError(
                f"{self.path.parent} holds a run of the pipeline {held!r}, not {name!r}; "
                "choose another --out"
            )

    def open_run(self, name: str, **facts: Any) -> None:
        """Note the pipeline's name and what is known about this call.

        Raises:
            UserError: If the folder holds a run of another pipeline.
        """
        self.check_name(name)
        self.data |= {"name": name, **facts, "called": now()}
        self.write()

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
    """Hold the lock of a run's folder, which is made; yields its file descriptor.

    Stages inherit the descriptor, so that the folder stays locked while a stage of a killed run
    is still going on.

    Raises:
        UserError: If another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_SECONDS
        while not lock_file(descriptor, out):
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            # Without its owner, the lock is held by a stage of a killed run, which is just ending.
            if _is_alive(owner) or time.monotonic() > deadline:
                raise UserError(
                    f"another run is going on in {out} (process {owner or 'unknown'}); "
                    "wait for it, stop it, or choose another --out"
                )
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield descriptor
    finally:
        os.close(descriptor)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
