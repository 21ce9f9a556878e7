"""One arm: a config, weights and data, trained once per seed; what is finished is kept."""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import contextlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from common import files, provenance
from common.annotations.record import LabelledSet, SetChoice, read_set
from common.backbone import read_own_card
from common.config import dotted, one_line
from common.errors import UserError, require
from common.picture_draws import METRICS
from common.threads import choose_threads
from detection.evaluation.evaluate import Evaluation, evaluated_split
from detection.training.config import (
    arch_of_config,
    check_device,
    first_other_rate,
    load_config,
    set_num_classes,
    write_config,
)
from detection.training.data import BoxMapper, register
from detection.training.labels import describe
from detection.training.trainer import Trainer
from detection.training.weights import check_card

# Detectron2 makes these at run time.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
logger = logging.getLogger(__name__)
_FORWARD_SHARE = 1 / 3  # of the time of a training step
# Config keys that change no result: where it runs, where it writes, names made from hashes.
_NOT_COMPARED = (
    *("OUTPUT_DIR", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS", "DATASETS.TRAIN", "DATASETS.TEST"),
    *("SEED", "SOLVER.CHECKPOINT_PERIOD", "VERSION"),
)
_RESULT_FILES = (
    *("result.json", "curve.jsonl", "metrics.json", "last_checkpoint", "*.pth"),
    *("detections.json", "pr.json", "errors.json"),
)


_RESULT = {"arm": str, "seed": int, "classes": list, **dict.fromkeys(METRICS, files.NUMBER)}


@dataclass(frozen=True)
class ArmSettings:
    """What is trained.

    Attributes:
        weights: A converted backbone, None: random.
        config: A YAML of configs/detection/.
        data: A labelled set.
        choice: Its format, lists, classes and metric.
        overrides: Dotted key of the config -> value as text.
        freeze: Whether the whole backbone before the ROI head is frozen.
        name: In the results; None: made from weights and `freeze`.
        num_gpus: Processes, one GPU each; None: all GPUs that are there.
        needs_card: Whether weights without a card are refused.
    """

    weights: Path | None
    config: Path
    data: Path
    choice: SetChoice = SetChoice()  # noqa: RUF009 (frozen)
    overrides: Mapping[str, str] = field(default_factory=dict)
    freeze: bool = False
    name: str | None = None
    num_gpus: int | None = 1
    needs_card: bool = True


@dataclass(frozen=True)
class Arm:
    """What all seeds of an arm share, read and checked.

    `compared` is what decides a seed's result: flat, so that differences can be named.
    """

    name: str
    cfg: CfgNode
    data: LabelledSet
    weights: Path | None
    num_gpus: int
    compared: dict[str, Any]


def run_arm(
    settings: ArmSettings,
    out: Path,
    seeds: Sequence[int],
    *,
    num_threads: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train and evaluate every seed that is not finished, then summarise.

    Args:
        settings: What is trained.
        out: Folder for the results.
        seeds: One run each.
        num_threads: On the CPU; None: as many as there are free cores.
        overwrite: Whether seeds made with other settings are trained again.

    Returns:
        What summary.json holds.

    Raises:
        UserError: For wrong input, before any training; another process works on a seed.
    """
    arm = prepare(settings)
    results = []
    for seed in seeds:
        folder = out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with files.held(folder / files.LOCK):
            if not is_finished(folder, arm.compared, overwrite=overwrite):
                # A seed that is continued goes on with as many threads, so that it rounds alike.
                record = files.read_record_or_none(folder / "run.json", {"num_threads": int}) or {}
                chosen = choose_threads(num_threads or 0, record.get("num_threads"))
                record = {"settings": arm.compared, "seed": seed, "num_threads": chosen}
                files.write_json(folder / "run.json", record)
                arguments = (arm, seed, folder, chosen)
                launch(_train_seed, arm.num_gpus, dist_url="auto", args=arguments)
            results.append(read_result(folder / "result.json"))
    summary = summarise(results, seeds)
    files.write_json(out / "summary.json", summary)
    return summary


def prepare(settings: ArmSettings) -> Arm:
    """Read and check set, config and weights.

    Raises:
        UserError: For wrong input.
    """
    num_gpus = settings.num_gpus
    if num_gpus is None:
        num_gpus = max(1, torch.cuda.device_count())
    require(num_gpus >= 1, f"--num-gpus {num_gpus}: give 1 or more; 1 is right for the CPU")
    cfg = load_config(settings.config, settings.overrides, num_gpus=num_gpus)
    lists = {
        "usual_train": "+".join(cfg.DATASETS.TRAIN) or None,
        "usual_test": "+".join(cfg.DATASETS.TEST) or None,
    }
    data = read_set(settings.data, replace(settings.choice, **lists))

    # The rest of the config follows from the data set, the options and the device.
    set_num_classes(cfg, len(data.classes))
    if settings.freeze:
        cfg.MODEL.BACKBONE.FREEZE_AT = 5 if "fpn" in cfg.MODEL.BACKBONE.NAME else 4
    check_device(cfg)
    if num_gpus > 1 and torch.cuda.device_count() < num_gpus:
        raise UserError(f"--num-gpus {num_gpus}: this machine has {torch.cuda.device_count()}")
    if cfg.SOLVER.IMS_PER_BATCH % num_gpus:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide by --num-gpus "
            f"{num_gpus}; change one of them"
        )

    weights = settings.weights
    if weights is not None and settings.needs_card:
        check_card(weights, cfg)
    elif weights is not None and (fault := read_own_card(weights)[1]):
        raise UserError(f"{weights}: {fault}: it is damaged, or the card is another file's; "
                        "copy both again, or remove the card")  # fmt: skip
    start = "random" if weights is None else "pretrained"
    compared = {key: value for key, value in dotted(cfg).items() if key not in _NOT_COMPARED} | {
        "weights_sha256": files.sha256_of(weights) if weights else "random",
        "data_sha256": data.digest(),
        "num_gpus": num_gpus,
    }
    if cfg.TEST.NUM_IMAGES:  # version 0.1 took the first ones
        compared["evaluated"] = "evenly"
    return Arm(
        settings.name or start + ("_frozen" if settings.freeze else ""),
        cfg,
        data,
        weights,
        num_gpus,
        json.loads(json.dumps(compared)),  # as run.json gives it back
    )


def is_finished(folder: Path, compared: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether a seed's result is there, whole and made with these settings.

    A higher SOLVER.MAX_ITER continues the seed: its result is removed, its checkpoints stay.

    Raises:
        UserError: If what is there was made with other settings, or with settings that are no
            longer known, and `overwrite` is false.
    """
    there = [file for pattern in _RESULT_FILES for file in folder.glob(pattern)]
    record = files.read_record_or_none(folder / "run.json", {"settings": dict})
    reason = ""
    if record is not None:
        old = record["settings"]
        changed = sorted(key for key in {*old, *compared} if old.get(key) != compared.get(key))
        if not overwrite and _continues(folder, old, compared, changed):
            (folder / "result.json").unlink(missing_ok=True)
            return False
        listed = [f"{key}: {old.get(key)} -> {compared.get(key)}" for key in changed[:4]]
        more = ["..", *listed][: len(changed) > 4]
        reason = f"was made with other settings ({'; '.join([*listed, *more])})" if changed else ""
    elif there:
        reason = "run.json, which tells its settings, is missing or damaged"
    if not reason:
        result = folder / "result.json"
        if result.is_file() and read_result(result) is None:
            print(f"warning: {result} is damaged; the seed is evaluated again", file=sys.stderr)
        return read_result(result) is not None
    if not overwrite:
        raise UserError(
            f"{folder}: {reason}; choose another --out, or run it again with --overwrite"
        )
    for file in there:
        file.unlink()
    return False


_LAST = "SOLVER.MAX_ITER"
_SCHEDULE = {_LAST, "SOLVER.STEPS", "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_ITERS"}


def _continues(
    folder: Path, old: dict[str, Any], new: dict[str, Any], changed: Sequence[str]
) -> bool:
    """Whether a seed only has to train longer: its iterations so far would be the same ones.

    Raises:
        UserError: If it is only longer, but they would have had other learning rates.
    """
    is_known = set(changed) <= _SCHEDULE & old.keys() and old.keys() == new.keys()
    if not is_known or old[_LAST] >= new[_LAST]:
        return False
    faults = first_other_rate(old, new)
    if faults is None:
        return True
    iteration, one, other = faults
    kept = {key: old[key] for key in changed if key != _LAST}
    remedy = "choose another --out, or --overwrite"
    if kept and first_other_rate(old, new | kept) is None:
        words = " ".join(f"{key}={json.dumps(x, separators=(',', ':'))}" for key, x in kept.items())
        remedy = f"give {words}, too (STEPS may have more, from {old[_LAST]} on), or {remedy}"
    raise UserError(
        f"{folder}: cannot go on to {_LAST} {new[_LAST]}: its iteration {iteration} had {one:.4g} "
        f"times SOLVER.BASE_LR, this schedule ({new['SOLVER.LR_SCHEDULER_NAME']}) has {other:.4g} "
        f"there; {remedy}"
    )


def read_result(path: Path) -> dict[str, Any] | None:
    """A seed's result.json or eval-on-NAME.json; None where it is missing or damaged."""
    return files.read_record_or_none(path, _RESULT)


def _train_seed(arm: Arm, seed: int, folder: Path, num_threads: int | None) -> None:
    """Train and evaluate one seed; runs in every process of a distributed run."""
    cfg, data = arm.cfg.clone(), arm.data
    cfg.SEED, cfg.OUTPUT_DIR = seed, str(folder)
    cfg.DATASETS.TRAIN, test = register(data)
    cfg.DATASETS.TEST = (test,)
    cfg.freeze()
    if num_threads:
        torch.set_num_threads(num_threads)
    log_to(folder)
    for note in data.notes:
        logger.info("%s: %s", data.root, note)
    if comm.is_main_process():
        write_config(cfg, folder / "config.yaml")
        files.write_json(folder / "labels.json", describe(data))
    logger.info(
        "%s, seed %d: %d training and %d test pictures, %d classes, %d iterations on %s",
        *(arm.name, seed, data.num_train, len(data.test.pictures), len(data.classes)),
        *(cfg.SOLVER.MAX_ITER, cfg.MODEL.DEVICE),
    )
    seed_all_rng(seed)
    trainer = Trainer(cfg, data)
    trainer.start(arm.weights)
    trainer.train()
    if not comm.is_main_process():
        return
    last = trainer.curve.last
    assert last is not None
    newest = folder / (folder / "last_checkpoint").read_text()
    if newest.name != "model_final.pth":  # that one is damaged, and this one stood in for it
        newest.replace(folder / "model_final.pth")
    write_details(last, folder)
    result = {
        "arm": arm.name,
        "seed": seed,
        **last.to_json(),
        "classes": list(data.classes),
        "classes_without_test_objects": last.absent,
        "iterations": trainer.max_iter,
        "seconds": trainer.clock.seconds(),
        "weights": arm.weights.name if arm.weights else "random",
        "weights_sha256": arm.compared["weights_sha256"],
        "frozen": cfg.MODEL.BACKBONE.FREEZE_AT >= 4,
        "metric_year": data.metric_year,
        "num_train_images": data.num_train,
        "peak_memory_bytes": provenance.peak_memory_bytes(),
        "num_threads": torch.get_num_threads(),
        "versions": provenance.versions(),
    }
    files.write_json(folder / "result.json", result)  # last: its presence says "finished"
    for checkpoint in folder.glob("model_0*.pth"):  # model_final.pth stays
        checkpoint.unlink()


def write_details(evaluation: Evaluation, folder: Path, prefix: str = "") -> None:
    """Write detections.json, pr.json (curves) and errors.json."""
    files.write_json(folder / f"{prefix}detections.json", evaluation.detections)
    files.write_json(folder / f"{prefix}pr.json", evaluation.curves_to_json())
    files.write_json(folder / f"{prefix}errors.json", evaluation.errors)


def summarise(results: list[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1; null for one seed) of AP, AP50 and AP75 in percent.

    "coco" holds the means by COCO's metric; null if a result of an older version has none.
    """
    columns = {key: [result[key] for result in results] for key in METRICS}
    mean = {key: statistics.fmean(values) for key, values in columns.items()}
    is_one, coco = len(results) == 1, None
    std = {key: None if is_one else statistics.stdev(x) for key, x in columns.items()}
    if all(row.get("coco") for row in results):
        coco = {key: statistics.fmean(row["coco"][key] for row in results) for key in METRICS}
    return {"n": len(results), "mean": mean, "std": std, "seeds": list(seeds), "coco": coco}


def log_to(folder: Path) -> None:
    """Everything to log.txt; our own lines and Detectron2's progress to the console."""
    rank = comm.get_rank()
    path = folder / ("log.txt" if rank == 0 else f"log.txt.rank{rank}")
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    progress = "detectron2.utils.events"  # its lines reach log.txt through "detectron2"
    for name in ("detection", "detectron2", "fvcore", progress):
        source = logging.getLogger(name)
        for handler in list(source.handlers):
            source.removeHandler(handler)
            handler.close()
        source.setLevel(logging.INFO)
        if name != progress:
            source.propagate = False
            source.addHandler(file)
        if rank == 0 and name in ("detection", progress):
            source.addHandler(console)


# -- --check ---------------------------------------------------------------------------------------


def check(settings: ArmSettings, *, has_data: bool) -> dict[str, Any]:
    """Return what a seed would build and need.

    Args:
        settings: What would be trained.
        has_data: Whether the set is there already: it is read, and every picture is opened.
    Returns:
        `arch`, `pixel_mean` and `pixel_std` (0..255), `input_format` and `stride_in_1x1` of the
        detector, `num_train` and `num_test` (None: not known), `notes` (what was repaired in the
        annotations), `seconds` (from one step on a blank picture, so it says little more than the
        order of magnitude), `disk_bytes`.
    Raises:
        UserError: For wrong input.
    """
    num_train, num_test, notes = None, None, []
    if has_data:
        choice = replace(settings.choice, decodes=True)
        arm = prepare(replace(settings, choice=choice))
        cfg = arm.cfg
        num_train, num_test = arm.data.num_train, len(evaluated_split(cfg, arm.data).pictures)
        notes = [f"{arm.data.root}: {note}" for note in arm.data.notes]
    else:
        cfg = load_config(settings.config, settings.overrides, num_gpus=settings.num_gpus or 1)
        check_device(cfg)

    # One step on a blank picture with one object. It is measured in processor time of one thread,
    # so that other programs beside this one do not count.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cfg.MODEL.WEIGHTS = ""
    with _refusals_explained(settings.config):
        model = build_model(cfg).train()
        Trainer.build_lr_scheduler(cfg, Trainer.build_optimizer(cfg, model))
        for is_train in (True, False):
            BoxMapper(cfg, is_train=is_train).of_pixels(np.zeros((480, 640, 3), np.uint8))
    side = int(cfg.INPUT.MIN_SIZE_TRAIN[0])
    instances = Instances((side, side))
    instances.gt_boxes = Boxes(torch.tensor([[side / 4, side / 4, side / 2, side / 2]]))
    instances.gt_classes = torch.zeros(1, dtype=torch.int64)
    item = {"image": torch.zeros(3, side, side, dtype=torch.uint8), "instances": instances}
    started = 0.0
    with _refusals_explained(settings.config), EventStorage():
        for _ in range(2):  # the first warms up
            started = time.process_time()
            torch.stack(list(model([dict(item)]).values())).sum().backward()
    torch.set_num_threads(num_threads)  # of the next check in this process
    seconds = (time.process_time() - started) / (num_threads if cfg.MODEL.DEVICE == "cpu" else 1)
    solver = cfg.SOLVER
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    per_evaluation = seconds * _FORWARD_SHARE * (num_test or 0)
    num_evaluations = solver.MAX_ITER // cfg.TEST.EVAL_PERIOD if cfg.TEST.EVAL_PERIOD else 1
    return {
        "arch": asdict(arch_of_config(cfg)),
        "pixel_mean": [float(value) for value in cfg.MODEL.PIXEL_MEAN],
        "pixel_std": [float(value) for value in cfg.MODEL.PIXEL_STD],
        "input_format": cfg.INPUT.FORMAT,
        "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.RESNETS.DEPTH >= 50,
        "num_train": num_train,
        "num_test": num_test,
        "notes": notes,
        "seconds": solver.MAX_ITER * solver.IMS_PER_BATCH * seconds
        + num_evaluations * per_evaluation,
        "disk_bytes": 6 * num_bytes,  # two checkpoints with momentum, the last weights
    }


@contextlib.contextmanager
def _refusals_explained(config: Path) -> Iterator[None]:
    """Detectron2 finds out late what does not fit: its errors about settings as a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        raise UserError(
            f"{config}: Detectron2 cannot train with these settings ({one_line(error)}); take back "
            "the last override or change of the file"
        ) from error
