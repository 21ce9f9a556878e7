"""Small detection sets at random, hard where metrics differ, and the two libraries fed with them.

Detections lie on a grid of 1/8 pixel: every sum is exact, so that no metric decides an overlap that
equals its threshold by the way it rounds.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.reference_metrics import DetectionSet, Found, TrueObject
from detection.stock_evaluator import StockEvaluator

_SIDE = 256  # pixels of a picture
_SCORE_LEVELS = (3, 20, 1 << 20)  # few levels: many equal scores


def random_set(seed: int) -> DetectionSet:
    """Objects (some difficult, some doubled) and detections (moved, doubled, wrong, or none)."""
    draw = np.random.default_rng(seed)
    crowded = draw.random() < 0.04  # more detections in a picture than COCO looks at
    num_images = 1 if crowded else int(draw.integers(1, 7))
    num_classes = 1 if crowded else int(draw.integers(1, 5))
    share_difficult = float(draw.choice([0.0, 0.2, 0.5]))
    levels = int(draw.choice(_SCORE_LEVELS))
    truth: list[TrueObject] = []
    found: list[Found] = []
    silent = draw.random() < 0.05  # a detector that finds nothing
    for image in range(num_images):
        for _ in range(int(draw.integers(0, 7)) + (40 if crowded else 0)):
            label = int(draw.integers(num_classes))  # a class may end without objects
            item = TrueObject(image, label, _box(draw), bool(draw.random() < share_difficult))
            truth += [item] * (2 if draw.random() < 0.08 else 1)
        near = [item for item in truth if item.image == image]
        num_found = 0 if silent else int(draw.integers(0, 25)) + (150 if crowded else 0)
        for _ in range(num_found):
            found += _detection(draw, image, num_classes, near, levels)
    return DetectionSet(num_images, num_classes, tuple(truth), tuple(found))


def _box(draw: np.random.Generator) -> tuple[int, int, int, int]:
    side = int(draw.choice([30, 90, _SIDE]))  # below and above COCO's area limits
    xmin, ymin = (int(value) for value in draw.integers(1, _SIDE - 4, 2))
    width, height = (int(value) for value in draw.integers(1, side, 2))
    return xmin, ymin, min(xmin + width, _SIDE), min(ymin + height, _SIDE)


def _detection(
    draw: np.random.Generator, image: int, num_classes: int, near: list[TrueObject], levels: int
) -> list[Found]:
    """One detection, sometimes twice: most are a moved object, exact, or anywhere."""
    label, box = int(draw.integers(num_classes)), np.array(_box(draw), dtype=float)
    if near and draw.random() < 0.85:
        item = near[int(draw.integers(len(near)))]
        label = item.label if draw.random() < 0.85 else label
        xmin, ymin, xmax, ymax = item.box
        spread = float(draw.choice([0.0, 0.04, 0.12])) * np.array([xmax - xmin, ymax - ymin] * 2)
        box = np.array([xmin - 1, ymin - 1, xmax, ymax], dtype=float)
        if draw.random() < 0.1:  # an overlap of exactly 1/2 or 3/4
            box[2] -= (xmax - xmin + 1) * float(draw.choice([0.25, 0.5]))
        else:
            box += draw.normal(0, 1, 4) * spread
    box = np.round(8 * box) / 8
    box[2:] = np.maximum(box[2:], box[:2] + 0.125)
    score = float(np.float32(draw.integers(1, levels + 1) / levels))
    one = Found(image, label, score, tuple(box.tolist()))
    return [one] * (2 if draw.random() < 0.1 else 1)


def real_set(detections: Path) -> tuple[DetectionSet, list[str]]:
    """The pictures of a detections.json (docs/architecture.md, section 5), and the class names."""
    rows = json.loads(detections.read_text())
    boxes = [item for row in rows for key in ("ground_truth", "detections") for item in row[key]]
    names = sorted({item["class"] for item in boxes})
    truth, found = [], []
    for image, row in enumerate(rows):
        for item in row["ground_truth"]:
            x0, y0, x1, y1 = (round(value) for value in item["box"])
            label = names.index(item["class"])
            truth.append(TrueObject(image, label, (x0 + 1, y0 + 1, x1, y1), item["difficult"]))
        for item in row["detections"]:
            box = tuple(item["box"])
            found.append(Found(image, names.index(item["class"]), item["score"], box))
    return DetectionSet(len(rows), len(names), tuple(truth), tuple(found)), names


def detectron2_evaluation(data: DetectionSet, folder: Path) -> StockEvaluator:
    """Detectron2's evaluator on a set, whose annotations are written into an empty folder."""
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets/Main").mkdir(parents=True)
    names = [f"{image:06d}" for image in range(data.num_images)]
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(names) + "\n")
    detections = {}
    for image, name in enumerate(names):
        text = "".join(_object_xml(item) for item in data.truth if item.image == image)
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
        own = [item for item in data.found if item.image == image]
        detections[name] = [(item.label, item.score, item.box) for item in own]
    return StockEvaluator(folder, data.num_classes, detections)


def _object_xml(item: TrueObject) -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True)
    box = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
    return (
        f"<object><name>class{item.label}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>{int(item.difficult)}</difficult><bndbox>{box}</bndbox></object>"
    )


def _indexed(images: Any, annotations: Any, categories: Any) -> COCO:
    """Annotations as pycocotools wants them."""
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    coco.createIndex()
    return coco


def pycocotools_evaluation(data: DetectionSet) -> COCOeval:
    """Pycocotools on a set, difficult objects as crowds; its `eval["precision"]` is filled."""
    images = [{"id": image + 1} for image in range(data.num_images)]
    categories: list[dict[str, Any]] = [
        {"id": label + 1, "name": f"class{label}"} for label in range(data.num_classes)
    ]
    annotations = []
    for number, item in enumerate(data.truth, start=1):
        xmin, ymin, xmax, ymax = item.box
        width, height = xmax - xmin + 1, ymax - ymin + 1
        annotations.append({
            "id": number, "image_id": item.image + 1, "category_id": item.label + 1,
            "bbox": [xmin - 1, ymin - 1, width, height], "area": width * height,
            "iscrowd": int(item.difficult),
        })  # fmt: skip
    rows = []
    for item in data.found:
        x0, y0, x1, y1 = item.box
        rows.append({
            "image_id": item.image + 1, "category_id": item.label + 1, "score": item.score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        })  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _indexed(images, annotations, categories)
        # Its loadRes takes a list, too, whatever its type says; but not an empty one.
        found = truth.loadRes(rows) if rows else _indexed(images, [], categories)  # pyright: ignore[reportArgumentType]
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation
