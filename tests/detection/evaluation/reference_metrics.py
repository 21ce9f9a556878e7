"""VOC's and COCO's metrics written from their definitions: the reference of several tests.

It is compared with Detectron2's evaluator and pycocotools on random sets; docs/detection.md
explains what separates the two metrics. Random detections lie on a grid of 1/8 pixel: every sum is
exact, so that no metric decides an overlap that equals its threshold by the way it rounds.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import contextlib
import io
import math
import uuid
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_ap, voc_eval
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO as CocoSet
from pycocotools.cocoeval import COCOeval

from common.annotations import record

VOC_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
COCO_AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
_TO_CONTINUOUS = np.array([1.0, 1.0, 0.0, 0.0])  # from corners counted from 1, inclusive, to 0
_SIDE = 256  # pixels of a picture of a random set
_SCORE_LEVELS = (3, 20, 1 << 20)  # few levels: many equal scores


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


@dataclass(frozen=True)
class Rules:
    """A metric.

    Attributes:
        is_voc: VOC rounds scores to 3 decimals and corners to 0.1 pixels, counts pixels from 1 and
            a side as xmax - xmin + 1, wants an overlap above the threshold, and has a detection
            claim the object that it overlaps most: a second claim is a false positive. COCO has
            lengths from 0, an overlap that reaches the threshold, a claim of the best object that
            is still free and preferably counts, the overlap with a difficult object relative to the
            detection alone, and at most 100 detections of a picture and class.
        recall_points: Levels at which precision is averaged; None: area under the curve.
        area_range: Smallest and largest area (pixels) of what is looked at; the rest is ignored.
    """

    is_voc: bool
    recall_points: tuple[float, ...] | None
    area_range: tuple[float, float] = (0.0, 1e10)


# Both libraries count recall levels in floating point: 3 * 0.1 is a little more than 0.3, so that a
# recall of exactly 3/10 does not reach that level (nor 6/10 and 7/10 theirs).
COCO = Rules(is_voc=False, recall_points=tuple(k * 0.01 for k in range(101)))
VOC_2007 = Rules(is_voc=True, recall_points=tuple(k * 0.1 for k in range(11)))
VOC_2012 = Rules(is_voc=True, recall_points=None)


# -- average precision --


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
        corners -= _TO_CONTINUOUS * (not rules.is_voc)  # pixel 1 covers 0..1
        difficult = np.array([item.difficult for item in own], dtype=bool)
        truth.append(_Truth(corners, difficult | ~_is_in_range(corners, rules), difficult))
    num_counted = sum(int((~one.ignored).sum()) for one in truth)
    if num_counted == 0:
        return None

    # The detections, best first, with their overlaps.
    found = [item for item in data.found if item.label == label]
    scores = -np.array([round(f.score, 3) if rules.is_voc else f.score for f in found])
    # Equal scores stay in the order they came in (COCO), or as numpy's default sort leaves them.
    order = np.argsort(scores, kind=None if rules.is_voc else "stable")
    claims, kept = [], Counter()
    for item in (found[place] for place in order):
        kept[item.image] += 1
        if rules.is_voc or kept[item.image] <= 100:
            box = np.array(item.box) + _TO_CONTINUOUS * rules.is_voc
            if rules.is_voc:
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
    extra = float(rules.is_voc)
    return (corners[:, 2] - corners[:, 0] + extra) * (corners[:, 3] - corners[:, 1] + extra)


def _is_in_range(corners: np.ndarray, rules: Rules) -> np.ndarray:
    smallest, largest = rules.area_range
    areas = _areas(corners, rules)
    return (areas >= smallest) & (areas <= largest)


def _overlaps(box: np.ndarray, truth: _Truth, rules: Rules) -> np.ndarray:
    """Intersection over union of a box with each object of a picture."""
    extra = float(rules.is_voc)
    low = np.maximum(box[:2], truth.corners[:, :2])
    high = np.minimum(box[2:], truth.corners[:, 2:])
    shared = np.clip(high - low + extra, 0.0, None).prod(axis=1)
    own = _areas(box[None], rules)
    union = own + _areas(truth.corners, rules) - shared
    if not rules.is_voc:
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
        candidates = overlaps > threshold if rules.is_voc else overlaps >= threshold
        if not rules.is_voc:
            candidates &= ~taken | one.difficult
            if (candidates & ~one.ignored).any():
                candidates &= ~one.ignored
        if candidates.any():
            best = np.flatnonzero(candidates & (overlaps == overlaps[candidates].max()))
            match = best[0 if rules.is_voc else -1]
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


# -- random sets --


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


# -- the two libraries --


def picture_records(data: DetectionSet) -> list[record.PictureRecord]:
    """The pictures of a random set as readers give them; classes are class0, class1, .."""
    pictures = []
    for image in range(data.num_images):
        objects = tuple(
            record.ObjectRecord(
                f"class{item.label}", tuple(item.box - _TO_CONTINUOUS), difficult=item.difficult
            )
            for item in data.truth
            if item.image == image
        )
        file = Path(f"{image}.jpg")
        pictures.append(record.PictureRecord(str(image), file, _SIDE, _SIDE, objects, ""))
    return pictures


def detectron2_lines(data: DetectionSet, folder: Path) -> dict[int, list[str]]:
    """What Detectron2's own evaluator gets to its metric: lines of each class's detections.

    The annotations are written into the folder, which is empty.
    """
    parse_rec.cache_clear()  # it keeps every annotation that it has read
    record.make_folders(folder)
    pictures = picture_records(data)
    for item in pictures:
        xml = record.annotation_xml(item.file.name, item.width, item.height, item.objects)
        record.annotation_file(folder, item.image_id).write_bytes(xml)
    record.write_list(folder, "test", [item.image_id for item in pictures])
    dataset = f"stock-{uuid.uuid4()}"
    names = [f"class{label}" for label in range(data.num_classes)]
    metadata = {"thing_classes": names, "dirname": str(folder)}
    MetadataCatalog.get(dataset).set(**metadata, year=2012, split="test")
    evaluator = PascalVOCDetectionEvaluator(dataset)
    MetadataCatalog.remove(dataset)
    evaluator.reset()
    for image in range(data.num_images):
        found = [item for item in data.found if item.image == image]
        instances = Instances((1, 1))
        instances.pred_boxes = Boxes(torch.tensor([item.box for item in found]).reshape(-1, 4))
        instances.scores = torch.tensor([item.score for item in found])
        instances.pred_classes = torch.tensor([item.label for item in found]).long()
        evaluator.process([{"image_id": str(image)}], [{"instances": instances}])
    return evaluator._predictions


def pycocotools_evaluation(data: DetectionSet) -> COCOeval:
    """Pycocotools on a set, difficult objects as crowds; its `eval["precision"]` is filled."""
    truth: Any = CocoSet()
    found: Any = CocoSet()
    classes = [f"class{label}" for label in range(data.num_classes)]
    truth.dataset = record.coco_content(picture_records(data), classes)
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


# -- the comparison --


def voc_differences(data: DetectionSet, folder: Path) -> list[float]:
    """Compare with Detectron2's VOC evaluator on one set.

    Args:
        data: The set.
        folder: An empty place for annotations.

    Returns:
        Difference of each AP in 0..1, of classes, thresholds and both years; infinite if one side
        says that AP is not defined and the other does not.
    """
    lines, differences = detectron2_lines(data, folder), []
    for label in range(data.num_classes):
        detections = folder / f"class{label}.txt"
        detections.write_text("\n".join(lines.get(label, [""])))
        ours = [
            average_precisions(data, label, VOC_THRESHOLDS, rules) for rules in (VOC_2007, VOC_2012)
        ]
        for place, threshold in enumerate(VOC_THRESHOLDS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0
                recall, precision, eleven = voc_eval(
                    str(detections), f"{folder}/Annotations/{{}}.xml",
                    f"{folder}/ImageSets/Main/test.txt", f"class{label}", ovthresh=threshold,
                    use_07_metric=True,
                )  # fmt: skip
            area = float(voc_ap(recall, precision, use_07_metric=False))
            # Without an object that counts its recall is no number; its 11-point sum makes 0 of it.
            is_undefined = ours[0] is None and not np.isfinite(recall).any()
            for row, value in zip(ours, (float(eleven), area), strict=True):
                differences.append(_apart(row, place, None if is_undefined else value))
    return differences


def _apart(ours: Sequence[float] | None, place: int, theirs: float | None) -> float:
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    return abs(ours[place] - theirs)


def coco_differences(data: DetectionSet) -> list[float]:
    """Compare with pycocotools on one set, over classes, thresholds and areas."""
    evaluation = pycocotools_evaluation(data)
    thresholds = evaluation.params.iouThrs.tolist()
    differences = []
    for area, limits in enumerate(COCO_AREAS):
        rules = replace(COCO, area_range=limits)
        for label in range(data.num_classes):
            theirs = evaluation.eval["precision"][:, :, label, area, -1].mean(axis=1)
            ours = average_precisions(data, label, thresholds, rules)
            for place, value in enumerate(theirs.tolist()):
                differences.append(_apart(ours, place, None if value < 0 else value))
    return differences
