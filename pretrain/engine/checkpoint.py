"""Checkpoints v1: plain types and tensors, written atomically, read with ``weights_only=True``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from common.checkpoints import FORMAT, check_sum, checksum
from common.errors import UserError
from common.files import write_atomically

FIELDS = (
    "format", "arch", "preprocessing", "model", "ema", "optimizer", "scaler", "schedule", "queue",
    "negatives", "random", "position", "config", "step", "versions",
)  # fmt: skip


def save(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` so that ``path`` is always either the old checkpoint or the whole new one.

    A checksum of the state goes with it.

    Raises:
        DiskFullError: If the disk is full; the message says what to free and how to go on.
    """
    missing = set(FIELDS) - set(state)
    assert not missing, f"checkpoint without {sorted(missing)}"
    write(state, path)


def write(state: dict[str, Any], path: Path) -> None:
    """Write any state of plain types and tensors, with its checksum, whole or not at all.

    Raises:
        DiskFullError: As ``save``.
    """
    state = {**state, "checksum": checksum(state)}
    write_atomically(
        path,
        lambda file: torch.save(state, file),
        remedy="run the same command with --resume: the checkpoint before is whole",
    )


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this format.

    Raises:
        UserError: If the file is missing, damaged, or something else than our checkpoint.
    """
    state = read(path)
    if state.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of format {FORMAT!r}; only a run of tools/pretrain.sh "
            "can be resumed"
        )
    missing = sorted(set(FIELDS) - set(state))
    if missing:
        raise UserError(f"checkpoint {path} lacks {missing}; it is damaged: start again")
    return state


def read(path: Path) -> dict[str, Any]:
    """Read a dict of plain types and tensors, and check its checksum where it has one.

    Raises:
        UserError: If the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); it is damaged or not a "
            "checkpoint of this program. Take an older one from checkpoints/ or start again"
        ) from error
    if not isinstance(state, dict):
        raise UserError(
            f"{path} is not a checkpoint of format {FORMAT!r}: it holds a {type(state).__name__}"
        )
    check_sum(state, path)
    return state


def keep(path: Path, step: int, num_kept: int, kept_every_steps: int = 0) -> None:
    """Keep the newest checkpoints as hard links (or copies) in ``checkpoints/``.

    Args:
        path: The newest.
        step: Its step.
        num_kept: How many stay.
        kept_every_steps: Those at multiples of this step stay besides; 0: none.
    """

    def stays(number: int) -> bool:
        return kept_every_steps > 0 and number % kept_every_steps == 0

    if num_kept == 0 and not stays(step):
        return
    folder = path.parent / "checkpoints"
    folder.mkdir(exist_ok=True)
    target = folder / f"step-{step:08d}.pth"
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)
    passing = [f for f in sorted(folder.glob("step-*.pth")) if not stays(int(f.stem[5:]))]
    for old in passing[: max(0, len(passing) - num_kept)]:
        old.unlink()


def different_keys(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys at which two configs differ, with both values."""
    lines = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += different_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return lines
