"""Which kinds of errors a detector makes, and how much AP50 each kind costs.

The kinds are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020); what matches is decided as Detectron2's VOC evaluator does, so that the AP50
that errors are measured against is the one of result.json. docs/detection.md defines them, and says
where they differ from TIDE's.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.annotations.record import LabelledSplit

MATCH_IOU, NEAR_IOU = 0.5, 0.1
KINDS = ("correct", "localisation", "confusion", "both", "duplicate", "background")
ALL_KINDS = (*KINDS, "ignored")
_CORRECT, _LOCALISATION, _CONFUSION, _BOTH, _DUPLICATE, _BACKGROUND, _IGNORED = range(7)
GAINS = (*KINDS[1:], "missed", "all_false", "all_missed")
LEVELS = {2007: np.arange(0.0, 1.1, 0.1), None: np.linspace(0.0, 1.0, 101)}
"""Metric year -> the levels of recall at which precision is averaged; 2012: area instead."""


@dataclass(frozen=True)
class Objects:
    """The objects of all pictures.

    Attributes:
        image: (m,) number of the picture, from 0.
        label: (m,) number of the class, from 0.
        corners: (m, 4) xmin, ymin, xmax, ymax in pixels from 1, both ends inclusive.
        difficult: (m,) whether the object does not count.
    """

    image: np.ndarray
    label: np.ndarray
    corners: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True)
class Detections:
    """The detections of all pictures; attributes as for `Objects`, and `score` (n,) in 0..1."""

    image: np.ndarray
    label: np.ndarray
    corners: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Verdicts:
    """What the detections are.

    Attributes:
        objects: The labelled ones.
        detections: Those that are judged.
        kind: (n,) places in KINDS; 6: on a difficult object, neither right nor wrong.
        target: (n,) the object that a detection is judged by, -1 for background.
        rank: (n,) place among the detections of its class, best score first.
        matched: (m,) whether a detection matches the object.
        correctable: (n,) whether a localisation or confusion error becomes a match once it is
            corrected: nothing matches its object, and no better-scored error of the two kinds
            points to it.
        unseen: (m,) whether an object that counts has neither a match nor such an error.
    """

    objects: Objects
    detections: Detections
    kind: np.ndarray
    target: np.ndarray
    rank: np.ndarray
    matched: np.ndarray
    correctable: np.ndarray
    unseen: np.ndarray


def judge(objects: Objects, detections: Detections) -> Verdicts:
    """The kind of every detection, and the objects that no detection matches."""
    # Places in the order of `voc_eval`: numpy's default sort, class by class.
    rank = np.zeros(len(detections.label), dtype=np.int64)
    for rows in _groups(detections.label):
        rank[rows[np.argsort(-detections.score[rows])]] = np.arange(len(rows))

    # Kinds by overlap; whether a detection on its own class is the first on its object comes next.
    own_iou, own, other_iou, other = nearest(objects, detections)
    conditions = [own_iou > MATCH_IOU, own_iou >= NEAR_IOU, other_iou > MATCH_IOU]
    conditions.append(other_iou >= NEAR_IOU)
    kinds = [_DUPLICATE, _LOCALISATION, _CONFUSION, _BOTH]
    kind = np.select(conditions, kinds, _BACKGROUND)
    target = np.select(conditions, [own, own, other, other], -1)

    # The best-scored one on each object matches it; on difficult objects none counts.
    claims = np.flatnonzero(kind == _DUPLICATE)
    is_difficult = objects.difficult[target[claims]]
    kind[claims[is_difficult]] = _IGNORED
    claims = claims[~is_difficult]
    claims = claims[np.argsort(rank[claims], kind="stable")]  # those of an object: of one class
    targets, first = np.unique(target[claims], return_index=True)
    kind[claims[first]] = _CORRECT
    matched = np.zeros(len(objects.label), dtype=bool)
    matched[targets] = True

    # Of the errors on an object without a match, the best-scored one could become the match.
    rows = np.flatnonzero((kind == _LOCALISATION) | (kind == _CONFUSION))
    rows = rows[~objects.difficult[target[rows]] & ~matched[target[rows]]]
    rows = rows[np.lexsort((rank[rows], -detections.score[rows]))]
    _, first = np.unique(target[rows], return_index=True)
    correctable = np.zeros(len(kind), dtype=bool)
    correctable[rows[first]] = True
    unseen = ~objects.difficult & ~matched
    unseen[target[correctable]] = False
    return Verdicts(objects, detections, kind, target, rank, matched, correctable, unseen)


def _groups(numbers: np.ndarray) -> list[np.ndarray]:
    """Rows with the same number, each group in the order it came in."""
    if not len(numbers):
        return []
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


def nearest(
    objects: Objects, detections: Detections
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Largest overlap, and its object, with objects of the own class and of other classes.

    Returns:
        Four arrays (n,): overlap 0 and object -1 where a picture holds none.
    """
    num = len(detections.label)
    overlap, place = np.zeros((2, num)), np.full((2, num), -1)
    there = {int(objects.image[rows[0]]): rows for rows in _groups(objects.image)}
    for rows in _groups(detections.image):
        near = there.get(int(detections.image[rows[0]]))
        if near is None:
            continue
        iou = _overlaps(detections.corners[rows], objects.corners[near])
        is_own = detections.label[rows, None] == objects.label[near]
        for side, allowed in enumerate((is_own, ~is_own)):
            masked = np.where(allowed, iou, -1.0)
            best = masked.argmax(axis=1)  # the first of equal ones, as `voc_eval` takes
            highest = masked[np.arange(len(rows)), best]
            overlap[side, rows] = np.maximum(highest, 0.0)
            place[side, rows] = np.where(highest >= 0, near[best], -1)
    return overlap[0], place[0], overlap[1], place[1]


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) and (m, 4) in whole pixels: (n, m)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.maximum(high - low + 1.0, 0.0).prod(axis=2)
    areas = [(box[:, 2:] - box[:, :2] + 1.0).prod(axis=1) for box in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None, :] - shared)


def best_scored(verdicts: Verdicts, num_images: int) -> np.ndarray:
    """As many detections of each picture as it holds objects that count, at least one: (n,) bool.

    Those on difficult objects are passed over. A better-scored detection never loses its match to a
    worse one, so that kinds among the best are the kinds that they have among all.
    """
    objects, detections = verdicts.objects, verdicts.detections
    num_kept = np.bincount(objects.image[~objects.difficult], minlength=num_images).clip(min=1)
    rows = np.flatnonzero(verdicts.kind != _IGNORED)
    keys = (verdicts.rank[rows], -detections.score[rows], detections.image[rows])
    rows = rows[np.lexsort(keys)]
    chosen = np.zeros(len(detections.label), dtype=bool)
    for group in _groups(detections.image[rows]):
        own = rows[group]
        chosen[own[: num_kept[detections.image[own[0]]]]] = True
    return chosen


def average_precisions(
    verdicts: Verdicts, num_classes: int, metric_year: int | None, corrected: str | None
) -> list[float | None]:
    """AP50 of every class in percent, with one kind of error corrected.

    Args:
        verdicts: What `judge` says.
        num_classes: How many.
        metric_year: 2007: 11 levels of recall; 2012: area; None: 101 levels.
        corrected: One of GAINS, None: nothing.

    Returns:
        None for a class without an object that counts.
    """
    objects, detections = verdicts.objects, verdicts.detections
    kind, label = verdicts.kind, detections.label.copy()
    hit, kept = kind == _CORRECT, kind != _IGNORED
    counted = ~objects.difficult
    if corrected in KINDS:
        wrong = kind == KINDS.index(corrected)
        better = wrong & verdicts.correctable
        hit, kept = hit | better, kept & (~wrong | better)
        label[better] = objects.label[verdicts.target[better]]
    elif corrected == "all_false":
        kept = hit
    left_out = {"missed": verdicts.unseen, "all_missed": counted & ~verdicts.matched}
    gone = left_out.get(corrected or "", np.zeros(len(counted), dtype=bool))
    values = []
    for number in range(num_classes):
        own = objects.label == number
        rows = np.flatnonzero(kept & (label == number))
        rows = rows[np.lexsort((verdicts.rank[rows], -detections.score[rows]))]
        num_left = int((own & counted & ~gone).sum())
        value = 100 * _average_precision(hit[rows], num_left, metric_year)
        values.append(value if (own & counted).any() else None)
    return values


def _average_precision(hits: np.ndarray, num_objects: int, metric_year: int | None) -> float:
    """AP in 0..1 of detections in order, best score first; 0 where nothing matches."""
    if not hits.any():
        return 0.0
    recall = np.cumsum(hits) / num_objects
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if metric_year == 2012:
        return float((np.diff(recall, prepend=0.0) * envelope).sum())
    places = np.searchsorted(recall, LEVELS[metric_year], side="left")
    return float(np.append(envelope, 0.0)[places].mean())


def error_table(
    verdicts: Verdicts, classes: Sequence[str], num_images: int, metric_year: int | None
) -> dict[str, Any]:
    """What errors.json holds (docs/files.md, section 5).

    Args:
        verdicts: What `judge` says.
        classes: Names in order.
        num_images: Number of pictures that were looked at.
        metric_year: Of the AP50: 2007, 2012, or None for 101 levels of recall.
    """
    objects, detections = verdicts.objects, verdicts.detections
    chosen = best_scored(verdicts, num_images)
    aps = {
        corrected: average_precisions(verdicts, len(classes), metric_year, corrected)
        for corrected in (None, *GAINS)
    }
    counted, matched_early = ~objects.difficult, np.zeros(len(objects.label), dtype=bool)
    matched_early[verdicts.target[chosen & (verdicts.kind == _CORRECT)]] = True

    def counts(own_objects: np.ndarray, own_detections: np.ndarray) -> dict[str, Any]:
        """Counts among the best-scored detections, and among all of them."""
        own = own_objects & counted
        best, every = (
            np.bincount(verdicts.kind[rows], minlength=len(ALL_KINDS)).tolist()
            for rows in (own_detections & chosen, own_detections)
        )
        return {
            "num_objects": int(own.sum()),
            "best_scored": {
                **dict(zip(KINDS, best, strict=False)),
                "missed": int((own & ~matched_early).sum()),
            },
            "all": {
                **dict(zip(ALL_KINDS, every, strict=True)),
                "missed": int((own & ~verdicts.matched).sum()),
                "unseen": int((own & verdicts.unseen).sum()),
            },
        }

    rows = {
        name: counts(objects.label == number, detections.label == number)
        | _costs({key: [values[number]] for key, values in aps.items()})
        for number, name in enumerate(classes)
    }

    # How often an object of one class was taken for another, among the best-scored detections.
    taken = np.flatnonzero(chosen & (verdicts.kind == _CONFUSION))
    true, said = objects.label[verdicts.target[taken]], detections.label[taken]
    pairs = Counter(zip(true.tolist(), said.tolist(), strict=True))
    return {
        "format": "fa-errors-1",
        "metric_year": metric_year,
        "match_iou": MATCH_IOU,
        "near_iou": NEAR_IOU,
        "num_images": num_images,
        **counts(np.ones(len(counted), dtype=bool), np.ones(len(chosen), dtype=bool)),
        **_costs(aps),
        "classes": rows,
        "confusions": [
            {"object": classes[true], "taken_for": classes[said], "count": count}
            for (true, said), count in sorted(pairs.items(), key=lambda one: (-one[1], one[0]))
        ],
    }


def _costs(aps: dict[str | None, list[float | None]]) -> dict[str, Any]:
    """AP50, and the points gained by each correction: means over the classes that occur."""
    means = {key: [value for value in values if value is not None] for key, values in aps.items()}
    if not means[None]:
        return {"AP50": None, "AP50_gained": dict.fromkeys(GAINS)}
    now = float(np.mean(means[None]))
    return {"AP50": now, "AP50_gained": {key: float(np.mean(means[key])) - now for key in GAINS}}


def objects_of(split: LabelledSplit, classes: Sequence[str]) -> Objects:
    """The objects of a list, in the order of the annotations."""
    rows = [
        (number, classes.index(item.class_name), item.voc_box, item.is_ignored)
        for number, picture in enumerate(split.pictures)
        for item in picture.objects
    ]
    return Objects(
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.int64),
        np.array([row[2] for row in rows], dtype=float).reshape(-1, 4),
        np.array([row[3] for row in rows], dtype=bool),
    )
