"""AP by VOC's and by COCO's metric, against computations written from their definitions."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_eval

from common.annotations.record import LabelledSet, LabelledSplit, SetChoice, read_set
from detection.evaluation import evaluate
from detection.evaluation.error_analysis import ALL_KINDS, error_table, judge, objects_of
from tests.detection.evaluation.reference_metrics import COCO as COCO_RULES
from tests.detection.evaluation.reference_metrics import (
    VOC_2007,
    VOC_2012,
    VOC_THRESHOLDS,
    DetectionSet,
    FoundBox,
    TrueObject,
    average_precisions,
    detectron2_lines,
    picture_records,
    random_set,
)
from tests.detection.tiny_detection import (
    CLASSES,
    Detection,
    collect,
    make_detections,
    make_voc,
)


def metric(voc: LabelledSet, detections: list[Detection]) -> dict[str, evaluate.ClassFigures]:
    assert voc.metric_year is not None
    return evaluate.voc_metric(
        voc.test, voc.classes, collect(voc.test, detections), voc.metric_year
    )[0]


def rows_of(voc: LabelledSet, detections: list[Detection], **options: Any) -> list[dict[str, Any]]:
    """Rows of detections.json, with the kinds that the analysis of errors gives."""
    found = collect(voc.test, detections)
    verdicts = judge(objects_of(voc.test, voc.classes), found.in_voc())
    kinds = [ALL_KINDS[kind] for kind in verdicts.kind]
    return evaluate.detection_rows(voc.test, voc, found, kinds, **options)


@pytest.fixture
def tiny(tmp_path: Path) -> LabelledSet:
    return read_set(make_voc(tmp_path / "data", num_train=2, num_test=12))


def made_difficult(split: LabelledSplit, number: int) -> LabelledSplit:
    """A split whose picture `number` has difficult objects only."""
    pictures = list(split.pictures)
    hard = tuple(replace(item, difficult=True) for item in pictures[number].objects)
    pictures[number] = replace(pictures[number], objects=hard)
    return LabelledSplit(split.folder, split.name, tuple(pictures))


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
@pytest.mark.parametrize("year", [2007, 2012, None])
def test_ap_equals_an_independent_computation(year: int | None, tmp_path: Path) -> None:
    rules = {2007: VOC_2007, 2012: VOC_2012, None: COCO_RULES}[year]
    voc = read_set(make_voc(tmp_path / "set", num_train=2, num_test=12))
    split, detections = made_difficult(voc.test, 4), make_detections(voc)
    boxes = collect(split, detections)
    if year is None:
        result = evaluate.coco_metric(split, voc.classes, boxes)[1]
    else:
        result = evaluate.voc_metric(split, voc.classes, boxes, year)[0]
    thresholds = [value / 100 for value in range(50, 100, 5)]
    data = as_set(voc, split, detections)
    for label, name in enumerate(voc.classes):
        aps = 100 * np.array(average_precisions(data, label, thresholds, rules), dtype=float)
        assert result[name].ap50 == pytest.approx(aps[0])
        assert result[name].ap75 == pytest.approx(aps[5])
        assert result[name].ap == pytest.approx(aps.mean())
    at_50, at_75 = (np.mean([getattr(r, key) for r in result.values()]) for key in ("ap50", "ap75"))
    assert 0 < at_75 < at_50 < 100


@pytest.mark.parity
@pytest.mark.parametrize("year", [2007, 2012])
def test_one_pass_gives_the_bits_of_detectron2(year: int, tmp_path: Path) -> None:
    """Ten calls of its `voc_eval`: equal scores, doubled and difficult objects, no detections."""
    num_compared = 0
    for seed in range(10):
        data, folder = random_set(seed), tmp_path / str(seed)
        names = [f"class{label}" for label in range(data.num_classes)]
        split = LabelledSplit(folder, "test", tuple(picture_records(data)))
        boxes = evaluate.DetectedBoxes(
            np.array([item.image for item in data.found], np.int64),
            np.array([item.label for item in data.found], np.int64),
            np.array([item.score for item in data.found], np.float32),
            np.array([item.box for item in data.found], np.float32).reshape(-1, 4),
        )
        rows = evaluate.voc_metric(split, names, boxes, year)[0]
        lines = detectron2_lines(data, folder)
        for name, row in rows.items():
            detections = folder / f"{name}.txt"
            detections.write_text("\n".join(lines.get(names.index(name), [])))
            aps = [
                100 * float(voc_eval(str(detections), f"{folder}/Annotations/{{}}.xml",
                    f"{folder}/ImageSets/Main/test.txt", name, threshold, year == 2007)[2])
                for threshold in VOC_THRESHOLDS
            ]  # fmt: skip
            assert (row.ap50, row.ap75, row.ap) == (aps[0], aps[5], np.mean(aps))
            num_compared += 0 < row.ap < 100
    assert num_compared > 10


@pytest.mark.parity
@pytest.mark.parametrize("year", [2007, 2012])
def test_errors_are_measured_against_the_same_ap50(tmp_path: Path, year: int) -> None:
    """Equal scores, boxes between the tenths of a pixel: the order and the matches are the same."""
    voc = read_set(
        make_voc(tmp_path / "set", num_train=2, num_test=12), SetChoice(metric_year=year)
    )
    detections = [
        (image_id, label, round(score, 1), [value + 0.0625 for value in box])
        for image_id, label, score, box in make_detections(voc, seed=2)
    ]
    result = metric(voc, detections)
    objects, found = objects_of(voc.test, voc.classes), collect(voc.test, detections).in_voc()
    table = error_table(judge(objects, found), voc.classes, 12, year)
    mean = np.mean([row.ap50 for row in result.values()])
    assert 0 < mean < 100
    assert table["AP50"] == pytest.approx(mean, abs=1e-9)
    for name, row in result.items():
        assert table["classes"][name]["AP50"] == pytest.approx(row.ap50, abs=1e-9)


def test_each_detection_keeps_its_kind(tiny: LabelledSet) -> None:
    """Worst score first on purpose: rows are sorted, and kinds go with them."""
    detections: list[Detection] = []
    for number, picture in enumerate(tiny.test.pictures):
        item = picture.objects[0]
        label, box = tiny.classes.index(item.class_name), list(item.box)
        detections += [(picture.image_id, label, 0.2, box), (picture.image_id, label, 0.9, box)]
        detections += [(picture.image_id, (label + 1) % 3, 0.4, box)] * (number % 2)
    for number, row in enumerate(rows_of(tiny, detections, num_saved=99, score_thresh=0.0)):
        found = [(item["score"], item["kind"]) for item in row["detections"]]
        confusions = [(0.4, "confusion")] * (number % 2)
        assert found == [(0.9, "correct"), *confusions, (0.2, "duplicate")]


def test_curve_points_by_hand() -> None:
    """Hit, miss, hit, of four objects: recall 1/4, 1/4, 1/2; precision 1, 1/2, 2/3."""
    curve = evaluate.curve_points(np.array([0.25, 0.25, 0.5]), np.array([1, 0.5, 2 / 3]))
    assert curve == evaluate.Curve([1.0] * 26 + [0.6667] * 25 + [0.0] * 50, 0.5)
    assert evaluate.curve_points(np.empty(0), np.empty(0)) == evaluate.Curve([0.0] * 101, 0.0)


def test_class_without_a_test_object_is_left_out_and_not_counted_as_zero(tmp_path: Path) -> None:
    """The trap: AP over names that do not occur is a mean with zeros (or NaN)."""
    root = make_voc(tmp_path / "set", num_train=2, num_test=12)
    card = root / "dataset.json"
    card.write_text(card.read_text().replace('"bar"]', '"bar", "unicorn"]'))
    voc = read_set(root)
    detections = [
        (picture.image_id, voc.classes.index(item.class_name), 0.9, list(item.box))
        for picture in voc.test.pictures
        for item in picture.objects
    ]
    result = metric(voc, detections)
    assert {name: row.ap for name, row in result.items()} == pytest.approx(
        dict.fromkeys(CLASSES, 100)
    )


def test_fractional_boxes_are_not_rounded(tmp_path: Path) -> None:
    """Small ones: rounded to whole pixels they would overlap by less than 0.95."""
    root = make_voc(tmp_path / "set", num_train=1, num_test=12)
    for path in (root / "VOC2007/Annotations").iterdir():
        text = re.sub(r"<(.m..)>\d+<", r"<\1>20.6<", path.read_text())
        path.write_text(text.replace("max>20.6", "max>26.3"))
    voc = read_set(root)
    box = list(voc.test.pictures[0].objects[0].box)
    assert box == [19.6, 19.6, 26.3, 26.3]
    detections = [(p.image_id, voc.classes.index(p.objects[0].class_name), 0.9, box)
                  for p in voc.test.pictures]  # fmt: skip
    for row in metric(voc, detections).values():
        assert row.ap == pytest.approx(100)


def test_rows_hold_what_the_report_draws(tiny: LabelledSet) -> None:
    detections = make_detections(tiny)
    rows = rows_of(tiny, detections, num_saved=4, score_thresh=0.3)
    image_ids = [tiny.test.pictures[place].image_id for place in (0, 3, 6, 9)]
    assert [Path(row["file_name"]).stem for row in rows] == image_ids
    for row in rows:
        assert (tiny.root / row["file_name"]).is_file()
        assert (row["width"], row["height"]) == (96, 96)
        assert set(row["ground_truth"][0]) == {"class", "box", "difficult"}
        scores = [found["score"] for found in row["detections"]]
        assert scores == sorted(scores, reverse=True)
        assert all(score >= 0.3 for score in scores)
    kept = [row for row in detections if row[0] == image_ids[0] and row[2] >= 0.3]
    assert len(rows[0]["detections"]) == len(kept)


@pytest.mark.parametrize(("num_saved", "places"), [(5, [0, 2, 4, 7, 9]), (20, range(12)), (0, [])])
def test_pictures_are_spread_evenly(tiny, num_saved, places):
    rows = rows_of(tiny, [], num_saved=num_saved, score_thresh=0.0)
    expected = [tiny.test.pictures[place].image_id for place in places]
    assert [Path(row["file_name"]).stem for row in rows] == expected
