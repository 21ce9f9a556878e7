"""An alarm for features that collapse."""

from __future__ import annotations

from common.errors import RunFailed
from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.data.input_pipeline import DeviceBatch
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.log import ProgressLog
from pretrain.engine.trainer import Callback, StepResult

# The rank is judged where batch and width leave room for so many times the rank that alarms.
_ROOM = 4


class CollapseError(RunFailed):
    """The features have collapsed and ``engine.on_collapse`` is ``stop``."""


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
            CollapseError: If the config says to stop.
        """
        step, message = self.trainer.position.step, None
        if result.refusal is not None or not self.trainer.is_logged(step):
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
                raise CollapseError(
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
