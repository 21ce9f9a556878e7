"""A stage of an experiment, the key of its result, and the records of a run's folder."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import dotted
from common.errors import UserError
from common.files import (
    Form,
    has_form,
    read_record_or_none,
    sha256_of,
    walk,
    write_json,
)
from common.provenance import library_version

FORMAT = "fa-stage-2"
RUN_FILE = "experiment.json"
"""What is known of a run as a whole; a folder that holds one is a run's."""
_RUN_FACTS: Form = {"name": str, "dataset": str, "config": dict, "plan": list, "command": list}
"""Older versions may lack some."""


@dataclass(frozen=True)
class Stage:
    """One process of an experiment and everything that its result depends on.

    Attributes:
        name: Of its record and its log; slashes make folders.
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
        resumable: Whether the same command continues an interrupted run of the same key.
        group: Stages of one group may run side by side, each with its share of the cores. Empty:
            runs alone.
        check: Command that checks the stage's whole input and prints what it would do as JSON.
        kind: Of the same kind, stages take about the same time.
        label: In messages, beside the name.
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
    check: tuple[str, ...] = ()
    kind: str = ""
    label: str = ""

    @property
    def title(self) -> str:
        """Name and label."""
        return f"{self.name} ({self.label})" if self.label else self.name

    def key_parts(self, root: Path, out: Path, made: Mapping[str, str | None]) -> dict[str, Any]:
        """Return what the key hashes, part by part, so that a change can be named.

        Args:
            root: The repository; the command's mentions of it do not count.
            out: The run's folder; the command's mentions of it do not count.
            made: Digests of what the stages before this one made, by name.
        """

        def anonymous(word: str) -> str:
            return word.replace(str(out), "{out}").replace(str(root), "{root}")

        return {
            "command": [anonymous(word) for word in self.command],
            "config": json.loads(json.dumps(self.config, sort_keys=True, default=str)),
            "code": {"version": self.code_version},
            "upstream": {name: made[name] for name in self.upstream},
            "files": {anonymous(str(path)): input_digest(path) for path in self.files},
            "libraries": {name: library_version(name) for name in self.libraries},
        }

    def product_digest(self, out: Path) -> str:
        """Return a hash of the bytes that the finished stage made."""
        total = hashlib.sha256()
        for name in self.products or self.outputs:
            path = out / name
            files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
            for file in files:
                total.update(file.relative_to(out).as_posix().encode() + b"\0")
                total.update(sha256_of(file).encode())
        return total.hexdigest()


# -- keys -----------------------------------------------------------------------------------------


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
    for file in walk(path):
        status = file.stat() if file.exists() else file.lstat()  # a link that leads nowhere
        entry = (file.relative_to(path).as_posix(), status.st_size, status.st_mtime_ns)
        total.update(repr(entry).encode())
    return total.hexdigest()


def without_places(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts with the digests of inputs instead of their paths: a moved input is the same."""
    known = {path: value for path, value in parts.get("files", {}).items() if value}

    def placeless(word: str) -> str:
        for path in sorted(known, key=len, reverse=True):
            word = word.replace(path, known[path])
        return word

    files = sorted(known.get(path, path) for path in parts.get("files", {}))
    command = [placeless(word) for word in parts.get("command", ())]
    return {**parts, "command": command, "files": files}


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say what differs between the parts of two keys: at most three settings, inputs, libraries."""
    before, after = dotted(old), dotted(new)
    changes = []
    for key in sorted((before.keys() | after.keys()) - {"command"}):
        if before.get(key) != after.get(key):
            is_hash = key.startswith(("upstream.", "files."))
            changes.append(key if is_hash else f"{key} {before.get(key)} -> {after.get(key)}")
    return f"changed: {', '.join(changes[:3] or ['command'])}" + ", .." * (len(changes) > 3)


# -- the records of a run's folder ----------------------------------------------------------------


class StageStore:
    """`stages/NAME.json` for each stage and `experiment.json`; each change is written at once.

    Attributes:
        run: Content of `experiment.json`: name, plan, config, command, versions ..
        stages: The record of each stage by name.
        damaged: Stages whose record is there but cannot be read; RUN_FILE if that cannot.
    """

    def __init__(self, out: Path) -> None:
        """Read what `out` holds; nothing is written yet.

        Raises:
            UserError: If a record is of another version.
        """
        self.out = out
        self.load()

    def load(self) -> None:
        """Read the files again."""
        self.damaged: set[str] = set()
        self.run: dict[str, Any] = {}
        self.stages: dict[str, dict[str, Any]] = {}
        if (self.out / RUN_FILE).exists():
            self.run = self._read(RUN_FILE, self.out / RUN_FILE, {"format": str}) or {}
        # What is there of the facts of the run has to be of the right kinds.
        there = {key: kind for key, kind in _RUN_FACTS.items() if key in self.run}
        is_sound = has_form(self.run, there) and all(
            isinstance(word, str) for key in ("plan", "command") for word in self.run.get(key, ())
        )
        if not is_sound:
            self.damaged.add(RUN_FILE)
            self.run = {}
        folder = self.out / "stages"
        for path in sorted(folder.rglob("*.json")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if record := self._read(name, path, {"format": str, "status": str}):
                self.stages[name] = record

    def _read(self, name: str, path: Path, form: Form) -> dict[str, Any] | None:
        record = read_record_or_none(path, form)
        if record is None:
            self.damaged.add(name)
        elif record["format"] != FORMAT:
            raise UserError(
                f"{path} is not of this version; move {self.out} away or choose another --out"
            )
        return record

    def open_run(self, name: str, **facts: Any) -> None:
        """Record the experiment's name and what is known about this call."""
        self.run |= {"format": FORMAT, "name": name, **facts, "called": now()}
        write_json(self.out / RUN_FILE, self.run)

    def update(self, stage: str, **facts: Any) -> None:
        """Set facts of a stage and write its file if something changes."""
        old = self.stages.get(stage, {})
        new = {"format": FORMAT} | old | facts
        if new != old:
            self.stages[stage] = new
            write_json(self.out / "stages" / f"{stage}.json", new)


def read_run(out: Path) -> dict[str, Any]:
    """Content of `experiment.json`, and `stages`: the record of each stage; empty without a run.

    Raises:
        UserError: If `experiment.json` is damaged.
    """
    store = StageStore(out)
    if RUN_FILE in store.damaged:
        raise UserError(f"{out / RUN_FILE}: is damaged; the command of this run writes it anew")
    return store.run | {"stages": store.stages, "damaged": sorted(store.damaged)}


def now() -> str:
    """Return the time of day with the zone, to the second."""
    return datetime.datetime.now(datetime.UTC).astimezone().isoformat(timespec="seconds")
