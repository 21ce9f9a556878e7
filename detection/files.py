"""Files that are either whole or absent: written under a temporary name, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".partial"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        path: Final name; its folder is made.
        write: Called with a binary file that is open for writing.

    Raises:
        OSError: If the disk is full or the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError | RuntimeError):  # torch.save raises RuntimeError
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                f"{path} could not be written ({error}); {free / 1e6:.0f} MB are free there: make "
                "room and run the same command again, it goes on from the last checkpoint"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, two spaces deep, keys in the order they were given."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that a kill cut off is left out.

    Returns:
        The rows, empty if there is no such file.
    """
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def remove_partial_files(folder: Path) -> None:
    """Delete what killed writers left behind."""
    for partial in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
