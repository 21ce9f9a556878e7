"""Detectron2's DefaultTrainer with exact resume, atomic checkpoints and class-wise VOC AP."""

# Detectron2 makes these at run time.
# pyright: reportAttributeAccessIssue=false
import detection.compat  # before detectron2

# isort: split
import logging
import weakref
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, hooks
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch.utils.data import DataLoader

import detection.training.heads  # noqa: F401  (registers the C4 head)
from common.errors import UserError
from common.files import read_json_lines, remove_partial_files, write_json_lines
from detection.dataset import VocSet, VocSplit, classes_without_objects
from detection.evaluation.voc import evaluate_detector
from detection.training.calibrate import calibrate_frozen_norms
from detection.training.data import build_test_loader, build_train_loader
from detection.training.hooks import (
    CurveHook,
    FreshPreciseBN,
    MetricsFile,
    ProgressLine,
    RunClock,
    SeedEachStep,
)
from detection.training.weights import RunCheckpointer, load_backbone, remove_stale_pointer

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
