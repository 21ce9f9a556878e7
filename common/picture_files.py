"""Files, folders and globs that a user names, and work on them in threads, in order."""

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.errors import UserError, no_such_file
from common.files import is_below

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SourceFile:
    """A file to open; `is_named` if the user gave it, and no folder or glob."""

    path: Path
    is_named: bool


def find_files(
    given: Sequence[str], out: Path, is_passed_over: Callable[[Path], bool] | None = None
) -> list[SourceFile]:
    """Files, those below folders (by name), and those that globs match; each once.

    Hidden files and what lies in `out` are passed over.

    Args:
        given: Files, folders and globs.
        out: Folder or file that the program writes.
        is_passed_over: Whether a folder below a given one is passed over, too.
    Raises:
        UserError: If one is missing, lies in `out`, or nothing is found.
    """
    out = out.resolve()
    found: dict[str, SourceFile] = {}
    for text in given:
        paths, is_glob = [Path(text)], False
        if not paths[0].exists():
            is_glob = True
            paths = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        if not paths:
            kind = "file or folder, and no glob that matches"
            raise UserError(no_such_file(text, "check the path", kind))
        for path in paths:
            if is_below(path, out):
                raise UserError(f"{path}: lies in --out {out}; choose another --out")
            is_named = not is_glob and not path.is_dir()
            files = _below(path, out, is_passed_over, set()) if path.is_dir() else [path]
            for file in files:
                found.setdefault(os.path.abspath(file), SourceFile(file, is_named))
    if not found:
        raise UserError(f"{', '.join(given)}: holds no file; give pictures, or folders with some")
    return list(found.values())


def _below(
    folder: Path, out: Path, is_passed_over: Callable[[Path], bool] | None, visited: set[Path]
) -> Iterator[Path]:
    """Files below a folder by name, links followed, no folder twice on the way."""
    place = folder.resolve()
    is_over = bool(visited) and is_passed_over is not None and is_passed_over(folder)
    if place in visited or place == out or is_over:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__MACOSX":
            continue
        if path.is_dir():
            yield from _below(path, out, is_passed_over, visited | {place})
        else:
            yield path


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Iterator[Result]:
    """The results of `work`, in the order of `items`, a few ahead in threads."""
    waiting = deque[Future[Result]]()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
