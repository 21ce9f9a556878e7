"""Which source files a program runs, and what they do, as hashes."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path


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
