"""What a stage is a function of, as hashes: settings, inputs, code and library versions."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import dotted
from common.files import sha256_of
from common.provenance import library_version


def source_files(root: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files that the globs match and every file of the repository that they import.

    Args:
        root: The repository.
        patterns: Globs relative to it: programs, and files that they read as they are.
    """
    todo = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        found.add(path)
        if path.suffix == ".py":
            todo |= set(imported_files(root, path)) - found
    return sorted(found)


@functools.cache
def imported_files(root: Path, path: Path) -> tuple[Path, ...]:
    """Return the files of the repository that a Python file imports, wherever in it."""
    with contextlib.suppress(SyntaxError, ValueError):
        tree = ast.parse(path.read_bytes())
        names = {name for node in ast.walk(tree) for name in _imported_names(node)}
        return tuple({file for name in names for file in _module_files(root, name)})
    return ()


@functools.cache
def source_digest(path: Path) -> str:
    """Return a hash of what a source file does.

    Python counts by its syntax tree without docstrings, so that a comment or a reformatting does
    not cost hours of training; every other file counts by its bytes.
    """
    data = path.read_bytes()
    if path.suffix == ".py":
        with contextlib.suppress(SyntaxError, ValueError):  # Not Python after all: bytes count.
            data = _code_without_docstrings(data).encode()
    return hashlib.sha256(data).hexdigest()


def _imported_names(node: ast.AST) -> Iterator[str]:
    """Yield dotted names; `from a import b` may mean the module a.b, so both are yielded."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_files(root: Path, name: str) -> Iterator[Path]:
    """Yield the files that importing a module runs: its packages' and its own."""
    folder = root
    for part in name.split("."):
        for file in (folder / f"{part}.py", folder / part / "__init__.py"):
            if file.is_file():
                yield file
        folder = folder / part


def _code_without_docstrings(data: bytes) -> str:
    tree = ast.parse(data)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@dataclass(frozen=True)
class Stage:
    """One process of the pipeline and everything that its result depends on.

    Attributes:
        name: Name in `stages.json` and of the log; slashes make folders.
        command: Argument list; never passed to a shell.
        outputs: Paths relative to the run's folder that must exist when the stage is finished.
        owns: Paths relative to the run's folder that are removed before a fresh start.
        products: Paths relative to the run's folder whose bytes count for the stages that read this
            one; `outputs` if empty. A stage that runs again and makes the same changes nothing.
        upstream: Names of the stages that this one reads.
        files: Inputs from outside: files count by content, folders by their listing.
        config: The settings that this stage sees.
        sources: Globs relative to the repository: the programs that the stage runs (what they
            import follows) and files that these read.
        libraries: Distributions whose versions count.
        resumable: Whether an interrupted run of the same fingerprint is continued in place.
        resume_arguments: What is appended to `command` to continue.
        group: Neighbours in the list with the same group may run side by side; they do not read
            each other. Empty: runs alone.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]
    owns: tuple[str, ...]
    products: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    resumable: bool = False
    resume_arguments: tuple[str, ...] = ()
    group: str = ""


def fingerprint_parts(
    stage: Stage, root: Path, out: Path, upstream: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return what the fingerprint hashes, part by part, so that a change can be named.

    Args:
        stage: The stage.
        root: The repository; the command's mentions of it do not count.
        out: The run's folder; the command's mentions of it do not count.
        upstream: What the stages before this one made, by name: digests of their products.
    """
    return {
        "command": [_anonymous(word, root, out) for word in stage.command],
        "config": json.loads(json.dumps(stage.config, sort_keys=True, default=str)),
        "upstream": {name: upstream[name] for name in stage.upstream},
        "files": {_anonymous(str(path), root, out): input_digest(path) for path in stage.files},
        "sources": {
            path.relative_to(root).as_posix(): source_digest(path)
            for path in source_files(root, stage.sources)
        },
        "libraries": {name: library_version(name) for name in stage.libraries},
    }


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


def digest(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the parts in one canonical spelling."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return in words what differs between two sets of parts."""
    kinds = {
        "config": "setting",
        "upstream": "what was made by",
        "files": "input",
        "sources": "code",
        "libraries": "library",
    }
    changes = []
    for part, word in kinds.items():
        before, after = dotted(old.get(part) or {}), dotted(new.get(part) or {})
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                values = f" {before.get(key)} -> {after.get(key)}"
                shown = values if part in ("config", "libraries") else ""
                changes.append(f"{word} {key}{shown}")
    if not changes and old.get("command") != new.get("command"):
        changes.append("command")
    if not changes:
        return "changed"
    rest = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return "changed: " + ", ".join(changes[:3]) + rest


@functools.cache
def input_digest(path: Path) -> str | None:
    """Return a hash of a file's bytes or of a folder's names, sizes and times; None if missing."""
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return None
    total = hashlib.sha256()
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            status = file.stat() if file.exists() else file.lstat()
            entry = (file.relative_to(path).as_posix(), status.st_size, status.st_mtime_ns)
            total.update(repr(entry).encode())
    return total.hexdigest()


def forget_digests() -> None:
    """Drop what was remembered about files; called at the start of every run."""
    forget_sources()
    for cached in (input_digest, library_version):
        cached.cache_clear()


def forget_sources() -> None:
    """Drop what was remembered about code, which may change while a run goes on."""
    for cached in (source_digest, imported_files):
        cached.cache_clear()


def _anonymous(word: str, root: Path, out: Path) -> str:
    return word.replace(str(out), "{out}").replace(str(root), "{root}")
