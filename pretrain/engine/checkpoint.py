"""Checkpoints of a run: what they hold, how they are written beside the training, and read again.

A checkpoint is a dict of plain types and tensors with a checksum (schema in docs/architecture.md),
written atomically and read with ``weights_only=True``.
"""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import provenance
from common.checkpoints import FORMAT, check_sum, checksum
from common.config import to_plain
from common.errors import UserError
from common.files import write_atomically
from pretrain.config import EngineConfig, PretrainConfig
from pretrain.engine.optim import load_state
from pretrain.model.joint_embedding import FAContrastive

NAME = "checkpoint.pth"
FIELDS = (
    "format", "arch", "preprocessing", "model", "ema", "optimizer", "scaler", "schedule", "queue",
    "negatives", "random", "position", "config", "step", "versions",
)  # fmt: skip
# May change when a run goes on: they decide no gradient, or its rounding only.
NOT_COMPARED = ("out", "engine", "eval", "tracking")
ENGINE_COMPARED = {"batch_norm": "per_process"}  # but for these; values of older checkpoints
# Where the shards lie, and how they are read; that they are the same is seen by their fingerprint.
DATA_NOT_COMPARED = (
    "shards", "num_workers", "cache_dir", "cache_gb", "read_retries", "read_timeout_seconds",
)  # fmt: skip


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


def load_newest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The newest whole checkpoint of a run.

    Returns:
        Its state, and what the user should know if it is not the last that was written.

    Raises:
        UserError: If none is whole; the message is that of the last one.
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
    raise first


class CheckpointSaver:
    """Writes one checkpoint at a time while the steps go on.

    The state is copied in memory before ``save`` returns, so that it costs a step that copy and a
    second state in memory. What goes wrong in the thread is raised by the next call.

    Args:
        folder: The run's folder.
        config: ``keep_checkpoints``, ``keep_every_steps``, and ``async_checkpoints`` (false writes
            before ``save`` returns).
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self._path, self._config = folder / NAME, config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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
        # Those that are kept, and the one being written.
        needed = size * (max(self._config.keep_checkpoints, 1) + 1)
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
        if self._config.async_checkpoints:
            arguments = (copied(state), step)
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()
        else:
            self._write(state, step)
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk.

        Raises:
            DiskFullError: If it did not fit.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, state: dict[str, Any], step: int) -> None:
        try:
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
    passing = [f for f in sorted(folder.glob("step-*.pth")) if not stays(int(f.stem[5:]))]
    for old in passing[: max(0, len(passing) - num_kept)]:
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


# -- the state of a run --


@dataclass
class Position:
    """Where the run stands.

    Attributes:
        step: Finished steps, those that were left out included.
        epoch: Finished epochs.
        step_in_epoch: Finished steps of the epoch that has begun.
        num_bad_samples: Pictures that were replaced, in all processes.
        num_skipped_steps: Steps left out since loss or gradients were not finite.
        num_overflow_steps: Steps left out since the loss scale of fp16 was too high.
        train_seconds: Time spent in steps and in waiting for data.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    num_bad_samples: int = 0
    num_skipped_steps: int = 0
    num_overflow_steps: int = 0
    train_seconds: float = 0.0


@dataclass(frozen=True)
class RunState:
    """Everything that the next step of a run depends on, to and from a checkpoint.

    Attributes:
        config: Of the run.
        model: Its weights, EMA and queues.
        optimizer: Its state.
        num_steps: Steps that the run has in all.
        data_fingerprint: Which samples the run sees; None where that cannot be known.
    """

    config: PretrainConfig
    model: FAContrastive
    optimizer: torch.optim.Optimizer
    num_steps: int
    data_fingerprint: str | None = None

    def to_checkpoint(
        self, position: Position, scaler: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Plain types and tensors, not copied.

        Args:
            position: Where the run stands.
            scaler: State of the loss scale; None without one.
        """
        ema, queue, negatives = self.model.ema, self.model.queue, self.model.objective.negatives
        return {
            "format": FORMAT,
            "arch": to_plain(self.config.arch),
            "preprocessing": {
                "mean": list(self.config.data.pixel_mean),
                "std": list(self.config.data.pixel_std),
                "order": "RGB",
            },
            "model": self.model.online.state_dict(),
            "ema": None if ema is None else ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler,
            "schedule": {"num_steps": self.num_steps, "data_fingerprint": self.data_fingerprint},
            "queue": None if queue is None else queue.state_dict(),
            "negatives": None if negatives is None else negatives.state_dict(),
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
            "position": dict(vars(position)),
            "config": to_plain(self.config),
            "step": position.step,
            "versions": provenance.versions(),
        }

    def restore(
        self, state: dict[str, Any], *, allow_changes: bool = False
    ) -> tuple[Position, list[str]]:
        """Bring a freshly built run into the state of a checkpoint.

        Args:
            state: From ``load``.
            allow_changes: Go on with another config or other shards where the weights fit.

        Returns:
            Where the run stands, and the changes that were allowed, a line each.

        Raises:
            UserError: A changed config or changed shards (the differences are shown), or weights
                that do not fit.
        """
        changes = self._changes(state)
        if changes and not allow_changes:
            raise UserError(
                f"the checkpoint was made with another config: {'; '.join(changes)}. Restore "
                "these values to resume, allow them with --allow-changes, or start a new run with "
                "another out=DIR"
            )
        try:
            self.model.online.load_state_dict(state["model"])
            if self.model.ema is not None:
                self.model.ema.load_state_dict(state["ema"])
            if self.model.queue is not None:
                self.model.queue.load_state_dict(state["queue"])
            if self.model.objective.negatives is not None:
                self.model.objective.negatives.load_state_dict(state["negatives"])
            load_state(self.optimizer, state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "the checkpoint does not fit this config "
                f"({'; '.join(changes) or 'no change seen'}): {' '.join(str(error).split())[:200]}"
            ) from error
        torch.set_rng_state(state["random"]["torch"])
        if torch.cuda.is_available():  # perhaps with fewer devices than before
            for device, cuda_state in enumerate(
                state["random"]["cuda"][: torch.cuda.device_count()]
            ):
                torch.cuda.set_rng_state(cuda_state, device)
        position = Position(**state["position"])
        if changes:
            steps_per_epoch = self.num_steps // self.config.optim.epochs
            position.epoch, position.step_in_epoch = divmod(position.step, steps_per_epoch)
        return position, changes

    def _changes(self, state: dict[str, Any]) -> list[str]:
        """What differs from the run that the checkpoint was made by, a line each."""

        def compared(plain: dict[str, Any]) -> dict[str, Any]:
            data = {k: v for k, v in plain["data"].items() if k not in DATA_NOT_COMPARED}
            engine = {k: plain["engine"].get(k, old) for k, old in ENGINE_COMPARED.items()}
            others = {k: v for k, v in plain.items() if k not in NOT_COMPARED}
            return others | {"data": data, "engine": engine}

        changes = different_keys(compared(state["config"]), compared(to_plain(self.config)))
        schedule = state["schedule"]
        if schedule["num_steps"] != self.num_steps and not changes:
            changes.append(
                f"it was made for {schedule['num_steps']} steps, the shards now give "
                f"{self.num_steps}"
            )
        known = schedule.get("data_fingerprint")
        if (
            known is not None
            and self.data_fingerprint is not None
            and known != self.data_fingerprint
        ):
            changes.append("data.shards: other shards, or other weights of them")
        return changes


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
