"""What keeps a run from harm: values that are not finite, collapse, signals, hangs, no memory.

docs/running.md says what each guard looks at, when, and what it costs.
"""

from __future__ import annotations

import faulthandler
import math
import signal
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import RunFailed, StoppedBySignal
from common.files import write_json
from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.data.input_pipeline import DeviceBatch
from pretrain.data.loader import SIGNALS, ViewBatch
from pretrain.engine.checkpoint import Checkpoints, NonFiniteLossError
from pretrain.engine.run_folder import ProgressLog
from pretrain.engine.trainer import Callback, Position, StepResult
from pretrain.model.joint_embedding import FAContrastive

FOLDER = "nonfinite"
FORMAT = "fa-nonfinite-1"
STDERR = 2  # file descriptor: faulthandler cannot write to a stream that a test has replaced
_SAMPLE_KEYS = ("sample_ids", "repeats", "sample_hashes")
_NONE = 1 << 62  # later than any step
_ROOM = 4  # the rank is judged where batch and width leave room for so many times the alarm's
# A cluster signals all processes of a job, torchrun passes on what it got: one request, echoed.
_ECHO_SECONDS = 5.0


class NonFiniteGuard:
    """Looks at loss and gradients between the backward pass and the update.

    It looks at every step of a single process on a CPU, elsewhere at the steps that are logged or
    saved, so that a GPU is not waited for. The first step that was not finite is known exactly in
    either case. All processes decide alike.

    In fp16 it looks at every step: gradients that are too large for the loss scale lower the scale,
    and the update is left out.

    Args:
        config: ``precision`` and ``min_loss_scale``.
        folder: The run's folder.
        model: Of the gradients.
        device: Where steps run.
    Attributes:
        scaler: Of the loss. Starts at 65,536, halves at an overflow, doubles after 2,000 steps
            without; the identity but in fp16.
    """

    def __init__(
        self, config: EngineConfig, folder: Path, model: FAContrastive, device: torch.device
    ) -> None:
        self._folder, self._device, self._min_scale = folder, device, config.min_loss_scale
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._is_always_due = device.type == "cpu" and not dist.is_on()
        self._parameters = list(model.online.parameters())
        # Steps that were not looked at yet: number from 1 on, what says which samples they took
        # (not their pictures), and float64 [2]: loss of the local rows, norm of all gradients.
        self._seen: list[tuple[int, dict[str, Tensor], Tensor]] = []

    @torch.no_grad()
    def check(
        self,
        samples: ViewBatch,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        position: Position,
        *,
        is_due: bool,
    ) -> bool:
        """After the backward pass; gradients become those of the loss without its scale.

        Args:
            samples: This process's part of the batch.
            loss: Of this process's rows, without graph.
            optimizer: Of the parameters.
            position: Before this step; only read.
            is_due: The device is waited for at this step anyway: it is logged or saved.

        Returns:
            Whether the update must be left out, since gradients were too large for fp16.

        Raises:
            NonFiniteLossError: Loss or gradients are not finite, and the step's batch is on the
                disk; or the loss scale has fallen below its least.
        """
        # The gradients are the same in all processes, so the scale is as well.
        has_overflowed = False
        if self.scaler.is_enabled():
            scale = self.scaler.get_scale()
            self.scaler.unscale_(optimizer)
            self.scaler.update()
            has_overflowed = self.scaler.get_scale() < scale
        # After an overflow the loss alone says whether the step was good.
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = loss.new_zeros(()) if has_overflowed else nn.utils.get_total_norm(gradients)
        figures = torch.stack([loss.double(), norm.double()])
        taken = {key: getattr(samples, key) for key in _SAMPLE_KEYS}
        self._seen.append((position.step + 1, taken, figures))
        if not (self._is_always_due or is_due or has_overflowed):
            return False
        # The first step that was not finite in any process.
        seen, self._seen = self._seen, []
        bad = (~torch.stack([figures for *_, figures in seen]).isfinite().all(dim=1)).tolist()
        first = seen[bad.index(True)][0] if True in bad else _NONE
        if dist.is_on():
            first = -int(dist.highest(torch.tensor(-first, device=self._device)))
        if first == _NONE:
            if has_overflowed and self.scaler.get_scale() < self._min_scale:
                raise NonFiniteLossError(
                    f"the loss scale is {self.scaler.get_scale():g} at step {position.step + 1}, "
                    f"below engine.min_loss_scale ({self._min_scale:g}): gradients are not finite "
                    "in fp16; use engine.precision=bf16 or fp32"
                )
            return has_overflowed
        # That step and its samples in all processes.
        _, taken, figures = next(entry for entry in seen if entry[0] == first)
        figures = dist.gather(figures.unsqueeze(0))
        losses, largest = figures[:, 0].tolist(), float(figures[:, 1].max())
        batch = {key: dist.gather(value).tolist() for key, value in taken.items()}
        file = self._folder / FOLDER / f"step-{first:08d}.json"
        if dist.rank() == 0:
            file.parent.mkdir(exist_ok=True)
            row = {"format": FORMAT, "step": first, "epoch": position.epoch, "loss": losses}
            write_json(file, row | {"gradient_norm": largest} | batch)
        mean = sum(losses) / len(losses)
        what = f"the gradient norm is {largest}" if math.isfinite(mean) else f"the loss is {mean}"
        raise NonFiniteLossError(f"{what} at step {first}; its batch is in {file}")


class CollapseAlarm(Callback):
    """Says once per episode that the features have collapsed, and what it saw.

    A logged row is a sign of collapse if the projections are the same for all samples
    (``feature_std``, 1 for spread features, below ``collapse_std``) or use next to no direction
    (``effective_rank`` below ``collapse_rank``; not judged where n rows of width d can hardly show
    more). ``collapse_patience`` such rows in a row make an episode, any other row ends it.

    The count of rows is no part of a checkpoint: after a resume it starts anew, so that the alarm
    comes late by some rows, and once more for an episode that was reported before.

    Args:
        config: Thresholds, and ``on_collapse``.
        log: Where the event is written.
        checkpoints: Saves before the run ends.
    """

    def __init__(self, config: EngineConfig, log: ProgressLog, checkpoints: Checkpoints) -> None:
        self._config, self._log, self._checkpoints = config, log, checkpoints
        self.num_rows = 0

    def on_step_end(self, batch: DeviceBatch, result: StepResult) -> None:
        """After the row was written; all processes end together.

        Raises:
            RunFailed: If the config says to stop.
        """
        step, message = self.trainer.position.step, None
        if not self.trainer.is_logged(step):
            return
        if result.figures:
            std, rank = (result.figures[name] for name in ("feature_std", "effective_rank"))
            message = self.look(std, rank, tuple(result.output.projection.shape), step)
            if message is not None:
                seen = {"feature_std": std, "effective_rank": rank, "num_rows": self.num_rows}
                self._log.warn(message, collapse=seen)
        if self._config.on_collapse == "stop":
            # The first process saves before the others hear of it: their end may end it too.
            if message is not None:
                self._checkpoints.save(waits=True)
            if dist.total_of(message is not None, self.trainer.device):
                raise RunFailed(
                    f"{message or 'the first process saw the features collapse'}; the checkpoint "
                    "is saved: --resume with engine.on_collapse=warn goes on"
                )

    def look(self, std: float, rank: float, shape: tuple[int, int], step: int) -> str | None:
        """What there is to say after this row; None most of the time.

        Args:
            std: ``feature_std``.
            rank: ``effective_rank``.
            shape: n and d of the projections.
            step: Of the row.
        """
        num_samples, dim = shape
        highest, least = min(num_samples - 1, dim), self._config.collapse_rank  # of centred rows
        is_flat = highest >= _ROOM * least and rank < least
        if not (is_flat or std < self._config.collapse_std):
            self.num_rows = 0
            return None
        self.num_rows += 1
        if self.num_rows != self._config.collapse_patience:
            return None
        return (
            f"features have collapsed: std {std * dim**-0.5:.2g} of {dim**-0.5:.2g} expected for "
            f"spread features, effective rank {rank:.2g} of "
            f"{highest} possible, for {self.num_rows} logged rows up to step {step}"
        )


class StopOnSignal(Callback):
    """Notes the first signal while a run goes on; after the step the run saves and ends.

    A signal that comes 5 s later has its usual effect. Handlers are restored when the context
    closes. Outside the main thread nothing is set, since Python allows it there only.

    Args:
        log: Where the event is written.
        checkpoints: Saves before the run ends.
    Attributes:
        number: Of the signal; 0: none has come.
    """

    def __init__(self, log: ProgressLog, checkpoints: Checkpoints) -> None:
        self._log, self._checkpoints = log, checkpoints
        self.number, self._noted_at = 0, 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, *_: object) -> None:
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > _ECHO_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._old = {}

    def on_step_end(self, batch: DeviceBatch, result: StepResult) -> None:
        """Save and leave; all processes do so if one of them was given a signal.

        Raises:
            StoppedBySignal: When the checkpoint is on the disk.
        """
        number, step = self.number, self.trainer.position.step
        if dist.is_on():
            # They agree only where they wait for each other anyway.
            if not self.trainer.is_logged(step):
                return
            number = int(dist.highest(torch.tensor(float(number), device=self.trainer.device)))
        if not number:
            return
        message = (
            f"stopped by {signal.Signals(number).name} after step {step}; the checkpoint is saved: "
            "the same command with --resume goes on"
        )
        self._checkpoints.save(waits=True)
        dist.wait()  # the end of another process would end the first one in its saving
        self._log.write("event", message=message)
        raise StoppedBySignal(number, message)


class HangTimer(Callback):
    """Prints the stacks of all threads to stderr when no step ends for ``engine.watchdog_seconds``.

    The timer is faulthandler's own thread, which needs no lock of the interpreter. With
    ``engine.on_hang=stop`` the process then ends with status 1, so that torchrun starts the job
    again. It begins with the first batch, after the loader's processes are forked, and stops at the
    end of its context.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._seconds, self._stops = config.watchdog_seconds, config.on_hang == "stop"

    def on_step_start(self) -> None:
        """Count from now, so that waiting for the next batch counts."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=self._stops, file=STDERR)

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
