"""What `tools/train_voc.sh .. --check` does: everything is read and built, nothing is trained."""

import detection.compat

# isort: split
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import detection.training.heads  # noqa: F401  (registers the C4 head)
from common import pictures, provenance
from common.annotations.record import LabelledSet
from common.errors import UserError
from detection.training.config import arch_of_config, check_device, load_config
from detection.training.run import ArmSettings, prepare

# Detectron2 makes these at run time.
# pyright: reportAttributeAccessIssue=false
_FORWARD_SHARE = 1 / 3  # of the time of a training step


def check(settings: ArmSettings, *, has_data: bool) -> dict[str, Any]:
    """Return what a seed would build and need.

    Args:
        settings: What would be trained.
        has_data: Whether the set is there already: it is read, and every picture is opened.
    Returns:
        `arch`, `pixel_mean` and `pixel_std` (0..255), `input_format` and `stride_in_1x1` of the
        detector, `num_train` and `num_test` (None: not known), `seconds` (from one step on a blank
        picture, so it says little more than the order of magnitude), `disk_bytes`.
    Raises:
        UserError: For wrong input.
    """
    num_train = num_test = None
    if has_data:
        arm = prepare(settings)
        cfg = arm.cfg
        _open_pictures(arm.data)
        num_train, num_test = arm.data.num_train, len(arm.data.test.pictures)
    else:
        cfg = load_config(settings.config, settings.overrides, num_gpus=settings.num_gpus or 1)
        if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        check_device(cfg)

    # One step on a blank picture with one object. It is measured in processor time of one thread,
    # so that other programs beside this one do not count.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cfg.MODEL.WEIGHTS = ""
    try:
        model = build_model(cfg).train()
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{settings.config}: Detectron2 cannot build it: {error}") from error
    side = int(cfg.INPUT.MIN_SIZE_TRAIN[0])
    instances = Instances((side, side))
    instances.gt_boxes = Boxes(torch.tensor([[side / 4, side / 4, side / 2, side / 2]]))
    instances.gt_classes = torch.zeros(1, dtype=torch.int64)
    item = {"image": torch.zeros(3, side, side, dtype=torch.uint8), "instances": instances}
    started = 0.0
    with EventStorage():
        for _ in range(2):  # the first warms up
            started = time.process_time()
            torch.stack(list(model([dict(item)]).values())).sum().backward()
    seconds = (time.process_time() - started) / (num_threads if cfg.MODEL.DEVICE == "cpu" else 1)
    solver = cfg.SOLVER
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    per_evaluation = seconds * _FORWARD_SHARE * (num_test or 0)
    num_evaluations = solver.MAX_ITER // cfg.TEST.EVAL_PERIOD if cfg.TEST.EVAL_PERIOD else 1
    return {
        "arch": dataclasses.asdict(arch_of_config(cfg)),
        "pixel_mean": [float(value) for value in cfg.MODEL.PIXEL_MEAN],
        "pixel_std": [float(value) for value in cfg.MODEL.PIXEL_STD],
        "input_format": cfg.INPUT.FORMAT,
        "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.RESNETS.DEPTH >= 50,
        "num_train": num_train,
        "num_test": num_test,
        "seconds": solver.MAX_ITER * solver.IMS_PER_BATCH * seconds
        + num_evaluations * per_evaluation,
        "disk_bytes": 6 * num_bytes,  # two checkpoints with momentum, the last weights
    }


def _open_pictures(data: LabelledSet) -> None:
    """Decode every picture of the lists.

    Raises:
        UserError: Naming those that do not open.
    """
    paths = {p.file for split in (*data.train, data.test) for p in split.pictures}

    def fault(path: Path) -> str | None:
        try:
            pictures.decode(path.read_bytes(), where=str(path))
        except (pictures.BadPicture, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(provenance.usable_cores()) as pool:
        faults = sorted(filter(None, pool.map(fault, paths)))
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{'; '.join(faults[:3])}{more}; replace these pictures")
