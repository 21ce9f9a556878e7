"""What a run tells of its steps: rows of the log, the bar's figures, warnings."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.config import to_plain
from pretrain import collectives as dist
from pretrain.config import PretrainConfig
from pretrain.engine import guards
from pretrain.engine.log import MetricLog, start_wandb
from pretrain.engine.state import Position
from pretrain.evaluation.online_probe import OnlineProbe
from pretrain.model import diagnostics
from pretrain.model.diagnostics import CollapseAlarm
from pretrain.model.joint_embedding import StepOutput


@dataclass
class Meter:
    """Time spent since the last log row: all of it, and waiting for data; seconds."""

    num_steps: int = 0
    num_images: int = 0
    data_seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def rates(self) -> dict[str, float]:
        """Images per second, and the share of the time that was spent waiting for data."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "images_per_second": self.num_images / seconds,
            "data_wait_share": self.data_seconds / seconds,
        }


@dataclass(frozen=True)
class Step:
    """What one optimiser step leaves to look at; ``is_skipped``: it changed nothing."""

    output: StepOutput
    lr: float
    queue: dict[str, float]
    is_skipped: bool = False


class Rows:
    """Rows of a run's log and the collapse alarm. Only the first process has a log.

    Args:
        config: The whole config.
        folder: The run's.
        steps_per_epoch: Steps of one pass through the data.
        position: Where the run stands; the run moves it on.
    """

    def __init__(
        self, config: PretrainConfig, folder: Path, steps_per_epoch: int, position: Position
    ) -> None:
        self._config, self._folder = config, folder
        self._steps_per_epoch, self._position = steps_per_epoch, position
        self._num_steps = steps_per_epoch * config.optim.epochs
        self._alarm = CollapseAlarm(config.engine)

    def open_log(self, *, fresh: bool) -> MetricLog:
        """The log without the rows that will be written again."""
        step = -1 if fresh else self._position.step
        probe_is_due = self._position.step_in_epoch == self._steps_per_epoch
        plain = to_plain(self._config)
        wandb_run = start_wandb(self._config.tracking, self._folder, plain, is_new=fresh)
        return MetricLog(self._folder, step, step - 1 if probe_is_due else step, wandb_run)

    def write(self, log: MetricLog, kind: str, **values: Any) -> None:
        """One row, at the present step."""
        epoch = self._position.step / self._steps_per_epoch
        log.write(kind, self._position.step, epoch=epoch, **values)

    def warn(self, log: MetricLog, bar: tqdm, **event: Any) -> None:
        """A row of kind ``event``, and its message on the terminal."""
        self.write(log, "event", **event)
        bar.write(f"warning: {event['message']}", file=sys.stderr)

    def step(
        self, done: Step, meter: Meter, log: MetricLog | None, bar: tqdm,
        online: OnlineProbe | None, scale: dict[str, float],
    ) -> str | None:  # fmt: skip
        """The row of a step that is logged; all processes call it together.

        Args:
            done: The step.
            meter: Since the last row.
            log: None but in the first process.
            bar: Shows loss and images per second.
            online: Its figures stand in the row.
            scale: Figures of the loss scale, where there is one.
        Returns:
            What the collapse alarm says, in the first process.
        Raises:
            NonFiniteLossError: If the loss is not finite.
        """
        output, position = done.output, self._position
        loss = float(dist.mean(output.loss.detach()))
        if not math.isfinite(loss):
            raise guards.NonFiniteLossError(
                self._folder, f"the loss is {loss} at step {position.step}"
            )
        rates = meter.rates()
        bar.set_postfix(loss=f"{loss:.3f}", images_s=f"{rates['images_per_second']:.0f}")
        if log is None:
            return None
        figures = diagnostics.diagnose(output)
        row = {"loss": loss, "lr": done.lr, **figures, "fa_active": int(output.is_augmented)}
        names = ("num_bad_samples", "num_skipped_steps")
        counts = {name: getattr(position, name) for name in names}
        probe = online.figures() if online else {}
        self.write(log, "train", **row, **done.queue, **probe, **scale, **counts, **rates)
        if self._is_histogram_due():
            self.write(log, "similarity", **diagnostics.similarity_histograms(output))
        collapse = self._alarm.look(figures, output.projection, position.step)
        if collapse is not None:
            self.warn(log, bar, **self._alarm.event(figures, collapse))
        return collapse

    def _is_histogram_due(self) -> bool:
        every = diagnostics.ROWS_PER_HISTOGRAM * self._config.engine.log_every_steps
        return self._position.step % every == 0 or self._position.step == self._num_steps
