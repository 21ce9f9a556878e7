"""Detectron2's DefaultTrainer with exact resume and atomic checkpoints."""

import detection.compat
import detection.training.heads  # noqa: F401  (registers the C4 head)

# isort: split
import contextlib
import logging
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.data import DataLoader

from common import checkpoints, files
from common.annotations.record import LabelledSet
from common.errors import UserError, duration
from detection.evaluation.evaluate import Evaluation, evaluate_detector, evaluated_split
from detection.training.config import describe
from detection.training.data import build_test_loader, build_train_loader, derive_seed
from detection.training.roi_align import speed_up_backward
from detection.training.weights import RunCheckpointer, calibrate_frozen_norms, load_backbone

# Detectron2 makes these at run time.
# pyright: reportAttributeAccessIssue=false
logger = logging.getLogger(__name__)
_PRINT_PERIOD = 20
_CHECKPOINTS_KEPT = 2
_ROW = {"iteration": int}


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers; in Detectron2's training each has its own."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def seed_step(trainer: DefaultTrainer) -> None:
    """Seed torch from (seed, iteration, rank).

    Sampling of anchors and ROIs draws from torch's global generator; with this a resumed run draws
    what the uninterrupted one drew, and no generator state needs saving.
    """
    torch.manual_seed(derive_seed("step", trainer.cfg.SEED, trainer.iter, comm.get_rank()))


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

    def __init__(
        self, period: int, evaluate: Callable[[], Evaluation | None], curve_file: Path
    ) -> None:
        super().__init__(period, self._evaluate_now)
        self._evaluate, self._file = evaluate, curve_file
        self.last: Evaluation | None = None

    def before_train(self) -> None:
        """Drop points later than the checkpoint; evaluate now if a kill lost the point of now."""
        start, is_due = self.trainer.start_iter, False
        if comm.is_main_process():
            rows = files.read_json_lines(self._file, _ROW, report=logger.warning)
            rows = [row for row in rows if row["iteration"] <= start]
            files.write_json_lines(self._file, rows)
            is_due = (
                self._period > 0
                and 0 < start < self.trainer.max_iter
                and start % self._period == 0
                and all(row["iteration"] != start for row in rows)
            )
        if any(comm.all_gather(is_due)):
            self._add_point(start)
            comm.synchronize()

    def _evaluate_now(self) -> dict[str, dict[str, float]]:
        return self._add_point(min(self.trainer.iter + 1, self.trainer.max_iter))

    def _add_point(self, iteration: int) -> dict[str, dict[str, float]]:
        """Evaluate, append a point to the file and log it; Detectron2 gets the means."""
        result = self._evaluate()
        if result is None:
            return {}
        self.last = result
        point = {"iteration": iteration, **result.means}
        rows = files.read_json_lines(self._file, _ROW)
        rows = [row for row in rows if row["iteration"] != iteration]
        files.write_json_lines(self._file, [*rows, point])
        logger.info(
            "iteration %d: AP %.1f  AP50 %.1f  AP75 %.1f  (%d test pictures in %s)",
            *point.values(),
            *(result.num_images, duration(result.seconds)),
        )
        return {"bbox": result.means}


def point_at_newest(folder: Path) -> None:
    """Write which checkpoint training goes on from; damaged ones are passed over with a word."""
    pointer = folder / "last_checkpoint"
    paths = sorted(folder.glob("model_*.pth"), reverse=True)  # "final" is after all numbers
    if len(paths) > 1 and paths[0].name == "model_final.pth":  # of a shorter training, perhaps
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            final, end = paths[0], f"model_{checkpoints.read(paths[0])['iteration']:07d}.pth"
            paths.sort(key=lambda path: end if path == final else path.name, reverse=True)
    for path in paths:
        try:
            content = checkpoints.read(path)
        except UserError as error:
            logger.warning("%s; going on from an earlier state", error)
            continue
        if files.has_form(content, {"model": dict, "trainer": dict}):
            files.write_text(pointer, path.name)
            return
        logger.warning("%s: is no checkpoint of a training; going on from an earlier state", path)
    pointer.unlink(missing_ok=True)


def train_in_bfloat16(model: nn.Module) -> None:
    """Let training steps run the model under autocast; statistics and evaluations stay as they are.

    bfloat16 has the exponents of float32, so that losses need no scaling.
    """
    forward = model.forward

    def in_autocast(batch: list[dict[str, Any]]) -> Any:
        is_step = model.training and torch.is_grad_enabled()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_step):
            return forward(batch)

    model.forward = in_autocast


class Trainer(DefaultTrainer):
    """Trains one detector on one seed and evaluates it."""

    def __init__(self, cfg: CfgNode, data: LabelledSet) -> None:
        """Build model, optimiser, loader and hooks.

        Args:
            cfg: Complete and frozen; DATASETS name lists registered from `data`.
            data: The set they come from.

        Raises:
            UserError: If no picture that is evaluated holds an object that counts.
        """
        self.data, self.folder = data, Path(cfg.OUTPUT_DIR)
        evaluated_split(cfg, data)  # before hours of training
        self.clock = RunClock()
        with warnings.catch_warnings():  # about a scaler without CUDA
            warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp\.GradScaler")
            super().__init__(cfg)
        if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":  # Detectron2's needs CUDA
            own = self._trainer
            self._trainer = SimpleTrainer(own.model, own.data_loader, own.optimizer)
            train_in_bfloat16(own.model)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's model, with a faster backward pass on a CPU."""
        model = super().build_model(cfg)
        speed_up_backward(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        """The training stream from its beginning."""
        return build_train_loader(cfg)

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Detectron2's default hooks in their order, with ours in their places.

        Those that write are registered by `start`: a resumed run cuts their file back first.
        """
        cfg = self.cfg
        self.checkpointer = RunCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.checkpointer.description = describe(cfg, self.data.classes)
        self.curve = CurveHook(cfg.TEST.EVAL_PERIOD, self.evaluate, self.folder / "curve.jsonl")
        built: list[hooks.HookBase | None] = [
            hooks.IterationTimer(),
            self.clock,
            hooks.CallbackHook(before_step=seed_step),
            hooks.LRScheduler(),
        ]
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            loader = build_train_loader(cfg, purpose="precise-bn", num_workers=0)
            num_batches = cfg.TEST.PRECISE_BN.NUM_ITER
            built.append(FreshPreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, num_batches))
        if comm.is_main_process():
            period = cfg.SOLVER.CHECKPOINT_PERIOD
            built.append(
                hooks.PeriodicCheckpointer(self.checkpointer, period, max_to_keep=_CHECKPOINTS_KEPT)
            )
        return [*built, self.curve]

    def start(self, weights: Path | None) -> None:
        """Go on from the last checkpoint, or begin from weights (None: random).

        Raises:
            UserError: If the weights do not match.
        """
        if comm.is_main_process():
            files.remove_partial_files(self.folder)
            point_at_newest(self.folder)
        comm.synchronize()
        if self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            self.start_iter = self.iter + 1
            # The rate of this iteration by this config: the checkpoint's may have been shorter.
            for group, rate in zip(
                self.optimizer.param_groups, self.scheduler.get_lr(), strict=True
            ):
                group["lr"] = rate
            self._trainer.reset_data_loader(
                lambda: build_train_loader(self.cfg, start_iteration=self.start_iter)
            )
            logger.info("resuming after iteration %d of %d", self.start_iter, self.max_iter)
        else:
            model = self.checkpointer.model  # without its distributed wrapper
            if weights is not None:
                num_tensors = load_backbone(model, weights)
                logger.info("%s: all %d backbone tensors loaded", weights.name, num_tensors)
            num_batches = self.cfg.MODEL.BACKBONE.CALIBRATE_BN_BATCHES
            batches = build_train_loader(
                self.cfg, purpose="calibrate", all_ranks_alike=True, num_workers=0
            )
            num_norms = calibrate_frozen_norms(model, batches, num_batches)
            if num_norms:
                logger.info(
                    "%d frozen batch norms: statistics measured on %d batches of training pictures",
                    num_norms,
                    num_batches,
                )
        if comm.is_main_process():
            metrics = self.folder / "metrics.json"
            rows = files.read_json_lines(metrics, _ROW, report=logger.warning)
            files.write_json_lines(
                metrics, [row for row in rows if row["iteration"] < self.start_iter]
            )
            # The newest value of everything that is measured, not smoothed.
            writers = [JSONWriter(str(metrics), window_size=1), CommonMetricPrinter(self.max_iter)]
            period = min(_PRINT_PERIOD, self.max_iter)
            self.register_hooks([hooks.PeriodicWriter(writers, period=period)])

    def evaluate(self) -> Evaluation | None:
        """Evaluate the detector as it is; None on other ranks than the first.

        All take the first one's batch statistics, which are those of the checkpoints.
        """
        share_buffers(self.model)
        loader = build_test_loader(self.cfg, self.cfg.DATASETS.TEST[0])
        return evaluate_detector(self.cfg, self.model, loader, self.data)
