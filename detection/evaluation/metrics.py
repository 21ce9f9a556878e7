"""What an evaluation starts from and what it gives: detections, AP by VOC's and by COCO's metric.

VOC's AP comes from Detectron2's `voc_eval` on a canonical devkit that is written for it, COCO's
from pycocotools on the canonical JSON: a COCO set's metric, a cross-check of VOC's.
docs/detection.md says what separates the two metrics, rule by rule, and by how much.
"""

# Detectron2 makes these at run time.
# pyright: reportOptionalMemberAccess=false
import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import contextlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.annotations.record import LabelledSplit, coco_content, list_file, write_annotations
from detection.evaluation.error_analysis import Detections

METRICS = ("AP", "AP50", "AP75")
RECALL_LEVELS = tuple(level / 100 for level in range(101))
_THRESHOLDS = tuple(range(50, 100, 5))  # percent of overlap
_CURVE_THRESHOLDS = (50, 75)
_STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of COCOeval.stats


@dataclass(frozen=True)
class DetectedBoxes:
    """Detections of all pictures, in the order in which the processes evaluated them.

    Attributes:
        image: (n,) int64, place of the picture in the list.
        label: (n,) int64, place of the class.
        score: (n,) float32 in 0..1.
        box: (n, 4) float32, x0, y0, x1, y1 in continuous pixels from 0.
    """

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    box: np.ndarray

    def in_voc(self) -> Detections:
        """As VOC counts; rounded as Detectron2's evaluator does, scores to 0.001, boxes to 0.1."""
        corners = self.box + np.array([1, 1, 0, 0], np.float32)
        scores = [float(f"{value:.3f}") for value in self.score.tolist()]
        rounded = [float(f"{value:.1f}") for value in corners.ravel()]
        boxes = np.array(rounded, dtype=float).reshape(-1, 4)
        return Detections(self.image, self.label, boxes, np.array(scores, dtype=float))


@dataclass(frozen=True)
class Curve:
    """Precision at recall 0, 0.01, .., 1 (0 beyond the highest recall), four decimals."""

    precision: list[float]
    max_recall: float


@dataclass(frozen=True)
class ClassFigures:
    """AP of one class in percent, and its curves at overlaps "0.50" and "0.75"."""

    ap: float
    ap50: float
    ap75: float
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a detector.

    Attributes:
        means: AP, AP50, AP75 in percent by the set's metric, over the classes that occur.
        classes: The figures of every class that occurs, by the set's metric.
        metric_year: 2007 or 2012: VOC's metric; None: COCO's.
        coco: Figures by COCO's metric, see `coco_metric`.
        errors: See `error_analysis.error_table`.
        detections: Rows of detections.json.
        absent: Classes without an object that counts.
        num_images: Pictures evaluated.
        seconds: Duration.
    """

    means: dict[str, float]
    classes: dict[str, ClassFigures]
    metric_year: int | None
    coco: dict[str, Any]
    errors: dict[str, Any]
    detections: list[dict[str, Any]]
    absent: list[str]
    num_images: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The part of result.json that an evaluation decides."""
        return {
            **self.means,
            "per_class": {name: row.ap for name, row in self.classes.items()},
            "per_class_AP50": {name: row.ap50 for name, row in self.classes.items()},
            "per_class_AP75": {name: row.ap75 for name, row in self.classes.items()},
            "coco": self.coco,
            "num_test_images": self.num_images,
            "evaluation_seconds": self.seconds,
        }

    def curves_to_json(self) -> dict[str, Any]:
        """What pr.json holds: the curves of every class, and their levels of recall."""
        return {
            "format": "fa-pr-1",
            "metric_year": self.metric_year,
            "recall": list(RECALL_LEVELS),
            "classes": {
                name: {overlap: asdict(curve) for overlap, curve in row.curves.items()}
                for name, row in self.classes.items()
            },
        }


def voc_metric(
    split: LabelledSplit, classes: Sequence[str], boxes: DetectedBoxes, metric_year: int
) -> dict[str, ClassFigures]:
    """AP of every class that has a test object.

    Detectron2's evaluator returns means over all classes only. Here its `voc_eval` is called as it
    does, on the same lines, and the caller averages over the classes that occur: over all classes
    the figures equal the stock ones.
    """
    absent = split.classes_without_objects(classes)
    in_voc, rows = boxes.in_voc(), {}
    with tempfile.TemporaryDirectory(prefix="voc-evaluation-") as name:
        # Not the user's own files: Detectron2's reader takes UTF-8 and whole numbers only, does not
        # strip class names, and no name of a picture may hold a space.
        folder = Path(name)
        write_annotations(folder, "test", split.pictures)
        lines = folder / "detections.txt"
        for label, class_name in enumerate(classes):
            if class_name in absent:
                continue
            own = np.flatnonzero(in_voc.label == label)
            columns = (in_voc.image[own], in_voc.score[own], in_voc.corners[own])
            lines.write_text(
                "\n".join(
                    f"{image} {score:.3f} " + " ".join(f"{value:.1f}" for value in corners)
                    for image, score, corners in zip(*columns, strict=True)
                )
            )
            precisions, curves = [], {}
            for threshold in _THRESHOLDS:
                recall, precision, average = voc_eval(
                    str(lines),
                    f"{folder}/Annotations/{{}}.xml",
                    str(list_file(folder, "test")),
                    class_name,
                    ovthresh=threshold / 100.0,
                    use_07_metric=metric_year == 2007,
                )
                precisions.append(100 * float(average))
                if threshold in _CURVE_THRESHOLDS:
                    curves[f"{threshold / 100:.2f}"] = curve_points(recall, precision)
            at_50, at_75 = (precisions[_THRESHOLDS.index(place)] for place in (50, 75))
            rows[class_name] = ClassFigures(float(np.mean(precisions)), at_50, at_75, curves)
    parse_rec.cache_clear()  # it keeps every annotation it has read
    return rows


def curve_points(recall: np.ndarray, precision: np.ndarray) -> Curve:
    """A precision-recall curve at 101 levels of recall.

    Args:
        recall: (num_detections,), in 0..1, as it grows with every detection, best score first.
        precision: (num_detections,).

    Returns:
        At each level the highest precision at that recall or beyond, 0 where it is not reached.
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALL_LEVELS, side="left")
    values = np.append(envelope, 0.0)[places]
    highest = float(recall[-1]) if len(recall) else 0.0
    return Curve([round(float(value), 4) for value in values], round(highest, 4))


def coco_metric(
    split: LabelledSplit, classes: Sequence[str], boxes: DetectedBoxes
) -> tuple[dict[str, Any], dict[str, ClassFigures]]:
    """AP, and the curves by COCO's matching.

    "Difficult" objects are what COCO calls crowds: pycocotools reads no other mark of an object
    that must neither help nor harm, since it overwrites `ignore` with `iscrowd`.

    Returns:
        {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class": {class: AP}} in percent, None where
        no object counts, such as no small one; and the figures of each class that occurs.
    """
    corners = boxes.box.astype(float)
    corners[:, 2:] -= corners[:, :2]
    columns = (boxes.image, boxes.label, boxes.score, corners)
    detections = [
        {"image_id": place + 1, "category_id": number + 1, "score": value, "bbox": box}
        for place, number, value, box in zip(*(c.tolist() for c in columns), strict=True)
    ]

    # pycocotools' own evaluation; it prints its tables.
    content = coco_content(split.pictures, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _indexed(content)
        # loadRes takes a list, too, whatever its type says; but not an empty one.
        results = truth.loadRes(detections) if detections else _indexed(content | {"annotations": []})  # pyright: ignore[reportArgumentType]  # fmt: skip  # noqa: E501
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = dict(zip(_STATISTICS, evaluation.stats.tolist(), strict=False))

    # The figures of each class: its precisions (overlap, recall level), its highest recalls.
    all_precisions = evaluation.eval["precision"][:, :, :, 0, -1]  # overlap, recall level, class
    all_recalls = evaluation.eval["recall"][:, :, 0, -1]  # overlap, class
    rows = {}
    for number, name in enumerate(classes):
        precision, recall = all_precisions[:, :, number], all_recalls[:, number]
        if precision[0, 0] > -1:  # pycocotools says -1 where nothing counts
            by_overlap = (100 * precision.mean(axis=1)).tolist()
            curves = {
                overlap: Curve(
                    [round(value, 4) for value in precision[place].tolist()],
                    round(float(recall[place]), 4),
                )
                for overlap, place in (("0.50", 0), ("0.75", 5))
            }
            rows[name] = ClassFigures(
                float(100 * precision.mean()), by_overlap[0], by_overlap[5], curves
            )
    figures = {key: None if value < 0 else 100 * value for key, value in stats.items()}
    return {**figures, "per_class": {name: row.ap for name, row in rows.items()}}, rows


def _indexed(content: dict[str, Any]) -> COCO:
    """Annotations in pycocotools' own class."""
    coco = COCO()
    coco.dataset = content  # pyright: ignore[reportAttributeAccessIssue]
    coco.createIndex()
    return coco
