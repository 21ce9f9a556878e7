"""Inputs of the gates of conversion, detector and metrics, all made from seeds.

Nothing of the product makes them, so that a change of the product cannot change them unseen.
`evaluate` shows detections that are fixed to the product's evaluation.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

from common.annotations.record import LabelledSet
from detection.evaluation.evaluate import Evaluation, evaluate_detector
from detection.training.config import load_config
from detection.training.data import build_test_loader, register

CONFIG = Path(__file__).resolve().parents[2] / "configs/detection/thin_R50_C4.yaml"

# Name -> (depth, by what torchvision's channels are divided).
ARCHS = {"R18": (18, 1), "thin_R50": (50, 4), "R50": (50, 1)}


@functools.cache
def backbone(arch: str, seed: int) -> dict[str, Tensor]:
    """A ResNet's state_dict under torchvision's names, without classifier, every norm different."""
    depth, divisor = ARCHS[arch]
    with torch.device("meta"):
        shapes = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    draw = np.random.default_rng(seed)
    state: dict[str, Tensor] = {}
    for name, value in shapes.items():
        if name.startswith("fc."):
            continue
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000 + 7 * len(state) + seed)
            continue
        shape = [size if place > 1 or size == 3 else size // divisor
                 for place, size in enumerate(value.shape)]  # fmt: skip
        if len(shape) == 4:
            values = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("weight", "running_var")):
            values = 0.5 + draw.random(shape)
        else:
            values = 0.2 * draw.standard_normal(shape)
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


class TrueBox(NamedTuple):
    """An object; `box` is (x0, y0, x1, y1) in pixels from 0. VOC wants whole numbers."""

    label: int
    box: tuple[float, float, float, float]
    difficult: bool = False  # in COCO: a crowd
    area: float = 0.0  # COCO's, of the mask


class FoundBox(NamedTuple):
    """A detection; `box` as in `TrueBox`."""

    label: int
    score: float
    box: tuple[float, float, float, float]


def random_objects(
    draw: np.random.Generator, num_classes: int, side: int, *, whole: bool
) -> list[TrueBox]:
    """One to four objects of a picture; one in six is difficult."""
    rows = []
    for _ in range(int(draw.integers(1, 5))):
        corner = draw.uniform(0, side - 20, 2)
        end = np.minimum(corner + draw.uniform(8, side, 2), side - 1)
        numbers = [float(v) for v in np.concatenate([corner, end]).round(0 if whole else 2)]
        box = (numbers[0], numbers[1], numbers[2], numbers[3])
        area = round(float(draw.uniform(0.3, 1)) * (box[2] - box[0]) * (box[3] - box[1]), 3)
        label, difficult = int(draw.integers(num_classes)), bool(draw.random() < 1 / 6)
        rows.append(TrueBox(label, box, difficult, area))
    return rows


def random_detections(
    draw: np.random.Generator, objects: Sequence[TrueBox], num_classes: int, side: int
) -> list[FoundBox]:
    """Moved objects, doubles, wrong classes and boxes at random."""
    rows = []
    for item in [*objects, *objects, *objects]:
        if draw.random() < 0.15:
            corner = draw.uniform(0, side - 20, 2)
            box = np.concatenate([corner, corner + draw.uniform(5, 20, 2)])
        else:
            box = np.array(item.box) + draw.normal(0, float(draw.choice([0.5, 3, 8])), 4)
            box[2:] = np.maximum(box[2:], box[:2] + 1)
        label = int(draw.integers(num_classes)) if draw.random() < 0.2 else item.label
        x0, y0, x1, y1 = (float(value) for value in box.astype(np.float32))
        rows.append(FoundBox(label, float(np.float32(draw.random())), (x0, y0, x1, y1)))
    return rows


def write_picture(path: Path, objects: Sequence[TrueBox], side: int, seed: int) -> None:
    """Noise with one grey rectangle an object."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    for item in objects:
        x0, y0, x1, y1 = (int(value) for value in item.box)
        pixels[y0:y1, x0:x1] = 40 + 50 * item.label
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)


def write_devkit(
    root: Path,
    classes: Sequence[str],
    lists: Mapping[str, Mapping[str, Sequence[TrueBox]]],
    *,
    side: int,
    metric_year: int = 2012,
) -> Path:
    """Write a VOC devkit with its dataset.json; `lists` is list -> picture -> objects."""
    voc = root / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    for name, pictures in lists.items():
        (voc / f"ImageSets/Main/{name}.txt").write_text("".join(f"{key}\n" for key in pictures))
        for number, (key, objects) in enumerate(pictures.items()):
            write_picture(voc / f"JPEGImages/{key}.jpg", objects, side, number)
            text = ""
            for item in objects:
                x0, y0, x1, y1 = (int(value) for value in item.box)
                text += (
                    f"<object><name>{classes[item.label]}</name><pose>Unspecified</pose>"
                    f"<truncated>0</truncated><difficult>{int(item.difficult)}</difficult><bndbox>"
                    f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
                    "</bndbox></object>"
                )
            (voc / f"Annotations/{key}.xml").write_text(
                f"<annotation><filename>{key}.jpg</filename><size><width>{side}</width>"
                f"<height>{side}</height><depth>3</depth></size>{text}</annotation>"
            )
    description = {"format": "fa-dataset-1", "name": "golden", "classes": list(classes),
                   "metric_year": metric_year}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_coco(
    root: Path,
    categories: Mapping[int, str],
    lists: Mapping[str, Mapping[int, Sequence[TrueBox]]],
    *,
    side: int,
) -> Path:
    """Write a COCO folder; a label is the place of a category in `categories`."""
    numbers = list(categories)
    (root / "annotations").mkdir(parents=True)
    for name, pictures in lists.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, objects in pictures.items():
            file = f"{number:012d}.jpg"
            write_picture(root / name / file, objects, side, number)
            images.append({"id": number, "file_name": file, "width": side, "height": side})
            for item in objects:
                x0, y0, x1, y1 = item.box
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number,
                    "category_id": numbers[item.label], "iscrowd": int(item.difficult),
                    "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)], "area": item.area,
                })  # fmt: skip
        rows = [{"id": number, "name": label} for number, label in categories.items()]
        content = {"images": images[::-1], "annotations": annotations, "categories": rows}
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return root


class FixedDetector(nn.Module):
    """Says the same about each picture, whatever its pixels; boxes by the picture's name."""

    def __init__(self, found: Mapping[str, Sequence[FoundBox]]) -> None:
        super().__init__()
        self.found = found

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        outputs = []
        for given in inputs:
            rows = self.found[given["image_id"]]
            instances = Instances((given["height"], given["width"]))
            instances.pred_boxes = Boxes(torch.tensor([row.box for row in rows]).reshape(-1, 4))
            instances.scores = torch.tensor([row.score for row in rows])
            labels = torch.tensor([row.label for row in rows], dtype=torch.int64)
            instances.pred_classes = labels
            outputs.append({"instances": instances})
        return outputs


@functools.cache
def _config() -> CfgNode:
    return load_config(CONFIG, {"INPUT.MIN_SIZE_TEST": "32", "TEST.NUM_SAVED_IMAGES": "2"})


def evaluate(voc: LabelledSet, found: Mapping[str, Sequence[FoundBox]], folder: Path) -> Evaluation:
    """What the evaluation of a detector gives, its detections fixed."""
    cfg = _config().clone()
    cfg.DATASETS.TEST = (register(voc)[1],)
    loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    result = evaluate_detector(cfg, FixedDetector(found), loader, voc)
    assert result is not None
    return result
