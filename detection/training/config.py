"""Detectron2 configs: load a YAML, apply overrides, refuse what would train wrongly.

Our own keys stand beside Detectron2's (see `add_keys`). A config that names its number of GPUs
(SOLVER.REFERENCE_WORLD_SIZE) is a protocol: its values belong together and are scaled linearly to
the GPUs at hand. With a batch b times as large, the learning rate is multiplied by b, and what is
counted in iterations divided by b, so that the number of pictures stays the same (Goyal et al.,
2017). Detectron2 does the same for the number of GPUs; here an overridden batch counts too, and the
number of iterations for precise batch norm follows.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.solver import build_lr_scheduler

from common import provenance
from common.annotations.record import checked_class_name
from common.config import dotted, find_config, parse_yaml, read_yaml_with_bases
from common.errors import UserError, require, unknown
from common.files import read_text, write_text
from common.resnet import Arch

DESCRIPTION = "fa-detector-1"  # format of what a weight file says of its detector

# Keys that an argument of the command decides -> which one.
_BY_ARGUMENT = {
    "MODEL.WEIGHTS": "give the weights as the first argument",
    "MODEL.ROI_HEADS.NUM_CLASSES": "it follows from the data set's class list",
    "MODEL.RETINANET.NUM_CLASSES": "it follows from the data set's class list",
    "DATASETS.TRAIN": "use --data and --train-split",
    "DATASETS.TEST": "use --data and --test-split",
    "OUTPUT_DIR": "use --out",
    "SEED": "use --seeds",
}

# Detectors that learn from boxes alone.
_DETECTORS = ("GeneralizedRCNN", "RetinaNet")
_NEEDS_MORE = {
    "MODEL.MASK_ON": "masks",
    "MODEL.KEYPOINT_ON": "keypoints",
    "MODEL.LOAD_PROPOSALS": "files of proposals",
}
# What Detectron2 finds out late, or never.
_LOWEST = {
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TEST": 0,
    "INPUT.MIN_SIZE_TRAIN": 1,
    "MODEL.PIXEL_STD": 1e-6,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 1,
    "SOLVER.BASE_LR": 0,
    "TEST.IMS_PER_BATCH": 1,
    "TEST.NUM_IMAGES": 0,
    "TEST.NUM_SAVED_IMAGES": 0,
}
_CHOICES = {
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),  # ours alone continues exactly
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}
_ARCH_KEYS = ("DEPTH", "WIDTH_PER_GROUP", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS")
"""Of MODEL.RESNETS, in the order of `Arch`'s fields."""
# What yacs raises; the last two come from Python's parser, for a value of a thousand brackets.
_REFUSALS = (KeyError, ValueError, AssertionError, TypeError, RecursionError, MemoryError)


def arch_of_config(cfg: CfgNode) -> Arch:
    """The ResNet that a Detectron2 config builds."""
    return Arch(*(cfg.MODEL.RESNETS[key] for key in _ARCH_KEYS))


def set_arch(cfg: CfgNode, arch: Arch) -> None:
    """Make a config build that ResNet."""
    cfg.MODEL.RESNETS.update(zip(_ARCH_KEYS, astuple(arch), strict=True))


def add_keys(cfg: CfgNode, path: Path | None = None) -> None:
    """Add the keys that this project reads beside Detectron2's own.

    - MODEL.BACKBONE.CALIBRATE_BN_BATCHES: before training, set the statistics of *frozen* batch
      norms from this many batches of training pictures (0: leave them). The same for every arm.
    - TEST.IMS_PER_BATCH: pictures per forward pass in evaluation.
    - TEST.NUM_IMAGES: evaluate on so many pictures of the test list, evenly spread (0: all).
    - TEST.NUM_SAVED_IMAGES: how many test pictures detections.json holds, evenly spread.
    - TEST.SAVED_SCORE_THRESH: lowest score in it.

    Their values are those in `extra_file(path)`, if there is one.
    """
    cfg.MODEL.BACKBONE.CALIBRATE_BN_BATCHES = 0
    cfg.TEST.IMS_PER_BATCH = 1
    cfg.TEST.NUM_IMAGES = 0
    cfg.TEST.NUM_SAVED_IMAGES = 24
    cfg.TEST.SAVED_SCORE_THRESH = 0.05
    if path is not None and extra_file(path).is_file():
        _merge_text(cfg, read_text(extra_file(path)), str(extra_file(path)))


def _merge_text(cfg: CfgNode, text: str, where: str) -> None:
    """Merge a YAML text without bases, and without running code.

    Raises:
        UserError: If it is no YAML, or its keys or values are not the config's.
    """
    try:
        cfg.merge_from_other_cfg(CfgNode(parse_yaml(text, where)))
    except (*_REFUSALS, AttributeError) as error:
        raise UserError(f"{where}: {_explain(cfg, error)}") from error


def extra_file(path: Path) -> Path:
    """Where our keys of a saved config are, so that plain Detectron2 loads the config itself."""
    return path.with_name(f"{path.stem}_extra{path.suffix}")


def dump_config(cfg: CfgNode) -> tuple[str, str]:
    """YAML of Detectron2's keys, and of ours (`add_keys`)."""
    known = dotted(get_cfg()).keys()
    plain, extra = cfg.clone(), CfgNode({"VERSION": cfg.VERSION})
    plain.defrost()
    for key in dotted(cfg).keys() - known:
        *sections, name = key.split(".")
        source, target = plain, extra
        for section in sections:
            source, target = source[section], target.setdefault(section, CfgNode())
        target[name] = source.pop(name)
    return plain.dump(), extra.dump()


def write_config(cfg: CfgNode, path: Path) -> None:
    """Write a config, and our keys to `extra_file`."""
    for place, text in zip((path, extra_file(path)), dump_config(cfg), strict=True):
        write_text(place, text)


def describe(cfg: CfgNode, classes: Sequence[str]) -> dict[str, Any]:
    """What a weight file says of its detector, in plain data; see `read_description`."""
    config, extra = dump_config(cfg)
    return {
        "format": DESCRIPTION,
        "config": config,
        "config_extra": extra,
        "classes": list(classes),
        "versions": provenance.versions(),
    }


def read_description(description: Any, where: str) -> tuple[CfgNode, tuple[str, ...]]:
    """The config and the class names that `describe` wrote.

    Raises:
        UserError: If it is none, or of another version of this program.
    """
    cfg = get_cfg()
    add_keys(cfg)
    try:
        if description["format"] != DESCRIPTION:
            raise ValueError(f"format {description['format']!r:.40} is not known")
        for key in ("config", "config_extra"):
            _merge_text(cfg, description[key], key)
        check_values(cfg, Path("config"))
        _check_detector(cfg, Path("config"))
        classes = tuple(checked_class_name(name, "classes") for name in description["classes"])
        if len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise ValueError(f"{len(classes)} names for {cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: its description of the detector is wrong ({error})") from error
    return cfg, classes


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Overrides from a command line: KEY=VALUE, and Detectron2's KEY VALUE; the last one wins.

    Raises:
        UserError: For a key without a value.
    """
    overrides, rest = {}, list(words)
    while rest:
        key, is_pair, value = rest.pop(0).partition("=")
        if not is_pair and not rest:
            raise UserError(f"{key}: this key has no value; give KEY=VALUE or KEY VALUE")
        overrides[key] = value if is_pair else rest.pop(0)
    return overrides


def load_config(
    path: Path, overrides: Mapping[str, str] | None = None, *, num_gpus: int | None = None
) -> CfgNode:
    """Load a config file and apply overrides.

    Args:
        path: YAML in Detectron2's format, version 2, or a preset (`find_config`); `_BASE_` is
            followed. It is read without running code, unlike by Detectron2's `merge_from_file`.
        overrides: Dotted key -> value as text.
        num_gpus: Scale a protocol's schedule to so many GPUs (`scale_schedule`), and to
            SOLVER.IMS_PER_BATCH if it is overridden; other overrides stay as they are. Default: no
            scaling.

    Returns:
        A config that is not frozen; on the CPU where there is no GPU.

    Raises:
        UserError: For a missing file, an unknown key, a value of the wrong kind, or a schedule
            whose parts do not fit.
    """
    cfg, overrides = get_cfg(), overrides or {}
    path = find_config(path, "detection")
    add_keys(cfg, path)
    raw, _ = read_yaml_with_bases(path)
    if (version := raw.get("VERSION", cfg.VERSION)) != cfg.VERSION:
        raise UserError(f"{path}: VERSION {version!r}: only {cfg.VERSION} is read; convert it")
    try:
        cfg.merge_from_other_cfg(CfgNode(raw))
    except _REFUSALS as error:
        raise UserError(f"{path}: {_explain(cfg, error)}") from error
    for key in overrides:
        if key in _BY_ARGUMENT:
            raise UserError(f"{key}: {_BY_ARGUMENT[key]}")
    before, cfg = cfg, merged(cfg, overrides)
    check_values(cfg, path)
    if num_gpus is not None and cfg.SOLVER.REFERENCE_WORLD_SIZE > 0:
        before.SOLVER.REFERENCE_WORLD_SIZE = cfg.SOLVER.REFERENCE_WORLD_SIZE
        is_given = "SOLVER.IMS_PER_BATCH" in overrides
        scale_schedule(before, num_gpus, cfg.SOLVER.IMS_PER_BATCH if is_given else None)
        cfg = merged(before, overrides)
        cfg.SOLVER.REFERENCE_WORLD_SIZE = num_gpus
    check_schedule(cfg, before.SOLVER, overrides.keys())
    _check_detector(cfg, path)
    # Detectron2 would look for results of its own hook behind the last iteration, and fail.
    cfg.TEST.EXPECTED_RESULTS = []
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def merged(cfg: CfgNode, overrides: Mapping[str, str]) -> CfgNode:
    """A copy with overrides applied.

    Raises:
        UserError: For an unknown key, or a value of the wrong kind.
    """
    copy = cfg.clone()
    for key, value in overrides.items():
        try:
            copy.merge_from_list([key, value])
        except _REFUSALS as error:
            raise UserError(f"override {key}={value}: {_explain(cfg, error)}") from error
    return copy


def check_values(cfg: CfgNode, path: Path) -> None:
    """Refuse text among numbers, and numbers that are not finite or too low; yacs checks none."""
    stock = dotted(get_cfg())
    for key, value in dotted(cfg).items():
        items = _items(value)
        is_numeric = isinstance(value, list | tuple) and bool(numbers := _items(stock.get(key)))
        is_numeric = is_numeric and all(isinstance(item, int | float) for item in numbers)
        if is_numeric and _holds_lists(value) and not _holds_lists(stock[key]):
            raise UserError(f"{path}: {key} is {value}; give numbers, not lists of them")
        if (choices := _CHOICES.get(key)) and value not in choices:
            raise UserError(f"{path}: {unknown(f'{key} {value}', str(value), choices)}")
        if (lowest := _LOWEST.get(key)) is not None and not items:
            raise UserError(f"{path}: {key} is empty; give at least one number")
        for item in items:
            if lowest is not None and isinstance(item, int | float) and item < lowest:
                raise UserError(f"{path}: {key} is {value}; give at least {lowest}")
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{path}: {key} is {value}; give finite numbers")
            if is_numeric and not isinstance(item, int | float):
                raise UserError(f"{path}: {key} is {value}; give numbers, not {item!r}")


def _holds_lists(value: Any) -> bool:
    return any(isinstance(item, list | tuple) for item in value)


def _items(value: Any) -> list[Any]:
    """What a list holds, lists within it written out."""
    if isinstance(value, list | tuple):
        return [inner for item in value for inner in _items(item)]
    return [value]


def _check_detector(cfg: CfgNode, path: Path) -> None:
    """Refuse a detector that boxes alone cannot train, or that has no classes."""
    name, generator = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if name not in _DETECTORS:
        known = " and ".join(_DETECTORS)
        raise UserError(f"{path}: MODEL.META_ARCHITECTURE {name} is not supported; {known} are")
    if name == "GeneralizedRCNN" and generator == "PrecomputedProposals":
        raise UserError(f"{path}: MODEL.PROPOSAL_GENERATOR.NAME {generator}: give RPN")
    for key, needed in _NEEDS_MORE.items():
        if cfg.MODEL[key.removeprefix("MODEL.")]:
            raise UserError(f"{path}: {key}: sets here hold no {needed}, only boxes; set False")
    if cfg.TEST.AUG.ENABLED:
        raise UserError(f"{path}: TEST.AUG.ENABLED: the evaluation here has none; set False")
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS != 64:
        raise UserError(
            f"{path}: MODEL.RESNETS.RES2_OUT_CHANNELS {resnets.RES2_OUT_CHANNELS}: Detectron2 "
            f"builds ResNet-{resnets.DEPTH} with 64; give 64, or a thin ResNet-50"
        )


def set_num_classes(cfg: CfgNode, num_classes: int) -> None:
    """Make the head of the config's detector tell so many classes apart."""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        cfg.MODEL.RETINANET.NUM_CLASSES = num_classes


def check_device(cfg: CfgNode) -> None:
    """Refuse what Detectron2 cannot do on a CPU.

    Raises:
        UserError: For SyncBN without a GPU.
    """
    if cfg.MODEL.DEVICE != "cpu":
        return
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD"):
        norm = cfg.MODEL[part].NORM
        if norm in ("SyncBN", "nnSyncBN"):
            raise UserError(f"MODEL.{part}.NORM {norm}: runs on GPUs only; use naiveSyncBN or BN")


def _explain(cfg: CfgNode, error: Exception) -> str:
    """A yacs message, with the nearest known key if the key is unknown."""
    message = str(error.args[0] if error.args else type(error).__name__).partition("\n")[0][:400]
    key = message.partition("key:")[2].strip()
    if "on-existent" not in message or not key:
        return message
    near = [name for name in dotted(cfg) if name.endswith(f".{key}")]
    known = near or [name for name in dotted(cfg) if name.startswith(key.rpartition(".")[0])]
    return unknown(f"key {key}", key, known, more=dotted(cfg))


def scale_schedule(cfg: CfgNode, num_gpus: int, images_per_batch: int | None = None) -> None:
    """Scale a protocol in place.

    Args:
        cfg: Its SOLVER.IMS_PER_BATCH pictures are meant for SOLVER.REFERENCE_WORLD_SIZE GPUs. That
            key becomes `num_gpus`: Detectron2 will not scale once more.
        num_gpus: GPUs at hand, or 1 for a CPU.
        images_per_batch: Pictures a batch over all GPUs; None: as many a GPU as in the protocol.

    Raises:
        UserError: If the pictures do not divide.
    """
    solver, test = cfg.SOLVER, cfg.TEST
    if images_per_batch is None:
        per_gpu = Fraction(solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE)
        if per_gpu.denominator != 1:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} does not divide by "
                f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE}; change one of them"
            )
        images_per_batch = int(per_gpu) * num_gpus
    require(images_per_batch >= 1, f"SOLVER.IMS_PER_BATCH {images_per_batch}: give at least 1")
    factor = Fraction(images_per_batch, solver.IMS_PER_BATCH)

    def scaled(count: int) -> int:
        return round(count / factor)

    solver.REFERENCE_WORLD_SIZE = num_gpus
    solver.IMS_PER_BATCH = images_per_batch
    solver.BASE_LR = solver.BASE_LR * float(factor)
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        solver[key] = max(1, scaled(solver[key])) if solver[key] else 0
    solver.STEPS = tuple(scaled(step) for step in solver.STEPS)
    test.EVAL_PERIOD = scaled(test.EVAL_PERIOD)
    test.PRECISE_BN.NUM_ITER = max(1, scaled(test.PRECISE_BN.NUM_ITER))


def first_other_rate(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[int, float, float] | None:
    """Where two schedules, of dotted keys, part before the end of the old one.

    Returns:
        The iteration and both factors on SOLVER.BASE_LR; None if they are the same throughout.
    """
    multipliers = []
    for settings in (old, new):
        cfg = get_cfg()
        for key in cfg.SOLVER:
            cfg.SOLVER[key] = settings.get(f"SOLVER.{key}", cfg.SOLVER[key])
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        multipliers.append(build_lr_scheduler(cfg, optimizer)._multiplier)  # type: ignore
    for iteration in range(old["SOLVER.MAX_ITER"]):
        one, other = (
            multiplier(iteration / settings["SOLVER.MAX_ITER"])
            for multiplier, settings in zip(multipliers, (old, new), strict=True)
        )
        if not math.isclose(one, other, rel_tol=1e-9):
            return iteration, one, other
    return None


def check_schedule(cfg: CfgNode, before: CfgNode, overridden: Collection[str]) -> None:
    """Keep a schedule whole, and refuse one that the iterations do not hold.

    Args:
        cfg: Its SOLVER is changed: STEPS and WARMUP_ITERS are scaled with an overridden MAX_ITER,
            unless they are overridden too.
        before: SOLVER without the overrides.
        overridden: Their keys.
    """
    solver = cfg.SOLVER
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        require(solver[key] >= 1, f"SOLVER.{key} {solver[key]}: give at least 1")
    old, last = before.MAX_ITER, solver.MAX_ITER
    if old != last and "SOLVER.STEPS" not in overridden:
        steps = {int(step * last / old) for step in before.STEPS}
        # A few iterations hold no schedule: drops that would fall together or on 0 become one.
        solver.STEPS = tuple(sorted(step for step in steps if 0 < step < last))
    if old != last and "SOLVER.WARMUP_ITERS" not in overridden:
        solver.WARMUP_ITERS = int(before.WARMUP_ITERS * last / old)
    is_stepwise = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    if is_stepwise and any(step >= last for step in solver.STEPS):
        raise UserError(
            f"SOLVER.STEPS {tuple(solver.STEPS)} reaches beyond SOLVER.MAX_ITER {last}: Detectron2 "
            "would leave those drops out; give steps below MAX_ITER, or MAX_ITER alone and they "
            "are scaled"
        )
    if last <= solver.WARMUP_ITERS and last > 1:
        raise UserError(
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} leaves nothing of SOLVER.MAX_ITER {last}; "
            "shorten it, or give MAX_ITER alone and it is scaled"
        )
