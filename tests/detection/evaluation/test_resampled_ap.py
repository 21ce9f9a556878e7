"""AP of resampled pictures, against the evaluation of lists that name pictures several times."""

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.annotations.record import LabelledSplit, ObjectRecord, PictureRecord
from common.picture_draws import draw_pictures, interval
from detection.evaluation.evaluate import DetectedBoxes, coco_metric, voc_metric
from detection.evaluation.resampled_ap import coco_matches, resampled_ap

CLASSES = ("cat", "dog", "rare", "never")
NUM_PICTURES = 15


def random_pictures(*, has_equal_scores: bool) -> tuple[LabelledSplit, DetectedBoxes]:
    """Pictures with 0 to 4 objects, some difficult, "rare" in one picture only; and detections.

    Objects are found well, badly, twice, or as another class. No two detections of a picture have
    the same score; those of different pictures may.
    """
    generator = np.random.default_rng(3)
    pictures, rows = [], []
    for number in range(NUM_PICTURES):
        objects = []
        for place in range(number % 5):
            x, y = generator.integers(0, 60, 2).tolist()
            label = 2 if (number, place) == (4, 1) else int(generator.integers(2))
            box = (x, y, x + 30, y + 24)
            is_difficult = generator.random() < 0.2 and label != 2
            objects.append(ObjectRecord(CLASSES[label], box, is_difficult))
            for _ in range(3):
                moved = np.array(box) + generator.normal(0, 2.5, 4).round(1)
                rows.append((number, (label + (generator.random() < 0.2)) % 3, moved))
        rows.append((number, int(generator.integers(3)), np.array([5, 5, 20, 20])))
        file = Path(f"{number}.jpg")
        pictures.append(PictureRecord(file.stem, file, 96, 96, tuple(objects), ""))
    place_of, seen = generator.permutation(len(rows)), Counter()
    scores = []
    for (number, *_), place in zip(rows, place_of, strict=True):
        seen[number] += 1
        scores.append(seen[number] / 20 if has_equal_scores else (place + 1) / 1000)
    image, label, box = (np.array(column) for column in zip(*rows, strict=True))
    boxes = DetectedBoxes(image, label, np.array(scores, np.float32), box.astype(np.float32))
    return LabelledSplit(Path(), "test", tuple(pictures)), boxes


def repeated(
    split: LabelledSplit, boxes: DetectedBoxes, counts: np.ndarray
) -> tuple[LabelledSplit, DetectedBoxes]:
    """A list that names every picture as often as `counts` says, with its detections each time."""
    order = np.repeat(np.arange(len(counts)), counts)
    rows = [np.flatnonzero(boxes.image == old) for old in order]
    image = np.repeat(np.arange(len(order)), [len(own) for own in rows])
    kept = np.concatenate(rows)
    pictures = [replace(split.pictures[old], image_id=str(new)) for new, old in enumerate(order)]
    found = DetectedBoxes(image, boxes.label[kept], boxes.score[kept], boxes.box[kept])
    return replace(split, pictures=tuple(pictures)), found


def evaluated(split: LabelledSplit, boxes: DetectedBoxes, year: int | None) -> list[float]:
    """AP, AP50, AP75 by the evaluators that result.json comes from."""
    if year is None:
        figures = coco_metric(split, CLASSES, boxes)[0]
        return [figures[metric] for metric in ("AP", "AP50", "AP75")]
    rows = voc_metric(split, CLASSES, boxes, year)[0].values()
    return np.mean([(row.ap, row.ap50, row.ap75) for row in rows], axis=0).tolist()


def resampled(
    split: LabelledSplit, boxes: DetectedBoxes, year: int | None, counts: np.ndarray
) -> np.ndarray:
    """AP, AP50, AP75 of each draw: (draws, 3)."""
    sizes = (len(CLASSES), len(split.pictures))
    if year is None:
        matches = coco_matches(coco_metric(split, CLASSES, boxes)[2], *sizes)
    else:
        matches = voc_metric(split, CLASSES, boxes, year)[1]
    return np.stack([*resampled_ap(matches, counts, year).values()], axis=1)


@pytest.mark.parametrize("has_equal_scores", [False, True])
@pytest.mark.parametrize("year", [2007, 2012, None])
def test_a_draw_equals_the_evaluation_of_its_pictures(year, has_equal_scores, monkeypatch) -> None:
    if has_equal_scores:  # numpy's default sort would mix the copies of pictures
        monkeypatch.setattr(np, "argsort", functools.partial(np.argsort, kind="stable"))
    split, boxes = random_pictures(has_equal_scores=has_equal_scores)
    draws, once = draw_pictures(NUM_PICTURES), np.ones(NUM_PICTURES, int)
    few = [once, *draws[draws[:, 4] == 0][:2], *draws[draws[:, 4] > 1][:3]]  # without "rare", with
    found = resampled(split, boxes, year, np.stack(few))
    assert found[0] == pytest.approx(evaluated(split, boxes, year), abs=1e-12)
    for row, drawn in zip(found, few, strict=True):
        assert row == pytest.approx(evaluated(*repeated(split, boxes, drawn), year), abs=1e-9)
    assert len(np.unique(found[:, 0])) == len(few)


def test_classes_count_where_they_are_present() -> None:
    """Without an object of any class there is no AP; one picture has no interval."""
    split, boxes = random_pictures(has_equal_scores=False)
    nothing, all_but_rare = np.zeros((2, NUM_PICTURES), int)
    nothing[[0, 5]] = 4  # pictures without objects
    all_but_rare[[1, 2, 3]] = 1
    found = resampled(split, boxes, 2012, np.stack([nothing, all_but_rare]))
    assert np.isnan(found[0]).all()
    short = replace(split, pictures=split.pictures[:4])
    rows = boxes.image < 4
    own = DetectedBoxes(*(column[rows] for column in vars(boxes).values()))
    assert found[1] == pytest.approx(evaluated(short, own, 2012), abs=1e-9)
    one = replace(split, pictures=split.pictures[1:2])
    rows = boxes.image == 1
    own = DetectedBoxes(*(column[rows] for column in vars(boxes).values()))
    own.image[:] = 0
    whole = resampled(one, own, 2012, np.ones((1, 1), int))
    assert whole[0] == pytest.approx(evaluated(one, own, 2012), abs=1e-12)
    none = resampled(one, own, 2012, draw_pictures(1))
    assert none.shape == (0, 3)
    assert interval([none[:, 0]]) is None
