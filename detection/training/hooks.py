"""Hooks of the training loop: exact random state, clocks, the AP curve, a line for people."""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import logging
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, get_event_storage

from common.files import read_json_lines, write_json_lines
from detection.training.seeding import derive_seed

logger = logging.getLogger(__name__)


class SeedEachStep(HookBase):
    """Seeds torch before each step from (seed, iteration, rank).

    Sampling of anchors and ROIs draws from torch's global generator; with this a resumed run draws
    what the uninterrupted one drew, and no generator state needs saving.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def before_step(self) -> None:
        """Seed."""
        torch.manual_seed(derive_seed("step", self._seed, self.trainer.iter, comm.get_rank()))


class RunClock(HookBase):
    """Wall-clock seconds of training with evaluation, summed over interruptions."""

    def __init__(self) -> None:
        self._before = 0.0
        self._start = time.perf_counter()

    def before_train(self) -> None:
        """Start counting."""
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + time.perf_counter() - self._start

    def state_dict(self) -> dict[str, float]:
        """Seconds up to the checkpoint."""
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self._before = state["seconds"]


class FreshPreciseBN(hooks.PreciseBN):
    """Detectron2's precise BN, on the same pictures every time, so that a resumed run agrees."""

    def update_stats(self) -> None:
        """Start the loader anew, then measure."""
        self._data_iter = None
        super().update_stats()
        self._data_iter = None


class CurveHook(hooks.EvalHook):
    """Evaluates every so often and after training; keeps curve.jsonl, also across a kill."""

    def __init__(self, period: int, evaluate: Any, curve_file: Path) -> None:
        super().__init__(period, self._evaluate_and_note)
        self._evaluate, self._file, self._eval_period = evaluate, curve_file, period
        self.last: dict[str, Any] = {}

    def before_train(self) -> None:
        """Drop points later than the checkpoint; make up one that the kill took."""
        start = self.trainer.start_iter
        if comm.is_main_process():
            rows = [row for row in read_json_lines(self._file) if row["iteration"] <= start]
            write_json_lines(self._file, rows)
            due = (
                self._eval_period > 0
                and 0 < start < self.trainer.max_iter
                and start % self._eval_period == 0
                and all(row["iteration"] != start for row in rows)
            )
        else:
            due = False
        if any(comm.all_gather(due)):
            self._do_eval_at(start)

    def _do_eval_at(self, iteration: int) -> None:
        self._note(self._evaluate(), iteration)
        comm.synchronize()

    def _evaluate_and_note(self) -> dict[str, Any]:
        result = self._evaluate()
        iteration = min(self.trainer.iter + 1, self.trainer.max_iter)
        return self._note(result, iteration)

    def _note(self, result: dict[str, Any], iteration: int) -> dict[str, Any]:
        """Append a point and say it; the storage gets the means only."""
        if not comm.is_main_process():
            return {}
        self.last = result
        box = result["bbox"]
        point = {"iteration": iteration, **{key: box[key] for key in ("AP", "AP50", "AP75")}}
        rows = [row for row in read_json_lines(self._file) if row["iteration"] != iteration]
        write_json_lines(self._file, [*rows, point])
        logger.info(
            "iteration %d: AP %.1f  AP50 %.1f  AP75 %.1f  (%d test pictures in %.1f s)",
            iteration,
            box["AP"],
            box["AP50"],
            box["AP75"],
            result["num_images"],
            result["seconds"],
        )
        return {"bbox": box}


class MetricsFile(EventWriter):
    """Detectron2's JSONWriter, its file opened when there is something to write.

    A resumed run cuts the file back first (by rename), which a file opened earlier would not see.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: JSONWriter | None = None

    def write(self) -> None:
        """Append a line: the newest value of everything that is measured, not smoothed."""
        if self._writer is None:
            self._writer = JSONWriter(str(self._path), window_size=1)
        self._writer.write()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class ProgressLine(EventWriter):
    """One line every few iterations: loss, learning rate, rate, time to go."""

    def __init__(self, max_iter: int, images_per_batch: int) -> None:
        self._max_iter, self._images = max_iter, images_per_batch

    def write(self) -> None:
        """Print the line."""
        storage = get_event_storage()
        done = storage.iter + 1
        if done > self._max_iter or "total_loss" not in storage.histories():
            return
        loss = storage.history("total_loss").median(20)
        seconds = storage.history("time").median(20) if "time" in storage.histories() else 0.0
        data = storage.history("data_time").median(20)
        rate = f"{1 / seconds:5.2f} it/s {self._images / seconds:6.1f} images/s" if seconds else ""
        left = int(seconds * (self._max_iter - done))
        bar = ("#" * (20 * done // self._max_iter)).ljust(20, ".")
        logger.info(
            "[%s] %d/%d  loss %.3f  lr %.5f  %s  data %.0f %%  to go %d:%02d",
            bar,
            done,
            self._max_iter,
            loss,
            storage.history("lr").latest(),
            rate,
            100 * data / seconds if seconds else 0.0,
            left // 60,
            left % 60,
        )
