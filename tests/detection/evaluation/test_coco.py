"""COCO's metric on a VOC-layout set, against a computation written from its definition."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reference_metrics import (
    COCO,
    DetectionSet,
    FoundBox,
    TrueObject,
    average_precisions,
)
from common.annotations.record import LabelledSet, LabelledSplit, read_set
from detection.evaluation.metrics import coco_metric
from tests.detection.tiny_detection import Detection, collect, make_voc


def made_difficult(split: LabelledSplit, number: int) -> LabelledSplit:
    """A split whose picture `number` has difficult objects only."""
    pictures = list(split.pictures)
    hard = tuple(replace(item, difficult=True) for item in pictures[number].objects)
    pictures[number] = replace(pictures[number], objects=hard)
    return LabelledSplit(split.folder, split.name, tuple(pictures))


def make_detections(voc: LabelledSet, seed: int) -> list[Detection]:
    draw = np.random.default_rng(seed)
    rows: list[Detection] = []
    for picture in voc.test.pictures:
        for item in picture.objects:
            for _ in range(4):
                label = (voc.classes.index(item.class_name) + int(draw.random() < 0.3)) % 3
                moved = np.array(item.box) + draw.integers(-32, 32, 4) / 8
                rows.append((picture.image_id, label, float(draw.integers(8)) / 8, moved.tolist()))
    return rows


def coco(voc: LabelledSet, split: LabelledSplit, rows: list[Detection]) -> dict:
    return coco_metric(split, voc.classes, collect(split, rows))[0]


def as_set(voc: LabelledSet, split: LabelledSplit, rows: list[Detection]) -> DetectionSet:
    numbers = {picture.image_id: i for i, picture in enumerate(split.pictures)}
    truth = [
        TrueObject(
            numbers[picture.image_id],
            voc.classes.index(item.class_name),
            tuple(int(value) for value in item.voc_box),
            item.difficult,
        )
        for picture in split.pictures
        for item in picture.objects
    ]
    found = [FoundBox(numbers[row[0]], row[1], row[2], tuple(row[3])) for row in rows]
    return DetectionSet(len(numbers), len(voc.classes), tuple(truth), tuple(found))


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 1])
def test_figures_equal_an_independent_computation(tmp_path: Path, seed: int) -> None:
    voc = read_set(make_voc(tmp_path / "data", num_train=2, num_test=12))
    split = made_difficult(voc.test, 4)
    rows = make_detections(voc, seed)
    result = coco(voc, split, rows)
    thresholds = [value / 100 for value in range(50, 100, 5)]
    data = as_set(voc, split, rows)
    rows_of_ap = [average_precisions(data, label, thresholds, COCO) for label in range(3)]
    ours = 100 * np.array(rows_of_ap, dtype=float)  # class, threshold
    assert result["AP"] == pytest.approx(ours.mean())
    assert result["AP50"] == pytest.approx(ours[:, 0].mean())
    assert result["AP75"] == pytest.approx(ours[:, 5].mean())
    assert list(result["per_class"].values()) == pytest.approx(ours.mean(axis=1))
    assert 0 < result["AP75"] < result["AP50"] < 100


def test_difficult_object_neither_helps_nor_harms(tmp_path: Path) -> None:
    voc = read_set(make_voc(tmp_path / "data", num_train=2, num_test=3))
    rows = [
        (picture.image_id, voc.classes.index(item.class_name), 0.9, list(item.box))
        for picture in voc.test.pictures
        for item in picture.objects
    ]
    assert coco(voc, voc.test, rows)["AP"] == pytest.approx(100)
    hard = made_difficult(voc.test, 0)
    only_class = voc.test.pictures[0].objects[0].class_name
    for detections in (rows, rows[1:]):  # found or not
        result = coco(voc, hard, detections)
        assert result["AP"] == pytest.approx(100)
        assert only_class not in result["per_class"]


def test_no_detections_and_no_small_objects(tmp_path: Path) -> None:
    voc = read_set(make_voc(tmp_path / "data", num_train=2, num_test=3))
    result = coco(voc, voc.test, [])
    assert (result["AP"], result["APm"], result["APl"]) == (0.0, 0.0, None)
