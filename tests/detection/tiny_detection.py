"""Made for the detection tests: a tiny VOC set, random backbones with lively norms."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from common.annotations import record
from detection.evaluation.evaluate import Collector, DetectedBoxes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "detection"
CLASSES = ("disc", "box", "bar")
NUMBERS = {"disc": 7, "box": 3, "bar": 90}  # as COCO's, with gaps and out of order
Detection = tuple[str, int, float, list[float]]  # picture, class, score, [x0, y0, x1, y1]


def instances_of(rows: Sequence[Detection], image_id: str) -> Instances:
    """What a detector says about a picture of 96 x 96."""
    own = [row for row in rows if row[0] == image_id]
    instances = Instances((96, 96))
    instances.pred_boxes = Boxes(torch.tensor([row[3] for row in own]).reshape(-1, 4))
    instances.scores = torch.tensor([row[2] for row in own])
    instances.pred_classes = torch.tensor([row[1] for row in own], dtype=torch.int64)
    return instances


def make_detections(voc: record.LabelledSet, seed: int = 0) -> list[Detection]:
    """Ground truth moved about, doubles, wrong classes and boxes at random."""
    generator = np.random.default_rng(seed)
    found: list[Detection] = []
    for picture in voc.test.pictures:
        for item in picture.objects:
            label = voc.classes.index(item.class_name)
            for _ in range(3):
                shift = generator.normal(0, 4, 4).round(1)
                box = (np.array(item.box) + shift).clip(0, 95).tolist()
                wrong = generator.random() < 0.3
                score = round(float(generator.random()), 3)
                found.append((picture.image_id, (label + wrong) % 3, score, box))
    return found


def collect(split: record.LabelledSplit, rows: Sequence[Detection]) -> DetectedBoxes:
    """The detections as an evaluation collects them."""
    collector = Collector(split)
    collector.reset()
    for picture in split.pictures:
        instances = instances_of(rows, picture.image_id)
        collector.process([{"image_id": picture.image_id}], [{"instances": instances}])
    result = collector.evaluate()
    assert result is not None
    return result["boxes"]


def annotation(size, objects, width=None):
    """A VOC annotation with boxes (name, xmin, ymin, xmax, ymax), 1-based."""
    rows = [record.ObjectRecord(name, (x0 - 1, y0 - 1, x1, y1)) for name, x0, y0, x1, y1 in objects]
    return record.annotation_xml("picture.jpg", width or size, size, rows).decode()


def make_voc(root, num_train=8, num_test=4, size=96, growth=0):
    """Write a set of coloured rectangles on noise: VOC2007/ and dataset.json.

    Each picture is `growth` pixels wider than the one before.
    """
    generator = np.random.default_rng(0)
    voc = root / "VOC2007"
    record.make_folders(voc)
    names = [f"{index:06d}" for index in range(num_train + num_test)]
    for index, name in enumerate(names):
        columns = size + growth * index
        pixels = generator.integers(0, 256, (size, columns, 3), dtype=np.uint8)
        label = index % len(CLASSES)
        x, y = (int(value) for value in generator.integers(0, size // 2, 2))
        width, height = ((40, 40), (30, 44), (48, 16))[label]
        pixels[y : y + height, x : x + width] = 40 + 80 * label
        Image.fromarray(pixels).save(voc / "JPEGImages" / f"{name}.jpg")
        box = (CLASSES[label], x + 1, y + 1, min(x + width, size), min(y + height, size))
        text = annotation(size, [box], columns)
        (voc / "Annotations" / f"{name}.xml").write_text(text)
    for split, part in (("train", names[:num_train]), ("test", names[num_train:])):
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(part) + "\n")
    (root / "dataset.json").write_text(
        '{"format": "fa-dataset-1", "name": "tiny", "classes": ["disc", "box", "bar"], '
        '"metric_year": 2012}'
    )
    return root


def make_official(root: Path) -> Path:
    """A devkit of one picture with a dog for each list."""
    for year in ("2007", "2012"):
        voc = root / f"VOC{year}"
        record.make_folders(voc)
        for split in ("trainval", "test"):
            name = f"{year}_{split}"
            pixels = np.full((20, 20, 3), int(year) % 100 + 10 * len(split), np.uint8)
            Image.fromarray(pixels).save(voc / f"JPEGImages/{name}.jpg")
            (voc / f"Annotations/{name}.xml").write_text(annotation(20, [("dog", 1, 1, 20, 20)]))
            (voc / f"ImageSets/Main/{split}.txt").write_text(f"{name}\n")
    return root


def make_coco(root: Path) -> Path:
    """The tiny VOC set (as_voc beside it) as COCO: one crowd a list, masks of half a box."""
    voc = record.read_set(make_voc(root.parent / "as_voc", num_train=6, num_test=5))
    (root / "annotations").mkdir(parents=True)
    for split, name in ((voc.train[0], "train2017"), (voc.test, "val2017")):
        (root / name).mkdir()
        images, annotations = [], []
        for number, picture in enumerate(split.pictures, start=100):
            shutil.copy(picture.file, root / name)
            images.append({"id": number, "file_name": picture.file.name, "width": 96, "height": 96})
            for item in picture.objects:
                x0, y0, x1, y1 = list(item.box)
                area = (x1 - x0) * (y1 - y0) / (1 if item.class_name == "disc" else 2)
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number,
                    "category_id": NUMBERS[item.class_name], "iscrowd": int(number == 101),
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area,
                })  # fmt: skip
        categories = [{"id": number, "name": key} for key, number in NUMBERS.items()]
        content = {"images": images[::-1], "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return root


def liven_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm random weights and statistics, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            module.weight.data = 0.5 + torch.rand(shape, generator=generator)
            module.bias.data = 0.2 * torch.randn(shape, generator=generator)
            module.running_mean = 0.2 * torch.randn(shape, generator=generator)
            module.running_var = 0.5 + torch.rand(shape, generator=generator)
    return network
