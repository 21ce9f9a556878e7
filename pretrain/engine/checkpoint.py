"""Checkpoints of a run: what they hold, how they are written beside the training, and read again.

A checkpoint is a dict of plain types and tensors with a checksum (schema in docs/files.md),
written atomically and read as plain data (``common.checkpoints``).
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from common import checkpoints
from common.checkpoints import FORMAT, checksum
from common.config import dotted
from common.errors import RunFailed, UserError
from common.files import sync, write_atomically
from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.data.input_pipeline import BAD_SAMPLES, DeviceBatch
from pretrain.engine.optim import state_bytes
from pretrain.engine.trainer import Callback, StepResult

NAME = "checkpoint.pth"
FIELDS = (
    "format", "arch", "preprocessing", "model", "ema", "optimizer", "schedule", "queue",
    "negatives", "random", "position", "config", "step", "versions",
)  # fmt: skip


class NonFiniteLossError(RunFailed):
    """Loss, gradients or weights are NaN or infinite: going on would only destroy the weights.

    Args:
        what: What was seen, and at which step.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; the last checkpoint, if there is one, holds an earlier state. Lower "
            "optim.base_lr or lengthen optim.warmup_epochs"
        )


# -- the file --


def save(state: dict[str, Any], path: Path) -> None:
    """Write plain types and tensors, with a checksum: ``path`` is always a whole checkpoint.

    Raises:
        DiskFullError: If the disk is full; the message says what to free and how to go on.
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
    state = checkpoints.read(path)
    if not checkpoints.is_ours(state):
        raise UserError(
            f"{path} is not a checkpoint of format {FORMAT!r}; only a run of tools/pretrain.sh "
            "can be resumed"
        )
    missing = sorted(set(FIELDS) - set(state))
    if missing:
        raise UserError(f"checkpoint {path} lacks {missing}; it is damaged: start again")
    return state


def is_in(folder: Path) -> bool:
    """Whether a run has left a checkpoint in its folder."""
    return (folder / NAME).exists() or any((folder / "checkpoints").glob("step-*.pth"))


def load_newest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The newest whole checkpoint of a run.

    Returns:
        Its state, and what the user should know if it is not the last that was written.

    Raises:
        UserError: If none is whole; the message says what is wrong with the last one.
    """
    try:
        return load(folder / NAME), None
    except UserError as error:
        first = error
    for older in sorted((folder / "checkpoints").glob("step-*.pth"), reverse=True):
        try:
            state = load(older)
        except UserError:
            continue
        return state, f"{first}. Going on from {older} (step {state['step']}) instead"
    raise UserError(f"{first}. No older checkpoint is whole: start again") from first


class Checkpoints(Callback):
    """Writes one checkpoint at a time while the steps go on; the first process does so.

    The state is copied in memory before ``save`` returns, so that it costs a step that copy and a
    second state in memory. What goes wrong in the thread is raised by the next call.

    Args:
        folder: The run's folder.
        config: ``keep_checkpoints`` and ``keep_every_steps``.
        optimizer: Its weights must be finite in a checkpoint. None: nothing is looked at.
    """

    def __init__(
        self, folder: Path, config: EngineConfig, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._path, self._config, self._optimizer = folder / NAME, config, optimizer
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        """Refuse to start where the checkpoints of this run cannot fit.

        Raises:
            UserError: Naming what is needed and what is free.
        """
        size, optimizer = num_bytes(self.trainer.state_dict()), self._optimizer
        if optimizer is not None and not optimizer.state:  # it comes with the first step
            size += state_bytes(optimizer)
        files = [file.stat() for file in self._path.parent.glob("**/*.pth")]
        there = sum({file.st_ino: file.st_size for file in files}.values())  # links count once
        # Those that are kept, and the one being written.
        needed = size * (max(self._config.keep_checkpoints, 1) + 1)
        free = shutil.disk_usage(self._path.parent).free
        if free + there < needed:
            raise UserError(
                f"{self._path.parent}: checkpoints need {needed / 1e6:,.0f} MB "
                f"({size / 1e6:,.0f} MB each), only {free / 1e6:,.0f} MB are free; free some "
                "space, choose another out=DIR, or lower engine.keep_checkpoints"
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever ends the run, a checkpoint that was begun is finished."""
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def on_step_end(self, batch: DeviceBatch, result: StepResult) -> None:
        """At its interval."""
        if self.trainer.is_saved(self.trainer.position.step):
            self.save()

    def on_epoch_end(self) -> None:
        """After the last one, when the probe has written its row."""
        if self.trainer.position.epoch == self.trainer.num_epochs:
            self.save()

    def save(self, *, waits: bool = False) -> None:
        """Write the checkpoint of the present step.

        Raises:
            NonFiniteLossError: If the weights are not finite; the checkpoint before stays.
            DiskFullError: If the one before did not fit, or this one, where it is waited for.
        """
        if dist.rank() != 0:
            return
        state, step = self.trainer.state_dict(), self.trainer.position.step
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        if not all(bool(w.isfinite().all()) for group in groups for w in group["params"]):
            raise NonFiniteLossError(f"weights are no longer finite at step {step}")
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(copied(state), step))
        self._thread.start()
        if waits:
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk.

        Raises:
            DiskFullError: If it did not fit.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, state: dict[str, Any], step: int) -> None:
        try:
            for name in ("metrics.jsonl", BAD_SAMPLES):  # what a resumed run will not write again
                sync(self._path.with_name(name))
            save(state, self._path)
            keep(self._path, step, self._config.keep_checkpoints, self._config.keep_every_steps)
        except BaseException as error:  # raised again in the training's thread
            self._error = error


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
    own = (file for file in folder.glob("step-*.pth") if file.stem[5:].isdecimal())  # not a copy
    passing = [file for file in own if not stays(int(file.stem[5:]))]
    for old in sorted(passing, reverse=True)[num_kept:]:
        old.unlink()


def copied(value: Any) -> Any:
    """The same nested value with its tensors copied to the CPU."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested value."""
    if isinstance(value, dict | list | tuple):
        return sum(map(num_bytes, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def different_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted keys at which two configs differ, with both values."""
    left, right = dotted(a), dotted(b)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left | right)
        if left.get(key) != right.get(key)
    ]
