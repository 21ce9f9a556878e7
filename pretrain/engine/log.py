"""metrics.jsonl, TensorBoard, Weights & Biases and the progress bar of a run.

After a resume the rows go on as if the run had not been interrupted.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.config import to_plain
from common.errors import require
from common.files import read_json_lines, write_json, write_json_lines
from pretrain import collectives as dist
from pretrain.config import PretrainConfig, TrackingConfig
from pretrain.engine.checkpoint import Position

WANDB_ID_FILE = "tracking.json"
"""In the run folder: the id of the W&B run, so that a resumed run continues it."""


def check_wandb(config: TrackingConfig) -> None:
    """Refuse ``tracking.wandb`` without the package.

    Raises:
        UserError: Naming the command that installs it.
    """
    require(
        not config.wandb or importlib.util.find_spec("wandb") is not None,
        f"tracking.wandb=true, but wandb is not installed: run `{sys.executable} -m pip install "
        "wandb`, or set tracking.wandb=false",
    )


def start_wandb(
    config: TrackingConfig, folder: Path, plain: dict[str, Any], *, is_new: bool
) -> Any | None:
    """Let W&B copy what TensorBoard's writers of this process write from now on.

    Its own environment variables say where to: ``WANDB_MODE``, ``WANDB_BASE_URL``, and so on.

    Args:
        config: Whether and under which project.
        folder: Of the run.
        plain: The whole config as plain types.
        is_new: The run starts from nothing: an earlier id is not continued.

    Returns:
        The W&B run, or None without ``tracking.wandb``.
    """
    if not config.wandb:
        return None
    path = folder / WANDB_ID_FILE
    known = {} if is_new or not path.exists() else json.loads(path.read_text("utf-8"))
    run = importlib.import_module("wandb").init(
        project=config.project,
        name=folder.name,
        dir=str(folder),
        config=plain,
        id=known.get("wandb"),
        resume="allow",
        sync_tensorboard=True,
    )
    write_json(path, {"wandb": run.id})
    return run


def open_log(
    config: PretrainConfig, folder: Path, position: Position, steps_per_epoch: int
) -> MetricLog:
    """The log of a run that goes on at a position, without the rows that will be written again."""
    is_new = position.step == 0
    last = -1 if is_new else position.step
    # A checkpoint at the end of an epoch is made before the probe that is due there.
    probe_is_due = position.step_in_epoch == steps_per_epoch
    wandb_run = start_wandb(config.tracking, folder, to_plain(config), is_new=is_new)
    return MetricLog(folder, last, last - 1 if probe_is_due else last, wandb_run)


def progress_bar(title: str, num_steps: int, num_done: int = 0) -> tqdm:
    """On stderr, of the first process."""
    return tqdm(
        total=num_steps,
        initial=num_done,
        desc=title,
        unit="step",
        disable=dist.rank() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        file=sys.stderr,
    )


@dataclass
class Meter:
    """Images and waiting for data since the last logged row; seconds."""

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


class MetricLog:
    """Appends rows to ``metrics.jsonl`` and scalars to ``tensorboard/``.

    In a context: its end tells W&B whether the run failed.

    Args:
        folder: The run's folder.
        last_step: Rows after this step are dropped first: a killed run may have logged steps that
            its last checkpoint does not know, and they will be run again. -1 drops all.
        last_probe_step: The same for rows of kind ``knn``.
        wandb_run: Started before, since it sees only writers that are made after it.
    """

    def __init__(
        self, folder: Path, last_step: int, last_probe_step: int, wandb_run: Any | None = None
    ) -> None:
        path = folder / "metrics.jsonl"
        last = {"knn": last_probe_step}
        rows = [r for r in read_json_lines(path) if r["step"] <= last.get(r["kind"], last_step)]
        write_json_lines(path, rows)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)
        self._wandb_run = wandb_run

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row: ``{"kind": .., "step": .., ..}``; numbers go to TensorBoard as well."""
        row = {
            # JSON has no NaN: such values become their name as text.
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in {"kind": kind, "step": step, **values}.items()
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Flush all, and let W&B send what is left."""
        self._file.close()
        self._board.close()
        if self._wandb_run is not None:
            try:
                self._wandb_run.finish(exit_code=int(failed))
            except Exception as error:  # whatever its network raises; metrics.jsonl has every row
                print(f"warning: tracking.wandb did not finish: {error}", file=sys.stderr)
