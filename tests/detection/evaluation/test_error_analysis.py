"""Kinds of errors and the AP50 they cost, against a computation written from the definitions."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks.reference_metrics import VOC_2007, VOC_2012, DetectionSet, random_set
from benchmarks.reference_metrics import average_precisions as reference_precisions
from detection.evaluation.error_analysis import (
    ALL_KINDS,
    GAINS,
    KINDS,
    Detections,
    Objects,
    best_scored,
    error_table,
    judge,
)

Box = tuple[float, float, float, float]


class One(NamedTuple):
    """A detection as the reference sees it."""

    image: int
    label: int
    score: float
    box: Box
    number: int


def rounded(data: DetectionSet) -> list[One]:
    """Detections with pixels from 1, corners to 0.1, scores to 3 decimals."""
    rows = []
    for number, item in enumerate(data.found):
        x0, y0, x1, y1 = (float(f"{v:.1f}") for v in np.array(item.box) + np.array([1, 1, 0, 0]))
        score = float(f"{item.score:.3f}")
        rows.append(One(item.image, item.label, score, (x0, y0, x1, y1), number))
    return rows


def as_arrays(data: DetectionSet) -> tuple[Objects, Detections]:
    rows = rounded(data)
    objects = Objects(
        np.array([item.image for item in data.truth], dtype=int),
        np.array([item.label for item in data.truth], dtype=int),
        np.array([item.box for item in data.truth], dtype=float).reshape(-1, 4),
        np.array([item.difficult for item in data.truth], dtype=bool),
    )
    found = Detections(
        np.array([row.image for row in rows], dtype=int),
        np.array([row.label for row in rows], dtype=int),
        np.array([row.box for row in rows], dtype=float).reshape(-1, 4),
        np.array([row.score for row in rows], dtype=float),
    )
    return objects, found


def overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    one, two = ((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    return width * height / (one + two - width * height)


class Reference:
    """The definitions of docs/detection.md, one detection after another, in plain Python."""

    def __init__(self, data: DetectionSet) -> None:
        self.data = data
        self.order: list[One] = []  # by class, best score first, ties as numpy's sort leaves them
        for label in range(data.num_classes):
            own = [row for row in rounded(data) if row.label == label]
            places = np.argsort(-np.array([row.score for row in own])) if own else []
            self.order += [own[place] for place in places]
        self.kind: dict[int, str] = {}
        self.object: dict[int, int] = {}
        self.matched: set[int] = set()
        for row in self.order:
            self.kind[row.number], self.object[row.number] = self._judge(row)
        self.correctable = self._pointers()

    def _best(self, row: One, *, own_class: bool) -> tuple[float, int]:
        best = (0.0, -1)
        for number, item in enumerate(self.data.truth):
            if item.image == row.image and (item.label == row.label) == own_class:
                iou = overlap(row.box, item.box)
                if iou > best[0]:
                    best = (iou, number)
        return best

    def _judge(self, row: One) -> tuple[str, int]:
        iou, number = self._best(row, own_class=True)
        if iou > 0.5:
            if self.data.truth[number].difficult:
                return "ignored", number
            if number in self.matched:
                return "duplicate", number
            self.matched.add(number)
            return "correct", number
        if iou >= 0.1:
            return "localisation", number
        iou, number = self._best(row, own_class=False)
        if iou > 0.5:
            return "confusion", number
        return ("both", number) if iou >= 0.1 else ("background", -1)

    def _pointers(self) -> set[int]:
        """Detections that would match if corrected: the best-scored one for each object."""
        best: dict[int, One] = {}
        place = {row.number: i for i, row in enumerate(self.order)}
        first = {row.number: place[row.number] - min(
            place[other.number] for other in self.order if other.label == row.label
        ) for row in self.order}  # fmt: skip
        for row in self.order:
            number = self.object[row.number]
            if self.kind[row.number] not in ("localisation", "confusion"):
                continue
            if self.data.truth[number].difficult or number in self.matched:
                continue
            key = (-row.score, first[row.number])
            if number not in best or key < (-best[number].score, first[best[number].number]):
                best[number] = row
        self.aimed_at = set(best)
        return {row.number for row in best.values()}

    def counted(self, label: int | None = None) -> set[int]:
        return {
            number
            for number, item in enumerate(self.data.truth)
            if not item.difficult and label in (None, item.label)
        }

    def unseen(self) -> set[int]:
        return self.counted() - self.matched - self.aimed_at

    def ap(self, label: int, corrected: str | None, year: int | None) -> float | None:
        """AP50 in percent, the list of hits built detection by detection."""
        if not self.counted(label):
            return None
        rows: list[tuple[float, bool]] = []
        for row in self.order:
            kind, says = self.kind[row.number], row.label
            hit = kind == "correct"
            if kind == "ignored" or (corrected == "all_false" and not hit):
                continue
            if kind == corrected:
                if row.number not in self.correctable:
                    continue
                hit, says = True, self.data.truth[self.object[row.number]].label
            if says == label:
                rows.append((row.score, hit))
        rows.sort(key=lambda row: -row[0])  # stable
        num_objects = len(self.counted(label))
        if corrected == "missed":
            num_objects -= len(self.unseen() & self.counted(label))
        if corrected == "all_missed":
            num_objects = len(self.matched & self.counted(label))
        return 100 * area([hit for _, hit in rows], num_objects, year)


def area(hits: list[bool], num_objects: int, year: int | None) -> float:
    if not any(hits):
        return 0.0
    points = []
    for place in range(len(hits)):
        right = sum(hits[: place + 1])
        points.append((right / num_objects, right / (place + 1)))
    if year == 2012:
        total, before = 0.0, 0.0
        for place, (recall, _) in enumerate(points):
            total += (recall - before) * max(precision for _, precision in points[place:])
            before = recall
        return total
    levels = [k * 0.1 for k in range(11)] if year == 2007 else np.linspace(0, 1, 101).tolist()
    highest = [max((p for r, p in points if r >= level), default=0.0) for level in levels]
    return sum(highest) / len(levels)


def untied(data: DetectionSet, seed: int) -> DetectionSet:
    """The same set with a score of its own for every detection: ties would leave the order open."""
    draw = np.random.default_rng(seed)
    scores = draw.permutation(len(data.found)) + 1
    found = tuple(
        item.__class__(item.image, item.label, float(score) / 1000, item.box)
        for item, score in zip(data.found, scores, strict=True)
    )
    return DetectionSet(data.num_images, data.num_classes, data.truth, found)


@pytest.mark.parity
@pytest.mark.parametrize("year", [2007, 2012, None])
def test_table_equals_a_reference_written_from_the_definitions(year: int | None) -> None:
    seen: Counter[str] = Counter()
    gained: Counter[str] = Counter()
    for seed in range(60):
        data = untied(random_set(seed), seed)
        objects, found = as_arrays(data)
        verdicts = judge(objects, found)
        reference = Reference(data)
        kinds = [ALL_KINDS[kind] for kind in verdicts.kind]
        assert kinds == [reference.kind[number] for number in range(len(kinds))], seed
        seen.update(kinds)
        assert set(np.flatnonzero(verdicts.matched).tolist()) == reference.matched
        assert set(np.flatnonzero(verdicts.correctable).tolist()) == reference.correctable
        assert set(np.flatnonzero(verdicts.unseen).tolist()) == reference.unseen()
        names = [f"class{label}" for label in range(data.num_classes)]
        table = error_table(objects, found, verdicts, names, data.num_images, year)
        for label, name in enumerate(names):
            row = table["classes"][name]
            before = reference.ap(label, None, year)
            assert row["AP50"] == pytest.approx(before, abs=1e-9)
            for corrected in GAINS:
                after = reference.ap(label, corrected, year)
                expected = None if after is None or before is None else after - before
                assert row["AP50_gained"][corrected] == pytest.approx(expected, abs=1e-9), corrected
                gained[corrected] += bool(expected and abs(expected) > 1)
        rows = [row for row in table["classes"].values() if row["AP50"] is not None]
        if rows:
            for corrected in GAINS:
                mean = np.mean([row["AP50_gained"][corrected] for row in rows])
                assert table["AP50_gained"][corrected] == pytest.approx(mean, abs=1e-9)
    assert min(seen[kind] for kind in ALL_KINDS) > 20  # the sets hold every kind,
    assert min(gained[kind] for kind in GAINS) > 10  # and every correction changes AP


@pytest.mark.parity
def test_ap50_is_that_of_the_evaluator_with_equal_scores_too() -> None:
    """The random sets have many ties; benchmarks/ compares the reference with Detectron2."""
    for seed in range(40):
        data = random_set(seed)
        objects, found = as_arrays(data)
        verdicts = judge(objects, found)
        names = [str(label) for label in range(data.num_classes)]
        for rules, year in ((VOC_2007, 2007), (VOC_2012, 2012)):
            table = error_table(objects, found, verdicts, names, data.num_images, year)
            for label, name in enumerate(names):
                expected = reference_precisions(data, label, [0.5], rules)
                ours = table["classes"][name]["AP50"]
                assert ours == (expected and pytest.approx(100 * expected[0], abs=1e-9))


def test_counts_among_the_best_scored() -> None:
    """As many as objects that count; each has the kind it would have if the rest were not there."""
    for seed in range(40):
        data = untied(random_set(seed), seed)
        objects, found = as_arrays(data)
        verdicts = judge(objects, found)
        names = [str(label) for label in range(data.num_classes)]
        table = error_table(objects, found, verdicts, names, data.num_images, 2012)
        reference = Reference(data)
        kept: list[One] = []
        for image in range(data.num_images):
            wanted = sum(not o.difficult for o in data.truth if o.image == image)
            own = [r for r in rounded(data) if r.image == image]
            own = [row for row in own if reference.kind[row.number] != "ignored"]
            kept += sorted(own, key=lambda row: -row.score)[: max(1, wanted)]
        chosen = best_scored(objects, found, verdicts, data.num_images)
        assert set(np.flatnonzero(chosen).tolist()) == {row.number for row in kept}
        alone = Reference(
            DetectionSet(
                data.num_images, data.num_classes, data.truth,
                tuple(data.found[row.number] for row in kept),
            )
        )  # fmt: skip
        counts = Counter(alone.kind.values())
        expected = {kind: counts[kind] for kind in KINDS}
        expected["missed"] = len(alone.counted() - alone.matched)
        assert table["best_scored"] == expected
        pairs = Counter(
            (str(data.truth[alone.object[i]].label), str(kept[i].label))
            for i, kind in alone.kind.items()
            if kind == "confusion"
        )
        found_pairs = {(c["object"], c["taken_for"]): c["count"] for c in table["confusions"]}
        assert found_pairs == pairs
        for key in ("best_scored", "all"):
            for kind in table[key]:
                parts = [row[key][kind] for row in table["classes"].values()]
                assert sum(parts) == table[key][kind]


def by_hand(*found: tuple[int, float, Box], difficult: bool = False) -> dict:
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
    verdicts = judge(objects, detections)
    return error_table(objects, detections, verdicts, ["cat", "dog"], 1, 2012)


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
    table = error_table(objects, detections, judge(objects, detections), ["cat"], 2, 2012)
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
    table = error_table(objects, none, judge(objects, none), ["cat"], 1, 2012)
    assert table["AP50"] == 0
    assert table["best_scored"]["missed"] == table["all"]["unseen"] == 1
    bare = Objects(empty, empty, np.empty((0, 4)), np.empty(0, dtype=bool))
    one = Detections(np.array([0]), np.array([0]), np.array([CAT]), np.array([0.5]))
    table = error_table(bare, one, judge(bare, one), ["cat"], 1, 2012)
    assert table["AP50"] is None
    assert table["AP50_gained"]["background"] is None
    assert table["all"]["background"] == 1
