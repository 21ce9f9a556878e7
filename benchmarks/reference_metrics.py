"""Average precision written from the definitions of VOC and COCO, every rule a switch of its own.

One computation stands for both metrics: `VOC_2007`, `VOC_2012` and `COCO` are settings of it.
benchmarks/voc_eval_parity.py compares them with Detectron2's evaluator and with pycocotools, and
changes one rule after another to see what separates the metrics (docs/metrics.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

# Both libraries count recall levels in floating point: 3 * 0.1 is a little more than 0.3, so that a
# recall of exactly 3/10 does not reach that level (nor 6/10 and 7/10 theirs).
ELEVEN_POINTS = tuple(k * 0.1 for k in range(11))
ELEVEN_EXACT_POINTS = tuple(k / 10 for k in range(11))
POINTS_101 = tuple(k * 0.01 for k in range(101))
Order = Callable[[np.ndarray], np.ndarray]  # scores -> indices, highest score first


@dataclass(frozen=True)
class TrueObject:
    """An annotated object; `box` is (xmin, ymin, xmax, ymax) in whole pixels from 1, inclusive."""

    image: int
    label: int
    box: tuple[int, int, int, int]
    difficult: bool


@dataclass(frozen=True)
class Found:
    """A detection; `box` is (x0, y0, x1, y1) in continuous pixel coordinates from 0."""

    image: int
    label: int
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class DetectionSet:
    """Objects and detections of a few pictures, detections in the order of the pictures."""

    num_images: int
    num_classes: int
    truth: tuple[TrueObject, ...]
    found: tuple[Found, ...]


def stable_order(scores: np.ndarray) -> np.ndarray:
    """Highest score first; equal scores stay in the order they came in."""
    return np.argsort(-scores, kind="stable")


def numpy_order(scores: np.ndarray) -> np.ndarray:
    """Highest score first; equal scores in whatever order numpy's default sort leaves them."""
    return np.argsort(-scores)


@dataclass(frozen=True)
class Rules:
    """What makes a metric.

    Attributes:
        rounded: Scores to 3 decimals and corners to 0.1 pixels first, as a VOC results file.
        origin: Coordinates of the first pixel, 1 (VOC) or 0 (COCO).
        extra_pixel: Whether a side is xmax - xmin + 1 (pixels counted) or xmax - xmin (a length).
        reached: Whether an overlap equal to the threshold counts as a match.
        matching: A detection claims the object it overlaps most ("best": a second claim is a false
            positive), or the best among those still free ("free").
        counted_first: Whether a difficult object is taken only if no counted one can be.
        crowd_overlap: Whether the overlap with a difficult object is relative to the detection's
            own area, not to the union.
        recall_points: Levels at which precision is averaged; None: area under the curve.
        max_detections: Highest-scored detections kept per picture and class; None: all.
        area_range: Smallest and largest area (pixels) of what is looked at; the rest is ignored.
        order: How detections are sorted; what happens to equal scores.
    """

    rounded: bool
    origin: Literal[0, 1]
    extra_pixel: bool
    reached: bool
    matching: Literal["best", "free"]
    counted_first: bool
    crowd_overlap: bool
    recall_points: tuple[float, ...] | None
    max_detections: int | None = None
    area_range: tuple[float, float] = (0.0, 1e10)
    order: Order = stable_order


VOC_2007 = Rules(
    rounded=True,
    origin=1,
    extra_pixel=True,
    reached=False,
    matching="best",
    counted_first=False,
    crowd_overlap=False,
    recall_points=ELEVEN_POINTS,
    order=numpy_order,
)
VOC_2012 = replace(VOC_2007, recall_points=None)
COCO = Rules(
    rounded=False,
    origin=0,
    extra_pixel=False,
    reached=True,
    matching="free",
    counted_first=True,
    crowd_overlap=True,
    recall_points=POINTS_101,
    max_detections=100,
)


def average_precisions(
    data: DetectionSet, label: int, thresholds: Sequence[float], rules: Rules
) -> list[float] | None:
    """AP of one class at each overlap threshold, in 0..1.

    Returns:
        None if the class has no object that counts: its AP is not defined.
    """
    truth = [_Truth.of(data, image, label, rules) for image in range(data.num_images)]
    num_counted = sum(int((~one.ignored).sum()) for one in truth)
    if num_counted == 0:
        return None
    claims = _claims(data, label, rules, truth)
    return [
        _average(_verdicts(claims, truth, threshold, rules), num_counted, rules)
        for threshold in thresholds
    ]


@dataclass(frozen=True)
class _Truth:
    """Objects of one class in one picture: corners (n, 4), who is ignored, who may be reused."""

    corners: np.ndarray
    ignored: np.ndarray
    difficult: np.ndarray

    @classmethod
    def of(cls, data: DetectionSet, image: int, label: int, rules: Rules) -> "_Truth":
        own = [item for item in data.truth if item.image == image and item.label == label]
        corners = np.array([item.box for item in own], dtype=float).reshape(-1, 4)
        if rules.origin == 0:  # pixel 1 covers 0..1
            corners = corners - np.array([1.0, 1.0, 0.0, 0.0])
        difficult = np.array([item.difficult for item in own], dtype=bool)
        smallest, largest = rules.area_range
        areas = _areas(corners, rules)
        return cls(corners, difficult | (areas < smallest) | (areas > largest), difficult)


@dataclass(frozen=True)
class _Claim:
    """One detection: its picture, its overlap with each object there, whether its size is seen."""

    image: int
    overlaps: np.ndarray
    in_area_range: bool


def _claims(data: DetectionSet, label: int, rules: Rules, truth: Sequence[_Truth]) -> list[_Claim]:
    """Detections of a class, best first, with their overlaps."""
    own = [item for item in data.found if item.label == label]
    scores = np.array([round(f.score, 3) if rules.rounded else f.score for f in own])
    kept: dict[int, int] = {}
    claims = []
    smallest, largest = rules.area_range
    for place in rules.order(scores) if own else ():
        image = own[place].image
        kept[image] = kept.get(image, 0) + 1
        if rules.max_detections is not None and kept[image] > rules.max_detections:
            continue
        box = np.array(own[place].box)
        if rules.origin == 1:
            box = box + np.array([1.0, 1.0, 0.0, 0.0])
        if rules.rounded:
            box = np.array([float(f"{value:.1f}") for value in box])
        area = float(_areas(box[None], rules)[0])
        overlaps = _overlaps(box, truth[image], rules)
        claims.append(_Claim(image, overlaps, smallest <= area <= largest))
    return claims


def _areas(corners: np.ndarray, rules: Rules) -> np.ndarray:
    extra = 1.0 if rules.extra_pixel else 0.0
    return (corners[:, 2] - corners[:, 0] + extra) * (corners[:, 3] - corners[:, 1] + extra)


def _overlaps(box: np.ndarray, truth: _Truth, rules: Rules) -> np.ndarray:
    """Intersection over union of a box with each object of a picture."""
    extra = 1.0 if rules.extra_pixel else 0.0
    low = np.maximum(box[:2], truth.corners[:, :2])
    high = np.minimum(box[2:], truth.corners[:, 2:])
    shared = np.clip(high - low + extra, 0.0, None).prod(axis=1)
    own = _areas(box[None], rules)
    union = own + _areas(truth.corners, rules) - shared
    if rules.crowd_overlap:
        union = np.where(truth.difficult, own, union)
    return shared / union


def _verdicts(
    claims: Sequence[_Claim], truth: Sequence[_Truth], threshold: float, rules: Rules
) -> list[bool]:
    """True and false positives, best score first; what is ignored is left out."""
    used = [np.zeros(len(one.ignored), dtype=bool) for one in truth]
    verdicts = []
    for claim in claims:
        one, taken = truth[claim.image], used[claim.image]
        enough = claim.overlaps >= threshold if rules.reached else claim.overlaps > threshold
        match = _match(claim.overlaps, enough, one, taken, rules)
        if match is None:
            if claim.in_area_range:
                verdicts.append(False)
        elif not one.ignored[match]:
            verdicts.append(not taken[match])
            taken[match] = True
        else:
            taken[match] = True
    return verdicts


def _match(
    overlaps: np.ndarray, enough: np.ndarray, truth: _Truth, taken: np.ndarray, rules: Rules
) -> int | None:
    """Which object a detection claims, if any."""
    if rules.matching == "best":
        candidates = np.ones(len(overlaps), dtype=bool)
    else:
        candidates = ~taken | truth.difficult
    candidates &= enough
    if rules.counted_first and (candidates & ~truth.ignored).any():
        candidates &= ~truth.ignored
    if not candidates.any():
        return None
    best = np.flatnonzero(candidates & (overlaps == overlaps[candidates].max()))
    return int(best[0] if rules.matching == "best" else best[-1])


def _average(verdicts: Sequence[bool], num_counted: int, rules: Rules) -> float:
    """Precision averaged over recall."""
    hits = np.cumsum(np.array(verdicts, dtype=float))
    recall = hits / num_counted
    precision = hits / np.arange(1, len(hits) + 1)
    # The precision at a recall is the highest one at that recall or beyond.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if rules.recall_points is None:
        steps = np.diff(recall, prepend=0.0)
        return float(np.sum(steps * envelope))
    places = np.searchsorted(recall, rules.recall_points, side="left")
    padded = np.append(envelope, 0.0)
    return float(np.mean(padded[places]))
