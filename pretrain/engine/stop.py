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
        self.number = 0
        self._noted_at = 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopOnSignal:
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
        self._log.write("event", message=message)
        raise StoppedBySignal(number, message)
