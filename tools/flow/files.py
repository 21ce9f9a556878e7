"""Small file helpers of the pipeline: atomic JSON, tolerant readers, removal inside one folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from tools.flow.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name in the same folder, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; non-finite numbers become null, so that the file stays JSON."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return `value` with every non-finite float, at any depth, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_json(path: Path) -> Any | None:
    """Return the JSON in `path`, or None where the file is missing or does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a torn line (a killed writer's) is left out."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def inside(folder: Path, relative: str) -> Path:
    """Return `folder/relative` after checking that no part of it leads out of `folder`.

    Raises:
        UserError: For an absolute path, a `..`, or a symbolic link among the folders on the way.
    """
    parts = PurePosixPath(relative).parts
    if not parts or PurePosixPath(relative).is_absolute() or ".." in parts:
        raise UserError(f"{relative!r} is not a path below {folder}; give one without '..'")
    path = folder
    for part in parts[:-1]:
        path = path / part
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link, so nothing below it is removed or replaced; "
                "move it away or choose another --out"
            )
    return path / parts[-1]


def remove(folder: Path, relative: str) -> bool:
    """Remove `folder/relative` (file, tree or link, links are not followed); True if it existed."""
    path = inside(folder, relative)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        return False
    return True
