"""Golden: VOC's and COCO's metrics of random sets, and a COCO folder through the whole path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.annotations.record import LabelledSplit, SetChoice, read_set
from detection.training.data import to_detectron2
from tests.detection.evaluation.reference_metrics import DetectionSet, random_set
from tests.golden.detection_inputs import (
    FoundBox,
    TrueBox,
    evaluate,
    random_detections,
    random_objects,
    write_coco,
    write_devkit,
)
from tests.golden.gate import check, digest

CATEGORIES = {7: "disc", 3: "box", 90: "bar", 44: "never"}  # as COCO's, with gaps
_METRICS = ("AP", "AP50", "AP75")
_SIZES = ("APs", "APm", "APl")


def write_set(data: DetectionSet, root: Path) -> tuple[list[str], dict[str, list[FoundBox]]]:
    """A random set as a devkit; returns class names and detections by picture."""
    names = [f"{number:06d}" for number in range(data.num_images)]
    objects: dict[str, list[TrueBox]] = {name: [] for name in names}
    found: dict[str, list[FoundBox]] = {name: [] for name in names}
    for item in data.truth:
        x0, y0, x1, y1 = item.box
        box = TrueBox(item.label, (x0 - 1, y0 - 1, x1, y1), item.difficult)
        objects[names[item.image]].append(box)
    for item in data.found:
        found[names[item.image]].append(FoundBox(item.label, item.score, item.box))
    classes = [f"class{label}" for label in range(data.num_classes)]
    write_devkit(root, classes, {"test": objects}, side=256)
    return classes, found


def in_order(row: dict[str, Any], names: Sequence[str]) -> list[Any]:
    return [row.get(name) for name in names]


def figures_of_set(seed: int, folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """All metrics of a random set, and digests; None: no object counts, so that there is no AP."""
    data = random_set(seed)
    if all(item.difficult for item in data.truth):
        return None, []
    classes, found = write_set(data, folder / "data")
    values: dict[str, Any] = {}
    digests = []
    for year in (2007, 2012):
        voc = read_set(folder / "data", SetChoice(None, tuple(classes), year, test_only=True))
        last = evaluate(voc, found, folder)
        result, errors = last.to_json(), last.errors
        values[f"voc {year}"] = {
            "means": in_order(result, _METRICS),
            "AP": in_order(result["per_class"], classes),
            "AP50": in_order(result["per_class_AP50"], classes),
            "AP75": in_order(result["per_class_AP75"], classes),
            "gained": in_order(errors["AP50_gained"], sorted(errors["AP50_gained"])),
        }
        # Two evaluators of the same detections: the year changes neither.
        values["coco"] = {
            "means": in_order(result["coco"], (*_METRICS, *_SIZES)),
            "AP": in_order(result["coco"]["per_class"], classes),
        }
        values["errors"] = {key: errors[key] for key in ("best_scored", "all")}
        digests.append(digest(repr((last.coco, errors, last.curves_to_json())).encode()))
    return values, digests


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in (20, 40, 60, 80))]
)
def test_random_sets(first: int, tmp_path: Path) -> None:
    values, digests = {}, {}
    for seed in range(first, first + 20):
        (tmp_path / str(seed)).mkdir()
        values[seed], digests[seed] = figures_of_set(seed, tmp_path / str(seed))
    check(f"metrics_random_{first}", values, rtol=1e-9, atol=1e-9, bits=digests)


def records(split: LabelledSplit, classes: tuple[str, ...]) -> list[list[Any]]:
    """Pictures of a list: name, file, size, objects as read and as the detector trains on them."""
    return [
        [
            picture.image_id, picture.file.name, picture.width, picture.height,
            [[item.class_name, *item.voc_box, item.is_ignored, item.area]
             for item in picture.objects],
            [[item["category_id"], *item["bbox"], int(item["bbox_mode"])]
             for item in given["annotations"]],
        ]
        for picture, given in zip(split.pictures, to_detectron2(split, classes), strict=True)
    ]  # fmt: skip


def test_coco_folder(tmp_path: Path) -> None:
    draw = np.random.default_rng(11)
    objects = {number: random_objects(draw, 3, 128, whole=False) for number in range(501, 517)}
    objects[503] = []  # COCO has pictures without objects
    label, difficult = objects[510][0].label, True
    objects[510].append(TrueBox(label, (2.25, 3.5, 120.75, 110.125), difficult, 9000.5))
    objects[501].append(TrueBox(3, (10.5, 10.5, 50.25, 60.75), False, 1200.5))
    places = {"train2017": range(501, 505), "val2017": range(505, 517)}
    lists = {name: {key: objects[key] for key in keys} for name, keys in places.items()}
    root = write_coco(tmp_path / "coco", CATEGORIES, lists, side=128)
    numbers = sorted(CATEGORIES)  # the detector's order; the file has another
    labels = [numbers.index(number) for number in CATEGORIES]
    found = {
        str(key): [row._replace(label=labels[row.label])
                   for row in random_detections(draw, lists["val2017"][key], 4, 128)]
        for key in places["val2017"]
    }  # fmt: skip
    found["510"].append(FoundBox(labels[label], 0.99, (30.0, 30.0, 90.0, 90.0)))  # in the crowd
    coco = read_set(root)
    last = evaluate(coco, found, tmp_path)
    result = last.to_json()
    del result["evaluation_seconds"]
    assert 0 < result["AP75"] < result["AP50"] < 100
    values = {
        "classes": list(coco.classes),
        "metric_year": coco.metric_year,
        "train": records(coco.train[0], coco.classes),
        "test": records(coco.test, coco.classes),
        "result": result,
        "errors": last.errors,
        "detections": last.detections,
        "curves": {
            name: [(curve["max_recall"], float(np.mean(curve["precision"])))
                   for _, curve in sorted(row.items())]
            for name, row in last.curves_to_json()["classes"].items()
        },
    }  # fmt: skip
    check("metrics_coco", values, rtol=1e-9, atol=1e-9)
