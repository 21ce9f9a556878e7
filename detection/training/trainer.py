"""Detectron2's DefaultTrainer with exact resume, atomic checkpoints and class-wise VOC AP."""

import logging
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, get_event_storage
from fvcore.nn.precise_bn import get_bn_modules
from torch.utils.data import DataLoader

import detection.compat  # before detectron2
import detection.training.heads  # noqa: F401  (registers the C4 head)
from common.errors import UserError
from common.files import read_json_lines, remove_partial_files, write_json_lines
from detection.dataset import VocSet, VocSplit, classes_without_objects
from detection.evaluation.voc import evaluate_detector
from detection.training.data import build_test_loader, build_train_loader, derive_seed
from detection.training.weights import (
    RunCheckpointer,
    calibrate_frozen_norms,
    load_backbone,
    remove_stale_pointer,
)

# isort: split


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


# Detectron2 makes these at run time.
# pyright: reportAttributeAccessIssue=false

# isort: split


logger = logging.getLogger(__name__)
_PRINT_PERIOD = 20
_CHECKPOINTS_KEPT = 2


class Trainer(DefaultTrainer):
    """Trains one detector on one seed and evaluates it."""

    def __init__(self, cfg: CfgNode, voc: VocSet) -> None:
        """Build model, optimiser, loader and hooks.

        Args:
            cfg: Complete and frozen; DATASETS name lists registered from `voc`.
            voc: The set they come from.
        """
        self.voc = voc
        self.folder = Path(cfg.OUTPUT_DIR)
        self.split = evaluated_part(voc.test, cfg.TEST.NUM_IMAGES)
        self.absent = classes_without_objects(self.split, voc.classes)
        if len(self.absent) == len(voc.classes):
            raise UserError(
                f"list {voc.test.name!r}: no object in the pictures evaluated, so "
                "there is no AP; raise TEST.NUM_IMAGES or choose another list"
            )
        self.clock = RunClock()
        super().__init__(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        """The training stream from its beginning."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Test pictures in the order of their list."""
        return build_test_loader(cfg, dataset_name)

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Detectron2's default hooks in their order, with ours in their places."""
        cfg = self.cfg
        self.checkpointer = RunCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.curve = CurveHook(cfg.TEST.EVAL_PERIOD, self.evaluate, self.folder / "curve.jsonl")
        precise = cfg.TEST.PRECISE_BN
        built: list[hooks.HookBase | None] = [
            hooks.IterationTimer(),
            self.clock,
            SeedEachStep(cfg.SEED),
            hooks.LRScheduler(),
            FreshPreciseBN(
                cfg.TEST.EVAL_PERIOD,
                self.model,
                build_train_loader(_without_workers(cfg), purpose="precise-bn"),
                precise.NUM_ITER,
            )
            if precise.ENABLED and get_bn_modules(self.model)
            else None,
        ]
        if comm.is_main_process():
            built.append(
                hooks.PeriodicCheckpointer(
                    self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=_CHECKPOINTS_KEPT
                )
            )
        built.append(self.curve)
        if comm.is_main_process():
            built.append(
                hooks.PeriodicWriter(
                    [
                        MetricsFile(self.folder / "metrics.json"),
                        ProgressLine(self.max_iter, cfg.SOLVER.IMS_PER_BATCH),
                    ],
                    period=min(_PRINT_PERIOD, self.max_iter),
                )
            )
        return built

    def start(self, weights: Path | None) -> None:
        """Go on from the last checkpoint, or begin from weights (None: random).

        Raises:
            UserError: If the weights do not match.
        """
        if comm.is_main_process():
            remove_partial_files(self.folder)
            remove_stale_pointer(self.folder)
        comm.synchronize()
        if self.checkpointer.has_checkpoint():
            self._resume()
            return
        if weights is not None:
            num_tensors = load_backbone(self._bare_model(), weights)
            logger.info("%s: all %d backbone tensors loaded", weights.name, num_tensors)
        num_batches = self.cfg.MODEL.BACKBONE.CALIBRATE_BN_BATCHES
        batches = build_train_loader(
            _without_workers(self.cfg), purpose="calibrate", all_ranks_alike=True
        )
        num_norms = calibrate_frozen_norms(self._bare_model(), batches, num_batches)
        if num_norms:
            logger.info(
                "%d frozen batch norms: statistics measured on %d batches of training pictures",
                num_norms,
                num_batches,
            )
        if comm.is_main_process():
            _drop_metrics_from(self.folder / "metrics.json", 0)

    def _resume(self) -> None:
        self.checkpointer.resume_or_load("", resume=True)
        self.start_iter = self.iter + 1
        self._trainer.reset_data_loader(
            lambda: build_train_loader(self.cfg, start_iteration=self.start_iter)
        )
        if comm.is_main_process():
            _drop_metrics_from(self.folder / "metrics.json", self.start_iter)
        logger.info("resuming after iteration %d of %d", self.start_iter, self.max_iter)

    def _bare_model(self) -> Any:
        """The detector without its distributed wrapper."""
        return self.checkpointer.model

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the detector as it is.

        Returns:
            What `evaluate_detector` gives; {} on other ranks than the first.
        """
        name = self.cfg.DATASETS.TEST[0]
        return evaluate_detector(
            self.cfg,
            self.model,
            self.build_test_loader(self.cfg, name),
            self.split,
            self.voc.classes,
            metric_year=self.voc.metric_year,
            root=self.voc.root,
            absent=self.absent,
        )


def evaluated_part(split: VocSplit, num_images: int) -> VocSplit:
    """The part of a list that is evaluated."""
    pictures = split.pictures[:num_images] if num_images else split.pictures
    return VocSplit(split.folder, split.name, pictures)


def _without_workers(cfg: CfgNode) -> CfgNode:
    """A copy of a config whose loaders start no processes."""
    copy = cfg.clone()
    copy.defrost()
    copy.DATALOADER.NUM_WORKERS = 0
    copy.freeze()
    return copy


def _drop_metrics_from(path: Path, iteration: int) -> None:
    """Cut metrics.json back to what came before an iteration."""
    if path.is_file():
        rows = [row for row in read_json_lines(path) if row.get("iteration", 0) < iteration]
        write_json_lines(path, rows)
