"""Kinds of errors and the AP50 they cost, by hand; golden values hold random sets."""

import numpy as np
import pytest

from detection.evaluation.error_analysis import KINDS, Detections, Objects, error_table, judge


def by_hand(*found: tuple[int, float, tuple[float, ...]], difficult: bool = False) -> dict:
    """Picture 0: a cat at 1..100 and a dog at 201..300, both 100 pixels high; cat = 0, dog = 1."""
    objects = Objects(
        np.array([0, 0]),
        np.array([0, 1]),
        np.array([[1, 1, 100, 100], [201, 1, 300, 100]], dtype=float),
        np.array([difficult, False]),
    )
    labels, scores, boxes = zip(*found, strict=True)
    detections = Detections(
        np.zeros(len(found), dtype=int), np.array(labels), np.array(boxes), np.array(scores)
    )
    return error_table(judge(objects, detections), ["cat", "dog"], 1, 2012)


CAT, DOG = (1.0, 1.0, 100.0, 100.0), (201.0, 1.0, 300.0, 100.0)
NEAR_CAT = (1.0, 1.0, 100.0, 40.0)  # an overlap of 0.4
NOWHERE = (401.0, 1.0, 500.0, 100.0)


@pytest.mark.parametrize(
    ("found", "kind", "cat", "gained"),
    [
        (((0, 0.9, NEAR_CAT), (1, 0.8, DOG)), "localisation", 0.0, 50.0),
        (((1, 0.9, CAT), (1, 0.8, DOG)), "confusion", 0.0, 75.0),  # the dog's AP was 50
        (((1, 0.9, NEAR_CAT), (1, 0.8, DOG)), "both", 0.0, 25.0),
        (((1, 0.95, DOG), (0, 0.9, NOWHERE), (0, 0.8, CAT)), "background", 50.0, 25.0),
        (((1, 0.95, DOG), (0, 0.9, CAT), (0, 0.8, CAT)), "duplicate", 100.0, 0.0),
    ],
)
def test_each_kind_by_hand(found, kind: str, cat: float, gained: float) -> None:
    table = by_hand(*found)
    assert table["all"][kind] == 1
    assert table["classes"]["cat"]["AP50"] == pytest.approx(cat)
    assert table["AP50_gained"][kind] == pytest.approx(gained)
    others = set(KINDS[1:]) - {kind}
    assert all(table["AP50_gained"][other] == pytest.approx(0) for other in others)


def test_missed_object_by_hand() -> None:
    """One dog of two found: precision 1 up to a recall of one half."""
    objects = Objects(
        np.array([0, 1]), np.array([0, 0]), np.array([CAT, CAT]), np.zeros(2, dtype=bool)
    )
    detections = Detections(np.array([0]), np.array([0]), np.array([CAT]), np.array([0.9]))
    table = error_table(judge(objects, detections), ["cat"], 2, 2012)
    assert (table["all"]["missed"], table["all"]["unseen"]) == (1, 1)
    assert table["AP50"] == pytest.approx(50)
    assert table["AP50_gained"]["missed"] == pytest.approx(50)


def test_detection_on_a_difficult_object_is_neither_right_nor_wrong() -> None:
    table = by_hand((0, 0.9, CAT), (0, 0.8, CAT), (1, 0.7, DOG), difficult=True)
    assert table["all"] == {**dict.fromkeys(KINDS, 0), "correct": 1, "ignored": 2, "missed": 0,
                            "unseen": 0}  # fmt: skip
    assert table["classes"]["cat"]["AP50"] is None
    assert table["AP50"] == pytest.approx(100)
    assert table["best_scored"]["correct"] == 1  # the two on the difficult one are passed over
    near = by_hand((0, 0.9, NEAR_CAT), (1, 0.7, DOG), difficult=True)
    assert near["all"]["localisation"] == 1
    assert near["AP50_gained"]["localisation"] == 0  # it cannot become a match


def test_nothing_found_and_no_objects() -> None:
    objects = Objects(np.array([0]), np.array([0]), np.array([CAT]), np.array([False]))
    empty = np.array([], dtype=int)
    none = Detections(empty, empty, np.empty((0, 4)), np.empty(0))
    table = error_table(judge(objects, none), ["cat"], 1, 2012)
    assert table["AP50"] == 0
    assert table["best_scored"]["missed"] == table["all"]["unseen"] == 1
    bare = Objects(empty, empty, np.empty((0, 4)), np.empty(0, dtype=bool))
    one = Detections(np.array([0]), np.array([0]), np.array([CAT]), np.array([0.5]))
    table = error_table(judge(bare, one), ["cat"], 1, 2012)
    assert table["AP50"] is None
    assert table["AP50_gained"]["background"] is None
    assert table["all"]["background"] == 1
