"""What a run writes into its folder beside checkpoints: config, rows, summary.

Rows go to metrics.jsonl, TensorBoard, Weights & Biases and the progress bar. After a resume they go
on as if the run had not been interrupted.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import files, provenance
from common.config import to_plain
from common.errors import UserError, require
from pretrain import collectives as dist
from pretrain.config import PretrainConfig, TrackingConfig
from pretrain.data.input_pipeline import DeviceBatch
from pretrain.engine import checkpoint
from pretrain.engine.trainer import Callback, Position, StepResult

ENVIRONMENT = "environment.json"
_ROW: files.Form = {"kind": str, "step": int}


def prepare(config: PretrainConfig, *, resume: bool) -> tuple[Path, ExitStack]:
    """Make the run's folder and hold it, or refuse one that holds another run.

    Returns:
        The folder, and its lock in the first process: ``close`` frees it, so does the end of this
        object; in the others nothing.

    Raises:
        UserError: ``out`` missing or a file; another process works there; or a run stands there and
            ``--resume`` was not given.
    """
    if config.out is None:
        raise UserError("out is not set: name the folder of this run, e.g. out=runs/first")
    folder, lock = Path(config.out), ExitStack()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"out={folder}: a file is in the way; choose another out=DIR") from error
    if dist.rank() == 0:
        lock.enter_context(files.held(folder / files.LOCK))
        files.remove_partial_files(folder)
    dist.wait()  # no process looks at what is there before
    if checkpoint.is_in(folder) and not resume:
        raise UserError(
            f"{folder} holds a run already: continue it with --resume, or choose another out=DIR"
        )
    return folder, lock


def earlier_threads(folder: Path) -> int | None:
    """How many threads the run that stands there computes with; None if none has begun."""
    environment = files.read_record_or_none(folder / ENVIRONMENT) or {}
    number = environment.get("num_threads")
    return number if isinstance(number, int) and checkpoint.is_in(folder) else None


class RunFolder(Callback):
    """Writes what stands beside a run, in the first process, and frees the folder at the end.

    Args:
        folder: Of the run.
        lock: Of the folder, see ``prepare``.
        config: Of the run.
        num_samples: How many pictures there are.
    """

    def __init__(
        self, folder: Path, lock: ExitStack, config: PretrainConfig, num_samples: int
    ) -> None:
        self._folder, self._lock, self._config = folder, lock, config
        self._num_samples = num_samples

    def __enter__(self) -> RunFolder:
        """Write ``config.yaml`` and ``environment.json``."""
        device = self.trainer.device
        text = yaml.safe_dump(to_plain(self._config), sort_keys=False)
        files.write_text(self._folder / "config.yaml", text)
        environment = {
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "command": sys.argv,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "num_threads": torch.get_num_threads(),
        }
        files.write_json(self._folder / ENVIRONMENT, environment)
        return self

    def on_end(self) -> None:
        """Write ``summary.json``, whose presence says that the run is complete; free the folder."""
        position = self.trainer.position
        rows = files.read_json_lines(self._folder / "metrics.jsonl", _ROW)
        knn = {row["step"]: row.get("knn_top1") for row in rows if row["kind"] == "knn"}
        # Of a run that goes on after its end the figures stay, also if the rows are lost.
        path = self._folder / "summary.json"
        old = files.read_record_or_none(path) or {}
        old = old if old.get("steps") == position.step else {}
        num_images = position.step * self._config.data.batch_size
        summary = {
            "steps": position.step,
            "epochs": self._config.optim.epochs,
            "seconds": position.train_seconds,
            "images_per_second": num_images / max(position.train_seconds, 1e-9),
            "knn_top1": knn.get(position.step, old.get("knn_top1")),
            "knn_top1_initial": knn.get(0, old.get("knn_top1_initial")),
            "num_samples": self._num_samples,
            "num_skipped_samples": position.num_bad_samples,
            "peak_memory_bytes": provenance.peak_memory_bytes(),
        }
        files.write_json(path, summary)
        self._lock.close()


# -- rows --

# In the run folder: the id of the W&B run, so that a resumed run continues it.
WANDB_ID_FILE = "tracking.json"


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


class MetricLog:
    """Appends rows to ``metrics.jsonl`` and scalars to ``tensorboard/``.

    Args:
        folder: The run's folder.
        last_step: Rows after this step are dropped first: a killed run may have logged steps that
            its last checkpoint does not know, and they will be run again. -1 drops all.
        last_probe_step: The same for rows of kind ``knn``.
        wandb_run: Started before, since it sees only writers that are made after it.
    Attributes:
        notes: What was found damaged.
        last_step: Of the rows that were kept; 0 without any.
    """

    def __init__(
        self, folder: Path, last_step: int, last_probe_step: int, wandb_run: Any | None = None
    ) -> None:
        path = folder / "metrics.jsonl"
        self.notes: list[str] = []
        rows = files.read_json_lines(path, _ROW, report=self.notes.append)
        last = {"knn": last_probe_step}
        kept = [row for row in rows if row["step"] <= last.get(row["kind"], last_step)]
        files.write_json_lines(path, kept)
        self.last_step = max((row["step"] for row in kept), default=0)
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

    def close(self, *, failed: bool = False) -> None:
        """Flush all, and let W&B send what is left."""
        self._file.close()
        self._board.close()
        if self._wandb_run is not None:
            try:
                self._wandb_run.finish(exit_code=int(failed))
            except Exception as error:  # whatever its network raises; metrics.jsonl has every row
                print(f"warning: tracking.wandb did not finish: {error}", file=sys.stderr)


def open_log(
    config: PretrainConfig, folder: Path, position: Position, steps_per_epoch: int
) -> MetricLog:
    """The log of a run that goes on at a position, without the rows that will be written again.

    Of W&B its own environment variables say where to: ``WANDB_MODE``, ``WANDB_BASE_URL``, and so
    on. It copies what TensorBoard's writers of this process write from then on.
    """
    is_new, wandb_run = position.step == 0, None
    if config.tracking.wandb:
        import wandb  # type: ignore[import-not-found]

        path = folder / WANDB_ID_FILE
        known = {} if is_new else files.read_record_or_none(path) or {}
        wandb_run = wandb.init(
            project=config.tracking.project,
            name=folder.name,
            dir=str(folder),
            config=to_plain(config),
            id=known.get("wandb"),
            resume="allow",
            sync_tensorboard=True,
        )
        files.write_json(path, {"wandb": wandb_run.id})
    last = -1 if is_new else position.step
    # A checkpoint at the end of an epoch is made before the probe that is due there.
    probe_is_due = position.step_in_epoch == steps_per_epoch
    return MetricLog(folder, last, last - 1 if probe_is_due else last, wandb_run)


class ProgressLog(Callback):
    """The progress bar on stderr and the rows of a run, both of the first process.

    Args:
        title: Of the bar.
        open_rows: Makes the log of a run that goes on at a position, whose epochs have so many
            steps; None: no rows are written.
    Attributes:
        notes: Reported as warnings when the run begins.
        logged_step: Up to which rows must be there when the run begins.
    """

    def __init__(
        self, title: str, open_rows: Callable[[Position, int], MetricLog] | None = None
    ) -> None:
        self.title, self.open_rows, self.notes, self.logged_step = title, open_rows, [], 0
        self._rows: MetricLog | None = None  # while the run goes on
        self._bar = tqdm(disable=True)
        self._start_row()

    def __enter__(self) -> ProgressLog:
        trainer, is_main = self.trainer, dist.rank() == 0
        if is_main and self.open_rows is not None:
            self._rows = self.open_rows(trainer.position, trainer.batches.num_steps)
            self.notes += self._rows.notes
            if self._rows.last_step < self.logged_step:
                lost = f"{self._rows.last_step + 1} to {self.logged_step}"
                self.notes.append(f"metrics.jsonl: the rows of steps {lost} are lost")
        self._bar = tqdm(
            total=trainer.num_steps,
            initial=trainer.position.step,
            desc=self.title,
            unit="step",
            disable=not is_main,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            file=sys.stderr,
        )
        for note in self.notes:
            self.warn(note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """W&B hears whether the run failed."""
        if self._rows is not None:
            self._rows.close(failed=kind is not None)
        self._rows = None
        self._bar.close()

    def on_epoch_start(self) -> None:
        """What went on between two epochs is no part of a row's rates."""
        self._start_row()

    def _start_row(self) -> None:
        self._started, self._num_images, self._data_seconds = time.perf_counter(), 0, 0.0

    def on_step_end(self, batch: DeviceBatch, result: StepResult) -> None:
        """The row of a logged step."""
        position = self.trainer.position
        self._bar.update()
        self._num_images += len(batch.labels) * dist.world_size()
        self._data_seconds += batch.waited
        if self.trainer.is_logged(position.step):
            with record_function("logging"):
                loss = float(dist.mean(result.loss))
                seconds = max(time.perf_counter() - self._started, 1e-9)
                speed, wait_share = self._num_images / seconds, self._data_seconds / seconds
                self._bar.set_postfix(loss=f"{loss:.3f}", images_s=f"{speed:.0f}")
                if self._rows is not None:
                    row = {"loss": loss, **result.figures}
                    for callback in self.trainer.callbacks:
                        row |= callback.figures()
                    row["num_bad_samples"] = position.num_bad_samples
                    self.write("train", **row, images_per_second=speed, data_wait_share=wait_share)
                    if result.histograms:
                        self.write("similarity", **result.histograms)
            self._start_row()

    def write(self, kind: str, **values: Any) -> None:
        """One row at the present step."""
        if self._rows is not None:
            step = self.trainer.position.step
            self._rows.write(kind, step, epoch=step / self.trainer.batches.num_steps, **values)

    def warn(self, message: str, **values: Any) -> None:
        """A row of kind ``event``, and its message on the terminal."""
        self.write("event", message=message, **values)
        self._bar.write(f"warning: {message}", file=sys.stderr)
