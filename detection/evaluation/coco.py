"""COCO's AP by pycocotools on the canonical JSON: a COCO set's metric, a cross-check of VOC's.

docs/detection.md says what separates the two metrics, rule by rule, and by how much.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.annotations.canonical import coco_content
from common.annotations.record import LabelledSplit
from detection.evaluation.results import ClassFigures, Curve, DetectedBoxes

_STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of COCOeval.stats


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
