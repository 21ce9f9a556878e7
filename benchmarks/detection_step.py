"""Processor time of a detector's training step and of its evaluation, beside plain Detectron2's.

Every candidate starts from the same weights and takes the same pictures, generated scenes of the
demo, in one thread. They take turns, round by round.

ours: the trainer of train_voc.sh. Detectron2: its own model in the same loop, with the same loader.
bfloat16: ours with SOLVER.AMP.ENABLED=True.

"step_ms": medians over rounds, by stage. "ratio": Detectron2 / ours in the same round (median,
smallest, largest). "largest_difference": of all losses of ours from Detectron2's, relative.
"evaluation_ms": of a test picture. "metric_ms": VOC's AP of all test pictures, here in one pass and
by Detectron2's evaluator; both must say the same.

Examples:
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/detection_step.py --json detection.json
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/detection_step.py --cells R18_FPN@320
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks import harness
from common.errors import require
from common.memory import keep_freed_memory
from detection.evaluation.evaluate import Collector, voc_metric
from detection.training import run
from detection.training.data import build_test_loader, register
from detection.training.run import ArmSettings
from detection.training.trainer import Trainer
from tools import make_dataset

COUNTS = [
    ("rounds", 5, 1, "turns of each candidate"),
    ("steps", 4, 1, "training steps of a turn"),
    ("pictures", 32, 1, "test pictures"),
]
CELLS = "thin_R50_C4@128,R18_FPN@128,thin_R50_C4@320,R18_FPN@320"
OURS, STOCK, BFLOAT16 = "ours", "Detectron2", "bfloat16"
STAGES = ("load", "forward", "backward", "optimiser")
NUM_TRAIN = 24


class StockTrainer(Trainer):
    """The same loop with the model as Detectron2 builds it."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Without anything of ours."""
        return DefaultTrainer.build_model(cfg)


class Candidate:
    """A trainer whose steps are timed."""

    def __init__(self, arm: run.Arm, name: str, folder: Path) -> None:
        cfg = arm.cfg.clone()
        cfg.SEED, cfg.OUTPUT_DIR = harness.SEED, str(folder)
        cfg.DATASETS.TRAIN, test = register(arm.data)
        cfg.DATASETS.TEST = (test,)
        cfg.SOLVER.AMP.ENABLED = name == BFLOAT16
        cfg.freeze()
        seed_all_rng(harness.SEED)
        self.trainer = (StockTrainer if name == STOCK else Trainer)(cfg, arm.data)
        self.losses: list[list[float]] = []

    def steps(self, num: int) -> dict[str, float]:
        """Train; milliseconds of a step by stage."""
        loop, times = self.trainer._trainer, dict.fromkeys(STAGES, 0.0)
        for _ in range(num):
            torch.manual_seed(len(self.losses))
            marks = [time.process_time()]
            batch = next(loop._data_loader_iter)
            marks.append(time.process_time())
            with EventStorage():
                losses = loop.model(batch)
            marks.append(time.process_time())
            loop.optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            marks.append(time.process_time())
            loop.optimizer.step()
            marks.append(time.process_time())
            self.losses.append([float(value.detach()) for value in losses.values()])
            for stage, (before, after) in zip(STAGES, pairwise(marks), strict=True):
                times[stage] += 1e3 * (after - before) / num
        return times | {"whole": sum(times.values())}


def measure_steps(candidates: dict[str, Candidate], options: argparse.Namespace) -> dict[str, Any]:
    """Time the training steps."""
    turns = {name: partial(one.steps, options.steps) for name, one in candidates.items()}
    rounds = harness.take_turns(turns, options.rounds)
    whole = {name: [times["whole"] for times in found] for name, found in rounds.items()}
    ratios = {name: harness.ratios(whole[STOCK], whole[name]) for name in (OURS, BFLOAT16)}
    ours, theirs = (torch.tensor(candidates[name].losses) for name in (OURS, STOCK))
    return {
        "step_ms": {
            name: {stage: statistics.median(times[stage] for times in found) for stage in found[0]}
            for name, found in rounds.items()
        },
        "ratio": {
            name: [statistics.median(values), min(values), max(values)]
            for name, values in ratios.items()
        },
        "num_steps_compared": len(ours),
        "largest_difference": float(((ours - theirs).abs() / theirs.abs().clamp_min(1e-9)).max()),
    }


def measure_evaluation(trainer: Trainer, num_rounds: int) -> dict[str, Any]:
    """Time loading, forward pass and metric of the test pictures.

    Raises:
        RuntimeError: If the two metrics differ.
    """
    cfg, split, classes = trainer.cfg, trainer.data.test, trainer.data.classes
    name = f"{cfg.DATASETS.TEST[0]}-stock"
    MetadataCatalog.get(name).set(
        thing_classes=list(classes), dirname=str(split.folder), year=2012, split=split.name
    )
    collector, stock = Collector(split), PascalVOCDetectionEvaluator(name)
    MetadataCatalog.remove(name)
    collector.reset()
    stock.reset()

    def timed(work: Callable[[], Any], times: list[float]) -> Any:
        before = time.process_time()
        result = work()
        times.append(1e3 * (time.process_time() - before))
        return result

    model, times = trainer._trainer.model.eval(), {"load": [], "forward": []}
    batches = iter(build_test_loader(cfg, cfg.DATASETS.TEST[0]))
    with torch.no_grad():
        while (batch := timed(partial(next, batches, None), times["load"])) is not None:
            found = timed(partial(model, batch), times["forward"])
            collector.process(batch, found)
            stock.process(batch, found)
    result = collector.evaluate()
    assert result is not None
    boxes, figures = result["boxes"], {}

    def ours() -> None:
        rows = voc_metric(split, classes, boxes, 2012)[0].values()
        figures[OURS] = [
            statistics.fmean(getattr(row, key) for row in rows) for key in ("ap", "ap50", "ap75")
        ]

    def theirs() -> None:
        means = stock.evaluate()
        assert means is not None
        figures[STOCK] = [float(value) for value in means["bbox"].values()]

    clock = harness.Clock(torch.device("cpu"), 1)
    turns = {OURS: partial(clock, ours), STOCK: partial(clock, theirs)}
    metric = harness.take_turns(turns, num_rounds)
    if max(abs(a - b) for a, b in zip(*figures.values(), strict=True)) > 1e-9:
        raise RuntimeError(f"the metrics differ: {figures}")
    num = len(split.pictures)
    return {
        "evaluation_ms": {stage: sum(values) / num for stage, values in times.items()},
        "metric_ms": harness.medians(metric),
        "boxes_per_picture": len(boxes.score) / num,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of every cell.

    Raises:
        UserError: If a cell is not CONFIG@PIXELS, or cannot train.
    """
    logging.getLogger("detectron2").setLevel(logging.INFO)  # or a trainer prints all it does
    harness.one_thread()
    cells, sizes = {}, [cell.strip().partition("@")[::2] for cell in options.cells.split(",")]
    for config, size in sizes:
        require(size.isdecimal(), f"--cells {config}: give CONFIG@PIXELS, as thin_R50_C4@128")
    with tempfile.TemporaryDirectory() as name:
        data, num = Path(name, "scenes"), str(options.pictures)
        words = ["procedural", str(data), "--num-train", str(NUM_TRAIN), "--num-test", num]
        words += ["--num-pool", "0", "--num-probe-train", "0", "--num-probe-val", "0"]
        require(make_dataset.main(words) == 0, "the scenes could not be made")
        for config, size in sizes:
            overrides = {"SOLVER.BASE_LR": "0.001", "INPUT.MIN_SIZE_TRAIN": f"({size},)",
                         "INPUT.MIN_SIZE_TEST": size, "INPUT.MAX_SIZE_TRAIN": str(2 * int(size)),
                         "INPUT.MAX_SIZE_TEST": str(2 * int(size))}  # fmt: skip
            path = harness.ROOT / "configs/detection" / f"{config}.yaml"
            arm = run.prepare(ArmSettings(None, path, data, overrides=overrides))
            candidates = {one: Candidate(arm, one, Path(name)) for one in (OURS, STOCK, BFLOAT16)}
            cells[f"{config}@{size}"] = measure_steps(candidates, options) | measure_evaluation(
                candidates[OURS].trainer, options.rounds
            )
    return {"cells": cells, "num_pictures": options.pictures, **harness.context()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = harness.make_parser(__doc__, COUNTS)
    parser.add_argument("--cells", default=CELLS, metavar="LIST", help=f"default: {CELLS}")
    parser.add_argument("--tiny", action="store_true",
                        help="the smallest sizes: whether it runs, not how fast")  # fmt: skip
    options = parser.parse_args(argv)
    if options.tiny:
        options.cells, options.rounds, options.steps, options.pictures = "thin_R50_C4@64", 1, 2, 6
    return harness.run_and_report(lambda: measure(options), options.json)


if __name__ == "__main__":
    keep_freed_memory()  # as train_voc.sh does
    sys.exit(main())
