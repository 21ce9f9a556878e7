"""Collects the boxes of an evaluation for the error analysis."""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from detection.dataset import VocSplit
from detection.evaluation.error_analysis import ALL_KINDS, Detections, Objects, error_table, judge


class ErrorEvaluator(DatasetEvaluator):
    """Names the kind of every detection; boxes are rounded as Detectron2's VOC evaluator does."""

    def __init__(self, split: VocSplit, classes: Sequence[str], metric_year: int | None) -> None:
        """Evaluate on the pictures of `split`; detections name classes by their place.

        Args:
            split: The pictures, with their objects.
            classes: Names in the detector's order.
            metric_year: How AP50 is averaged over recall: 2007, 2012, or None for 101 levels.
        """
        self._split, self._classes, self._metric_year = split, tuple(classes), metric_year
        self._numbers = {item.image_id: i for i, item in enumerate(split.pictures)}
        self._parts: list[tuple[int, list[int], list[float], np.ndarray]] = []

    def reset(self) -> None:
        """Forget."""
        self._parts = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the boxes of a batch: pixels from 1, corners to 0.1, scores to 3 decimals."""
        for given, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            corners = instances.pred_boxes.tensor.numpy() + np.array([1, 1, 0, 0], np.float32)
            rounded = [float(f"{value:.1f}") for value in corners.ravel()]
            scores = [float(f"{value:.3f}") for value in instances.scores.tolist()]
            number = self._numbers[given["image_id"]]
            boxes = np.array(rounded).reshape(-1, 4)
            self._parts.append((number, instances.pred_classes.tolist(), scores, boxes))

    def evaluate(self) -> dict[str, Any] | None:
        """The table of errors and the kind of every detection.

        Returns:
            {"errors": see `error_table`, "kinds": {picture: [kind of each detection, in the order
            in which the detector gave them]}}; None on other ranks than the first.
        """
        gathered = comm.gather(self._parts, dst=0)
        if not comm.is_main_process():
            return None
        parts = [part for own in gathered for part in own or ()]
        objects, found = objects_of(self._split, self._classes), _joined(parts)
        verdicts = judge(objects, found)
        table = error_table(
            objects, found, verdicts, self._classes, len(self._numbers), self._metric_year
        )
        names = iter([ALL_KINDS[kind] for kind in verdicts.kind])
        pictures = self._split.pictures
        kinds = {
            pictures[number].image_id: [next(names) for _ in labels]
            for number, labels, _, _ in parts
        }
        return {"errors": table, "kinds": kinds}


def objects_of(split: VocSplit, classes: Sequence[str]) -> Objects:
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


def _joined(parts: Sequence[tuple[int, list[int], list[float], np.ndarray]]) -> Detections:
    """All detections, in the order in which the processes saw the pictures."""
    counts = [len(labels) for _, labels, _, _ in parts]
    return Detections(
        np.repeat([number for number, _, _, _ in parts], counts).astype(np.int64),
        np.array([label for _, labels, _, _ in parts for label in labels], dtype=np.int64),
        np.concatenate([np.empty((0, 4)), *(boxes for _, _, _, boxes in parts)]),
        np.array([score for _, _, scores, _ in parts for score in scores], dtype=float),
    )
