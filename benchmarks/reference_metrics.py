"""Average precision written from the definitions of VOC and COCO, and random sets to compare it on.

One computation stands for both metrics: `VOC_2007`, `VOC_2012` and `COCO` are settings of it.
benchmarks/voc_eval_parity.py compares them with Detectron2's evaluator and with pycocotools, and
changes one rule after another to see what separates the metrics (docs/detection.md). Random
detections lie on a grid of 1/8 pixel: every sum is exact, so that no metric decides an overlap that
equals its threshold by the way it rounds.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import contextlib
import io
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_ap, voc_eval
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO as CocoSet
from pycocotools.cocoeval import COCOeval

from common.annotations.record import ObjectRecord, PictureRecord, coco_content, write_annotations
from common.files import read_json

# Both libraries count recall levels in floating point: 3 * 0.1 is a little more than 0.3, so that a
# recall of exactly 3/10 does not reach that level (nor 6/10 and 7/10 theirs).
ELEVEN_POINTS = tuple(k * 0.1 for k in range(11))
ELEVEN_EXACT_POINTS = tuple(k / 10 for k in range(11))
POINTS_101 = tuple(k * 0.01 for k in range(101))
_TO_CONTINUOUS = np.array([1.0, 1.0, 0.0, 0.0])  # from corners counted from 1, inclusive, to 0
_SIDE = 256  # pixels of a picture of a random set
_SCORE_LEVELS = (3, 20, 1 << 20)  # few levels: many equal scores
Order = Callable[[np.ndarray], np.ndarray]  # scores -> indices, highest score first


@dataclass(frozen=True)
class TrueObject:
    """An annotated object; `box` is (xmin, ymin, xmax, ymax) in whole pixels from 1, inclusive."""

    image: int
    label: int
    box: tuple[int, int, int, int]
    difficult: bool


@dataclass(frozen=True)
class FoundBox:
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
    found: tuple[FoundBox, ...]


def stable_order(scores: np.ndarray) -> np.ndarray:
    """Highest score first; equal scores stay in the order they came in."""
    return np.argsort(-scores, kind="stable")


def numpy_order(scores: np.ndarray) -> np.ndarray:
    """Highest score first; equal scores in whatever order numpy's default sort leaves them."""
    return np.argsort(-scores)


@dataclass(frozen=True)
class Rules:
    """What makes a metric; the defaults are COCO's.

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

    rounded: bool = False
    origin: Literal[0, 1] = 0
    extra_pixel: bool = False
    reached: bool = True
    matching: Literal["best", "free"] = "free"
    counted_first: bool = True
    crowd_overlap: bool = True
    recall_points: tuple[float, ...] | None = POINTS_101
    max_detections: int | None = 100
    area_range: tuple[float, float] = (0.0, 1e10)
    order: Order = stable_order


COCO = Rules()
VOC_2007 = Rules(
    rounded=True, origin=1, extra_pixel=True, reached=False, matching="best", counted_first=False,
    crowd_overlap=False, recall_points=ELEVEN_POINTS, max_detections=None, order=numpy_order,
)  # fmt: skip
VOC_2012 = replace(VOC_2007, recall_points=None)


def average_precisions(
    data: DetectionSet, label: int, thresholds: Sequence[float], rules: Rules
) -> list[float] | None:
    """AP of one class at each overlap threshold, in 0..1.

    Returns:
        None if the class has no object that counts: its AP is not defined.
    """
    # The objects of each picture.
    truth = []
    for image in range(data.num_images):
        own = [item for item in data.truth if item.image == image and item.label == label]
        corners = np.array([item.box for item in own], dtype=float).reshape(-1, 4)
        corners -= _TO_CONTINUOUS * (rules.origin == 0)  # pixel 1 covers 0..1
        difficult = np.array([item.difficult for item in own], dtype=bool)
        truth.append(_Truth(corners, difficult | ~_is_in_range(corners, rules), difficult))
    num_counted = sum(int((~one.ignored).sum()) for one in truth)
    if num_counted == 0:
        return None

    # The detections, best first, with their overlaps.
    found = [item for item in data.found if item.label == label]
    scores = np.array([round(f.score, 3) if rules.rounded else f.score for f in found])
    claims, kept = [], Counter()
    for item in (found[place] for place in (rules.order(scores) if found else ())):
        kept[item.image] += 1
        if rules.max_detections is None or kept[item.image] <= rules.max_detections:
            box = np.array(item.box) + _TO_CONTINUOUS * (rules.origin == 1)
            if rules.rounded:
                box = np.array([float(f"{value:.1f}") for value in box])
            in_range = bool(_is_in_range(box[None], rules)[0])
            claims.append((item.image, _overlaps(box, truth[item.image], rules), in_range))
    return [_average_precision(claims, truth, t, num_counted, rules) for t in thresholds]


@dataclass(frozen=True)
class _Truth:
    """Objects of one class in one picture: corners (n, 4), who is ignored, who may be reused."""

    corners: np.ndarray
    ignored: np.ndarray
    difficult: np.ndarray


def _areas(corners: np.ndarray, rules: Rules) -> np.ndarray:
    extra = 1.0 if rules.extra_pixel else 0.0
    return (corners[:, 2] - corners[:, 0] + extra) * (corners[:, 3] - corners[:, 1] + extra)


def _is_in_range(corners: np.ndarray, rules: Rules) -> np.ndarray:
    smallest, largest = rules.area_range
    areas = _areas(corners, rules)
    return (areas >= smallest) & (areas <= largest)


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


def _average_precision(
    claims: Sequence[tuple[int, np.ndarray, bool]], truth: Sequence[_Truth], threshold: float,
    num_counted: int, rules: Rules,
) -> float:  # fmt: skip
    """AP of claims: (picture, overlap with each object there, whether its own size is seen)."""
    # True and false positives, best score first; what is ignored is left out.
    used = [np.zeros(len(one.ignored), dtype=bool) for one in truth]
    verdicts = []
    for image, overlaps, in_range in claims:
        one, taken = truth[image], used[image]
        candidates = overlaps >= threshold if rules.reached else overlaps > threshold
        if rules.matching == "free":
            candidates &= ~taken | one.difficult
        if rules.counted_first and (candidates & ~one.ignored).any():
            candidates &= ~one.ignored
        if candidates.any():
            best = np.flatnonzero(candidates & (overlaps == overlaps[candidates].max()))
            match = best[0 if rules.matching == "best" else -1]
            if not one.ignored[match]:
                verdicts.append(not taken[match])
            taken[match] = True
        elif in_range:
            verdicts.append(False)

    # The precision at a recall is the highest one at that recall or beyond; its average.
    hits = np.cumsum(np.array(verdicts, dtype=float))
    recall = hits / num_counted
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if rules.recall_points is None:
        return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
    places = np.searchsorted(recall, rules.recall_points, side="left")
    return float(np.mean(np.append(envelope, 0.0)[places]))


def random_set(seed: int) -> DetectionSet:
    """Objects (some difficult, some doubled) and detections (moved, doubled, wrong, or none)."""
    rng = np.random.default_rng(seed)
    crowded = rng.random() < 0.04  # more detections in a picture than COCO looks at
    num_images = 1 if crowded else int(rng.integers(1, 7))
    num_classes = 1 if crowded else int(rng.integers(1, 5))
    share_difficult = float(rng.choice([0.0, 0.2, 0.5]))
    levels = int(rng.choice(_SCORE_LEVELS))
    truth: list[TrueObject] = []
    found: list[FoundBox] = []
    silent = rng.random() < 0.05  # a detector that finds nothing
    for image in range(num_images):
        for _ in range(int(rng.integers(0, 7)) + (40 if crowded else 0)):
            label = int(rng.integers(num_classes))  # a class may end without objects
            item = TrueObject(image, label, _box(rng), bool(rng.random() < share_difficult))
            truth += [item] * (2 if rng.random() < 0.08 else 1)
        near = [item for item in truth if item.image == image]
        num_found = 0 if silent else int(rng.integers(0, 25)) + (150 if crowded else 0)
        for _ in range(num_found):
            found += _detection(rng, image, num_classes, near, levels)
    return DetectionSet(num_images, num_classes, tuple(truth), tuple(found))


def _box(rng: np.random.Generator) -> tuple[int, int, int, int]:
    side = int(rng.choice([30, 90, _SIDE]))  # below and above COCO's area limits
    xmin, ymin = (int(value) for value in rng.integers(1, _SIDE - 4, 2))
    width, height = (int(value) for value in rng.integers(1, side, 2))
    return xmin, ymin, min(xmin + width, _SIDE), min(ymin + height, _SIDE)


def _detection(
    rng: np.random.Generator, image: int, num_classes: int, near: list[TrueObject], levels: int
) -> list[FoundBox]:
    """One detection, sometimes twice: most are a moved object, exact, or anywhere."""
    label, box = int(rng.integers(num_classes)), np.array(_box(rng), dtype=float)
    if near and rng.random() < 0.85:
        item = near[int(rng.integers(len(near)))]
        label = item.label if rng.random() < 0.85 else label
        xmin, ymin, xmax, ymax = item.box
        spread = float(rng.choice([0.0, 0.04, 0.12])) * np.array([xmax - xmin, ymax - ymin] * 2)
        box = np.array([xmin - 1, ymin - 1, xmax, ymax], dtype=float)
        if rng.random() < 0.1:  # an overlap of exactly 1/2 or 3/4
            box[2] -= (xmax - xmin + 1) * float(rng.choice([0.25, 0.5]))
        else:
            box += rng.normal(0, 1, 4) * spread
    box = np.round(8 * box) / 8
    box[2:] = np.maximum(box[2:], box[:2] + 0.125)
    score = float(np.float32(rng.integers(1, levels + 1) / levels))
    one = FoundBox(image, label, score, tuple(box.tolist()))
    return [one] * (2 if rng.random() < 0.1 else 1)


def real_set(detections: Path) -> tuple[DetectionSet, list[str]]:
    """The pictures of a detections.json (docs/files.md, section 5), and the class names."""
    rows = read_json(detections)
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
            found.append(FoundBox(image, names.index(item["class"]), item["score"], box))
    return DetectionSet(len(rows), len(names), tuple(truth), tuple(found)), names


def picture_records(data: DetectionSet) -> list[PictureRecord]:
    """The pictures of a random set as readers give them; classes are class0, class1, .."""
    pictures = []
    for image in range(data.num_images):
        objects = tuple(
            ObjectRecord(
                f"class{item.label}", tuple(item.box - _TO_CONTINUOUS), difficult=item.difficult
            )
            for item in data.truth
            if item.image == image
        )
        file = Path(f"{image}.jpg")
        pictures.append(PictureRecord(str(image), file, _SIDE, _SIDE, objects, ""))
    return pictures


class Detectron2Evaluation:
    """Detectron2's own VOC evaluator, as it is, after the last picture of a set."""

    def __init__(self, data: DetectionSet, folder: Path) -> None:
        """Write the annotations into an empty folder."""
        parse_rec.cache_clear()  # it keeps every annotation that it has read
        write_annotations(folder, "test", picture_records(data))
        self._data, self._folder = data, folder
        self._lines = self._evaluator(2012)._predictions

    def _evaluator(self, year: int) -> PascalVOCDetectionEvaluator:
        """The evaluator of a year, with all detections processed."""
        dataset = f"stock-{uuid.uuid4()}"
        names = [f"class{label}" for label in range(self._data.num_classes)]
        metadata = {"thing_classes": names, "dirname": str(self._folder)}
        MetadataCatalog.get(dataset).set(**metadata, year=year, split="test")
        evaluator = PascalVOCDetectionEvaluator(dataset)
        MetadataCatalog.remove(dataset)
        evaluator.reset()
        for image in range(self._data.num_images):
            found = [item for item in self._data.found if item.image == image]
            instances = Instances((1, 1))
            instances.pred_boxes = Boxes(torch.tensor([item.box for item in found]).reshape(-1, 4))
            instances.scores = torch.tensor([item.score for item in found])
            instances.pred_classes = torch.tensor([item.label for item in found]).long()
            evaluator.process([{"image_id": str(image)}], [{"instances": instances}])
        return evaluator

    def means(self, year: int) -> dict[str, float]:
        """AP, AP50 and AP75 over all classes, in percent."""
        result = self._evaluator(year).evaluate()
        assert result is not None
        return {key: float(value) for key, value in result["bbox"].items()}

    def class_figures(self, label: int, threshold: float) -> tuple[np.ndarray, float, float]:
        """Recall after each detection of a class, and its AP in 0..1 by 11 points and by area.

        Without an object that counts it divides by zero: then no recall is a number.
        """
        lines = self._folder / f"class{label}.txt"
        lines.write_text("\n".join(self._lines.get(label, [""])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0
            recall, precision, eleven = voc_eval(
                str(lines), f"{self._folder}/Annotations/{{}}.xml",
                f"{self._folder}/ImageSets/Main/test.txt", f"class{label}", ovthresh=threshold,
                use_07_metric=True,
            )  # fmt: skip
        return recall, float(eleven), float(voc_ap(recall, precision, use_07_metric=False))


def pycocotools_evaluation(data: DetectionSet) -> COCOeval:
    """Pycocotools on a set, difficult objects as crowds; its `eval["precision"]` is filled."""
    truth: Any = CocoSet()
    found: Any = CocoSet()
    classes = [f"class{label}" for label in range(data.num_classes)]
    truth.dataset = coco_content(picture_records(data), classes)
    rows = []
    for item in data.found:
        x0, y0, x1, y1 = item.box
        rows.append({
            "image_id": item.image + 1, "category_id": item.label + 1, "score": item.score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        })  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.dataset = truth.dataset | {"annotations": []}
        found.createIndex()
        if rows:  # loadRes takes no empty list
            found = truth.loadRes(rows)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation
