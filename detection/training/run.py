"""One arm: a config, weights and data, trained once per seed; what is finished is kept."""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import argparse
import json
import logging
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from common import provenance
from common.annotations.record import read_class_names
from common.errors import UserError
from common.files import read_json, sha256_of, write_json, write_text
from detection.dataset import VocSet, is_coco, read_coco, read_set
from detection.evaluation.voc import curves_file, measured
from detection.training.config import check_device, flatten, load_config
from detection.training.data import register
from detection.training.protocol import schedule_table
from detection.training.trainer import Trainer
from detection.training.weights import check_card

logger = logging.getLogger(__name__)
_METRICS = ("AP", "AP50", "AP75")
# Settings that change no result: where it runs, where it writes, names made from hashes.
_NOT_COMPARED = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "SEED",
    "SOLVER.CHECKPOINT_PERIOD",
    "VERSION",
)


@dataclass(frozen=True)
class Job:
    """One seed of an arm; `settings` is what decides its result."""

    arm: str
    seed: int
    folder: Path
    weights: Path | None
    num_threads: int | None
    settings: dict[str, Any]


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate every seed that is not finished, then summarise.

    Args:
        arguments: As tools.train_voc parses them, with `seed_list`.

    Returns:
        What summary.json holds.

    Raises:
        UserError: For wrong input, before any training.
    """
    arm = prepare(arguments)
    _show_schedule(arguments, arm.cfg)
    results = []
    for seed in arguments.seed_list:
        folder = arguments.out / f"seed-{seed}"
        if not is_finished(folder, arm.settings, overwrite=arguments.overwrite):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", {"settings": arm.settings, "seed": seed})
            job = Job(arm.name, seed, folder, arm.weights, arguments.threads, arm.settings)
            launch(
                _train_seed,
                arguments.num_gpus,
                dist_url="auto",
                args=(arm.cfg, arm.voc, job),
            )
        results.append(read_json(folder / "result.json"))
    summary = summarise(results, arguments.seed_list)
    write_json(arguments.out / "summary.json", summary)
    return summary


@dataclass(frozen=True)
class Arm:
    """What all seeds of an arm share; `settings` is what decides a seed's result."""

    name: str
    cfg: CfgNode
    voc: VocSet
    weights: Path | None
    settings: dict[str, Any]


def prepare(arguments: argparse.Namespace) -> Arm:
    """Read and check set, config and weights.

    Raises:
        UserError: For wrong input.
    """
    if arguments.num_gpus == "auto":
        arguments.num_gpus = max(1, torch.cuda.device_count())
    voc = _read_data(arguments)
    cfg = arm_config(arguments, voc)
    weights = None if arguments.weights == "random" else Path(arguments.weights)
    if weights is not None and not arguments.no_card:
        check_card(weights, cfg)
    name = arguments.arm or (
        ("random" if weights is None else "pretrained") + ("_frozen" if arguments.freeze else "")
    )
    return Arm(name, cfg, voc, weights, _settings(cfg, voc, weights, arguments.num_gpus))


def _read_data(arguments: argparse.Namespace) -> VocSet:
    """The set of --data, of VOC's layout or of COCO's."""
    lists = {"train_split": arguments.train_split, "test_split": arguments.test_split}
    if not is_coco(arguments.data):
        classes = read_class_names(arguments.classes) if arguments.classes else None
        return read_set(arguments.data, metric_year=arguments.metric_year, classes=classes, **lists)
    if arguments.classes or arguments.metric_year:
        raise UserError(
            f"{arguments.data}: is a COCO folder, whose annotations name the classes and whose "
            "metric is COCO's; leave --classes and --metric-year out"
        )
    return read_coco(arguments.data, **lists)


def arm_config(arguments: argparse.Namespace, voc: VocSet) -> CfgNode:
    """The Detectron2 config of an arm: file, overrides, data set and device filled in."""
    if arguments.num_gpus < 1:
        raise UserError(f"--num-gpus {arguments.num_gpus}: give 1 or more; 1 is right for the CPU")
    cfg = load_config(arguments.config, arguments.opts, num_gpus=arguments.num_gpus)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(voc.classes)
    if arguments.freeze:
        is_fpn = "fpn" in cfg.MODEL.BACKBONE.NAME
        cfg.MODEL.BACKBONE.FREEZE_AT = 5 if is_fpn else 4
    if arguments.eval_every is not None:
        cfg.TEST.EVAL_PERIOD = arguments.eval_every
    if arguments.num_eval_images is not None:
        cfg.TEST.NUM_IMAGES = arguments.num_eval_images
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_device(cfg)
    if arguments.num_gpus > 1 and torch.cuda.device_count() < arguments.num_gpus:
        raise UserError(
            f"--num-gpus {arguments.num_gpus}: this machine has {torch.cuda.device_count()}"
        )
    if cfg.SOLVER.IMS_PER_BATCH % arguments.num_gpus:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide by "
            f"--num-gpus {arguments.num_gpus}; change one of them"
        )
    return cfg


def _show_schedule(arguments: argparse.Namespace, cfg: CfgNode) -> None:
    """Print a protocol's schedule beside the one that is run; other configs have none."""
    key = "SOLVER.REFERENCE_WORLD_SIZE"
    given = dict(zip(arguments.opts[::2], arguments.opts[1::2], strict=True))
    protocol = load_config(arguments.config, [key, given[key]] if key in given else [])
    if protocol.SOLVER.REFERENCE_WORLD_SIZE > 0:
        print(schedule_table(protocol, cfg, arguments.num_gpus), flush=True)


def _settings(cfg: CfgNode, voc: VocSet, weights: Path | None, num_gpus: int) -> dict[str, Any]:
    """What decides a seed's result: flat, so that differences can be named."""
    flat = {key: value for key, value in flatten(cfg).items() if key not in _NOT_COMPARED}
    return json.loads(
        json.dumps(
            {
                **flat,
                "weights_sha256": sha256_of(weights) if weights else "random",
                "data_sha256": voc.digest(),
                "num_gpus": num_gpus,
            }
        )
    )


def is_finished(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether a seed's result is there and made with these settings.

    Raises:
        UserError: If what is there was made with others and --overwrite was not given.
    """
    record = folder / "run.json"
    if not record.is_file():
        return False
    old = read_json(record)["settings"]
    changed = sorted(key for key in {*old, *settings} if old.get(key) != settings.get(key))
    if not changed:
        return (folder / "result.json").is_file()
    if not overwrite:
        shown = "; ".join(f"{key}: {old.get(key)} -> {settings.get(key)}" for key in changed[:4])
        raise UserError(
            f"{folder}: was made with other settings ({shown}"
            f"{'; ..' if len(changed) > 4 else ''}); choose another --out, or run it "
            "again with --overwrite"
        )
    for pattern in (
        "result.json",
        "curve.jsonl",
        "metrics.json",
        "last_checkpoint",
        "*.pth",
        "detections.json",
        "pr.json",
        "errors.json",
    ):
        for file in folder.glob(pattern):
            file.unlink()
    return False


def _train_seed(cfg: CfgNode, voc: VocSet, job: Job) -> None:
    """Train and evaluate one seed; runs in every process of a distributed run."""
    cfg = cfg.clone()
    cfg.SEED, cfg.OUTPUT_DIR = job.seed, str(job.folder)
    cfg.DATASETS.TRAIN, test = register(voc)
    cfg.DATASETS.TEST = (test,)
    cfg.freeze()
    if job.num_threads:
        torch.set_num_threads(job.num_threads)
    log_to(job.folder)
    if comm.is_main_process():
        write_text(job.folder / "config.yaml", cfg.dump())
    logger.info(
        "%s, seed %d: %d training and %d test pictures, %d classes, %d iterations on %s",
        *(job.arm, job.seed, voc.num_train, len(voc.test.pictures), len(voc.classes)),
        *(cfg.SOLVER.MAX_ITER, cfg.MODEL.DEVICE),
    )
    seed_all_rng(job.seed)
    trainer = Trainer(cfg, voc)
    trainer.start(job.weights)
    trainer.train()
    if comm.is_main_process():
        _write_results(trainer, job)


def _write_results(trainer: Trainer, job: Job) -> None:
    """Write detections, curves and errors, then result.json: its presence says "finished"."""
    last = trainer.curve.last
    write_json(job.folder / "detections.json", last["detections"])
    write_json(job.folder / "pr.json", curves_file(last, trainer.voc.metric_year))
    write_json(job.folder / "errors.json", last["errors"])
    result = {
        "arm": job.arm,
        "seed": job.seed,
        **measured(last),
        "classes": list(trainer.voc.classes),
        "classes_without_test_objects": trainer.absent,
        "iterations": trainer.max_iter,
        "seconds": trainer.clock.seconds(),
        "weights": job.weights.name if job.weights else "random",
        "weights_sha256": job.settings["weights_sha256"],
        "frozen": trainer.cfg.MODEL.BACKBONE.FREEZE_AT >= 4,
        "metric_year": trainer.voc.metric_year,
        "num_train_images": trainer.voc.num_train,
        "peak_memory_bytes": provenance.peak_memory_bytes(),
        "num_threads": torch.get_num_threads(),
        "versions": provenance.versions(),
    }
    write_json(job.folder / "result.json", result)
    for checkpoint in job.folder.glob("model_0*.pth"):  # model_final.pth stays
        checkpoint.unlink()


def summarise(results: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1; null for one seed) of AP, AP50 and AP75 in percent.

    "coco" holds the means by COCO's metric, where every seed has it.
    """
    columns = {key: [result[key] for result in results] for key in _METRICS}
    return {
        "n": len(results),
        "mean": {key: statistics.fmean(values) for key, values in columns.items()},
        "std": {
            key: statistics.stdev(values) if len(values) > 1 else None
            for key, values in columns.items()
        },
        "seeds": list(seeds),
        **_coco_means(results),
    }


def _coco_means(results: list[dict[str, Any]]) -> dict[str, Any]:
    if not all("coco" in result for result in results):  # made by an older version
        return {}
    rows = [result["coco"] for result in results]
    return {"coco": {key: statistics.fmean(row[key] for row in rows) for key in _METRICS}}


def log_to(folder: Path) -> None:
    """Everything to log.txt; for people our own lines and the others' warnings."""
    rank = comm.get_rank()
    file = logging.FileHandler(folder / ("log.txt" if rank == 0 else f"log.txt.rank{rank}"))
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    for name in ("detection", "detectron2", "fvcore"):
        source = logging.getLogger(name)
        for handler in list(source.handlers):
            source.removeHandler(handler)
            handler.close()
        source.setLevel(logging.INFO)
        source.propagate = False
        source.addHandler(file)
        if rank == 0:
            console = logging.StreamHandler(sys.stdout)
            console.setFormatter(logging.Formatter("%(message)s"))
            console.setLevel(logging.INFO if name == "detection" else logging.CRITICAL)
            source.addHandler(console)
