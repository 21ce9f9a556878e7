"""What an evaluation starts from and what it gives: arrays of detections, AP, curves."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detection.evaluation.error_analysis import Detections

METRICS = ("AP", "AP50", "AP75")
RECALL_LEVELS = tuple(level / 100 for level in range(101))


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
        coco: Figures by COCO's metric, see `coco.coco_metric`.
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
