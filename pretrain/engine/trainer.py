"""The training loop: a ``Task`` is trained, ``Callback``s do everything beside its steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from common import provenance
from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.data.input_pipeline import DeviceBatch


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: Finished steps, those that were left out included.
        epoch: Finished epochs.
        step_in_epoch: Finished steps of the epoch that has begun.
        num_bad_samples: Pictures that were replaced, in all processes.
        num_overflow_steps: Steps left out since the loss scale of fp16 was too high.
        train_seconds: Time spent in steps and in waiting for data.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    num_bad_samples: int = 0
    num_overflow_steps: int = 0
    train_seconds: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """What one step of a task leaves to look at.

    Attributes:
        loss: Of this process's samples, without graph.
        figures: For the row of a logged step, in the first process.
        histograms: For a row of kind ``similarity``, at some of the logged steps.
        has_overflowed: The update was left out since gradients were too large for fp16.
        output: For callbacks that know the task.
    """

    loss: Tensor
    figures: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, list[float]] = field(default_factory=dict)
    has_overflowed: bool = False
    output: Any = None


class Task(Protocol):
    """What is trained: weights, their optimiser, and one step of it."""

    def step(
        self, batch: Any, position: Position, *, is_logged: bool, is_saved: bool
    ) -> StepResult:
        """Forward, loss, backward, update.

        Args:
            batch: This process's part.
            position: Before the step; only read.
            is_logged: The result's figures will be written.
            is_saved: A checkpoint follows.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its entries of the checkpoint: plain types and tensors, not copied."""
        ...

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool) -> list[str]:
        """Go on from a checkpoint; returns the changes of the config that were allowed.

        Raises:
            UserError: If the checkpoint does not belong to this task.
        """
        ...


class Batches(Protocol):
    """Where batches come from; ``num_steps`` of them make an epoch.

    Of this process's part of a batch the loop reads ``labels`` (how many they are), ``num_bad``
    (samples that stand in for bad ones) and ``waited`` (seconds until it was there).
    """

    num_steps: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        """Batches ``start_step`` .. of an epoch."""
        ...

    def close(self) -> None:
        """End what prepares them."""
        ...


class Callback:
    """What a run does beside its steps. Each method does nothing unless a subclass says otherwise.

    A callback is also a context in which the steps run. Every process has its own list of
    callbacks; a collective operation in a callback needs that callback in all of them.

    Attributes:
        trainer: The run that it belongs to; ``Trainer`` sets it.
    """

    trainer: Trainer[Any]

    def __enter__(self) -> Callback:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def on_start(self) -> None:
        """Before the first step; not in a run that is resumed."""

    def on_epoch_start(self) -> None:
        """Before the first batch of an epoch is read."""

    def on_step_start(self) -> None:
        """When the batch has come."""

    def on_step_end(self, batch: DeviceBatch, result: StepResult) -> None:
        """After a step, also one that was left out; the position is already the next one."""

    def figures(self) -> dict[str, float]:
        """What the row of a logged step holds besides; called in the first process only."""
        return {}

    def on_epoch_end(self) -> None:
        """After the last step of an epoch."""

    def on_end(self) -> None:
        """After the last epoch, when all contexts are closed: the last checkpoint is written."""

    def state_dict(self) -> dict[str, Any]:
        """Entries of the checkpoint that this callback adds, of plain types and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a checkpoint; returns what the user should know, if anything."""


AnyTask = TypeVar("AnyTask", bound=Task)


class Trainer(Generic[AnyTask]):
    """Epochs of steps of a task.

    Args:
        task: What is trained.
        batches: What it is trained on.
        callbacks: Called in this order; their contexts close in the opposite one.
        num_epochs: Of the whole run.
        engine: ``log_every_steps`` and ``checkpoint_every_steps``.
        device: Of the task.
    """

    def __init__(
        self,
        task: AnyTask,
        batches: Batches,
        callbacks: Sequence[Callback],
        num_epochs: int,
        engine: EngineConfig,
        device: torch.device,
    ) -> None:
        self.task, self.batches, self.callbacks, self.device = task, batches, callbacks, device
        self._is_cuda = device.type == "cuda"
        self.num_epochs, self.num_steps = num_epochs, num_epochs * batches.num_steps
        self._engine = engine
        self._num_new_bad_samples = 0  # of this process, not yet in the sum over all
        self.position = Position()
        for callback in callbacks:
            callback.trainer = self

    def train(self) -> None:
        """Run to the end of the last epoch.

        Raises:
            UserError, RunFailed, StoppedBySignal: What a callback or the task raises.
        """
        position = self.position
        with contextlib.ExitStack() as stack:
            # The log is opened, signal handlers are set; at the end, or after an error, all close.
            for callback in self.callbacks:
                stack.enter_context(callback)
            if position.step == 0:
                for callback in self.callbacks:
                    callback.on_start()
            # A resumed run begins in the middle of its epoch.
            while position.epoch < self.num_epochs:
                for callback in self.callbacks:
                    callback.on_epoch_start()
                for batch in self.batches.epoch(position.epoch, position.step_in_epoch):
                    self.step(batch)
                position.epoch += 1
                position.step_in_epoch = 0
                for callback in self.callbacks:
                    callback.on_epoch_end()
        for callback in self.callbacks:
            callback.on_end()

    def step(self, batch: DeviceBatch) -> StepResult:
        """One step of the task, and what follows it."""
        position, started = self.position, time.perf_counter()
        for callback in self.callbacks:
            callback.on_step_start()
        is_logged, is_saved = self.is_logged(position.step + 1), self.is_saved(position.step + 1)
        result = self.task.step(batch, position, is_logged=is_logged, is_saved=is_saved)
        # Where the run stands now.
        position.step += 1
        position.step_in_epoch += 1
        position.num_overflow_steps += result.has_overflowed
        position.train_seconds += time.perf_counter() - started + batch.waited
        # Several processes sum only where they wait for each other anyway.
        self._num_new_bad_samples += batch.num_bad
        if is_logged or is_saved or not dist.is_on():
            position.num_bad_samples += int(dist.total_of(self._num_new_bad_samples, self.device))
            self._num_new_bad_samples = 0
        # The row, the alarm, the end if a signal asks for it, the checkpoint.
        for callback in self.callbacks:
            callback.on_step_end(batch, result)
        return result

    def is_logged(self, step: int) -> bool:
        """Whether a row is written after so many steps, and processes wait for each other."""
        return step % self._engine.log_every_steps == 0 or step == self.num_steps

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps; the last one follows the last epoch."""
        return step % self._engine.checkpoint_every_steps == 0

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint of the present step: plain types and tensors, not copied."""
        state = self.task.state_dict() | {
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": [torch.cuda.get_rng_state(self.device)] if self._is_cuda else [],
            },
            "position": dict(vars(self.position)),
            "step": self.position.step,
            "versions": provenance.versions(),
        }
        for callback in self.callbacks:
            state |= callback.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Go on from a checkpoint.

        Args:
            state: From ``state_dict``.
            allow_changes: Even with another config or other shards, where the weights fit.

        Returns:
            What the user should know, a line each.

        Raises:
            UserError: If the checkpoint does not belong to this run.
        """
        changes = self.task.load_state_dict(state, allow_changes=allow_changes)
        torch.set_rng_state(state["random"]["torch"])
        if self._is_cuda and state["random"]["cuda"]:  # the first process's, which all draw alike
            torch.cuda.set_rng_state(state["random"]["cuda"][0], self.device)
        known = vars(Position())  # older versions counted more
        position = Position(**{key: state["position"].get(key, known[key]) for key in known})
        self.position = position
        if changes:  # perhaps epochs of another length
            position.epoch, position.step_in_epoch = divmod(position.step, self.batches.num_steps)
        notes = [f"going on with a changed config: {line}" for line in changes]
        notes += [callback.load_state_dict(state) or "" for callback in self.callbacks]
        return [note for note in notes if note]
