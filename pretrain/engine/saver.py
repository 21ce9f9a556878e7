"""Checkpoints written beside the training: a copy of the state is taken, a thread writes it."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from common.errors import UserError
from pretrain.engine import checkpoint

NAME = "checkpoint.pth"


class CheckpointSaver:
    """Writes one checkpoint at a time while the steps go on.

    The state is copied in memory before ``save`` returns, so that it costs a step that copy and a
    second state in memory. What goes wrong in the thread is raised by the next call.

    Args:
        folder: The run's folder.
        num_kept: How many of the newest checkpoints stay in ``checkpoints/``.
        kept_every_steps: Checkpoints at multiples of this step stay for good; 0: none.
        in_background: False writes before ``save`` returns.
    """

    def __init__(
        self, folder: Path, *, num_kept: int, kept_every_steps: int, in_background: bool
    ) -> None:
        self._path = folder / NAME
        self._num_kept, self._kept_every_steps = num_kept, kept_every_steps
        self._in_background = in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Whatever ends the run, a checkpoint that was begun is finished."""
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def check_space(self, state: dict[str, Any]) -> None:
        """Refuse to start where the checkpoints of this run cannot fit.

        Raises:
            UserError: Naming what is needed and what is free.
        """
        size = num_bytes(state)
        files = [file.stat() for file in self._path.parent.glob("**/*.pth")]
        there = sum({file.st_ino: file.st_size for file in files}.values())  # links count once
        needed = size * (max(self._num_kept, 1) + 1)  # the kept ones, and the one being written
        free = shutil.disk_usage(self._path.parent).free
        if free + there < needed:
            raise UserError(
                f"{self._path.parent}: checkpoints need {needed / 1e6:,.0f} MB "
                f"({size / 1e6:,.0f} MB each), only {free / 1e6:,.0f} MB are free; free some "
                "space, choose another out=DIR, or lower engine.keep_checkpoints"
            )

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write a state; waits for the one before.

        Raises:
            DiskFullError: If this one or the one before did not fit.
        """
        self.wait()
        if not self._in_background:
            self._write(state, step)
            self._raise()
            return
        copy = copied(state)
        self._thread = threading.Thread(target=self._write, args=(copy, step), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk.

        Raises:
            DiskFullError: If it did not fit.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, state: dict[str, Any], step: int) -> None:
        try:
            checkpoint.save(state, self._path)
            checkpoint.keep(self._path, step, self._num_kept, self._kept_every_steps)
        except BaseException as error:  # raised again in the training's thread
            self._error = error


def copied(value: Any) -> Any:
    """The same nested value with its tensors copied to the CPU."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested value."""
    if isinstance(value, dict):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(num_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def load_newest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The newest whole checkpoint of a run.

    Returns:
        Its state, and what to tell if it is not the last that was written.
    Raises:
        UserError: If none is whole; the message is that of the last one.
    """
    path = folder / NAME
    try:
        return checkpoint.load(path), None
    except UserError as error:
        first = error
    for older in sorted((folder / "checkpoints").glob("step-*.pth"), reverse=True):
        try:
            state = checkpoint.load(older)
        except UserError:
            continue
        return state, f"{first}. Going on from {older} (step {state['step']}) instead"
    raise first
