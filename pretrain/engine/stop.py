"""Signals that ask a run to save and end: SIGTERM, SIGUSR1 (SLURM), SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import torch

from common.errors import StoppedBySignal
from pretrain import collectives as dist
from pretrain.data.input_pipeline import DeviceBatch
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.log import ProgressLog
from pretrain.engine.trainer import Callback, StepResult

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A cluster signals all processes of a job, torchrun passes on what it got: one request, echoed.
_ECHO_SECONDS = 5.0


def stopped(number: int, step: int) -> StoppedBySignal:
    """What a run raises once it has saved its state because a signal asked for it."""
    return StoppedBySignal(
        number,
        f"stopped by {signal.Signals(number).name} after step {step}; the checkpoint is saved: the "
        "same command with --resume goes on",
    )


class StopRequest:
    """Notes the first signal while a run goes on; one that comes 5 s later has its usual effect.

    In a context: handlers are set at its beginning and restored at its end. Outside the main thread
    nothing is set, since Python allows it there only.
    """

    def __init__(self) -> None:
        self.number = 0
        self._noted_at = 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > _ECHO_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._old = {}

    def agreed(self, device: torch.device) -> int:
        """The signal that any process was given, 0 for none; all processes must call it."""
        if not dist.is_on():
            return self.number
        return int(dist.highest(torch.tensor(float(self.number), device=device)))


class StopOnSignal(StopRequest, Callback):
    """After a signal to any process: save, and leave together.

    Several processes agree only at logged steps, where they wait for each other anyway.

    Args:
        log: Where the event is written.
        checkpoints: Saves before the run ends.
    """

    def __init__(self, log: ProgressLog, checkpoints: Checkpoints) -> None:
        super().__init__()
        self._log, self._checkpoints = log, checkpoints

    def on_step_end(self, batch: DeviceBatch, result: StepResult) -> None:
        """Raises ``StoppedBySignal`` when the checkpoint is on the disk."""
        step = self.trainer.position.step
        if dist.is_on() and not self.trainer.is_logged(step):
            return
        number = self.agreed(self.trainer.device)
        if number:
            error = stopped(number, step)
            self._checkpoints.save(waits=True)
            self._log.write("event", message=str(error))
            raise error
