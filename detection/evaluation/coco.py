"""COCO's AP by pycocotools on the boxes that VOC's metric sees: a cross-check of the figures.

docs/metrics.md says what separates the two metrics, rule by rule, and by how much.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.annotations.canonical import coco_content
from detection.dataset import VocSplit

_STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of COCOeval.stats


def coco_metric(
    split: VocSplit,
    classes: Sequence[str],
    image: np.ndarray,
    label: np.ndarray,
    score: np.ndarray,
    box: np.ndarray,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """AP, and the curves by COCO's matching.

    "Difficult" objects are what COCO calls crowds: pycocotools reads no other mark of an object
    that shall neither help nor harm, since it overwrites `ignore` with `iscrowd`.

    Args:
        split: The pictures.
        classes: Names in the detector's order.
        image: (n,) place of each detection's picture.
        label: (n,) place of its class.
        score: (n,) in 0..1.
        box: (n, 4) x0, y0, x1, y1 in pixels from 0, not rounded.

    Returns:
        {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class": {class: AP}} in percent, None where
        no object counts, such as no small one. And for each class AP, AP50, AP75 and "curves", see
        `evaluation.voc.voc_metric`.
    """
    box = box.astype(float)
    box[:, 2:] -= box[:, :2]
    columns = (image.tolist(), label.tolist(), score.tolist(), box.tolist())
    detections = [
        {"image_id": place + 1, "category_id": number + 1, "score": value, "bbox": corners}
        for place, number, value, corners in zip(*columns, strict=True)
    ]
    content = coco_content(split.pictures, classes)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its tables
        truth = _indexed(content)
        # loadRes takes a list, too, whatever its type says; but not an empty one.
        found = truth.loadRes(detections) if detections else _indexed(content | {"annotations": []})  # pyright: ignore[reportArgumentType]
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = dict(zip(_STATISTICS, evaluation.stats.tolist(), strict=False))
    all_precisions = evaluation.eval["precision"][:, :, :, 0, -1]  # overlap, recall level, class
    all_recalls = evaluation.eval["recall"][:, :, 0, -1]  # overlap, class: the highest recall
    rows = {}
    for number, name in enumerate(classes):
        precision, recall = all_precisions[:, :, number], all_recalls[:, number]
        if precision[0, 0] > -1:  # pycocotools says -1 where nothing counts
            by_overlap = (100 * precision.mean(axis=1)).tolist()
            curves = {
                key: {
                    "precision": [round(value, 4) for value in precision[place].tolist()],
                    "max_recall": round(float(recall[place]), 4),
                }
                for key, place in (("0.50", 0), ("0.75", 5))
            }
            rows[name] = {
                "AP": float(100 * precision.mean()),
                "AP50": by_overlap[0],
                "AP75": by_overlap[5],
                "curves": curves,
            }
    figures = {key: None if value < 0 else 100 * value for key, value in stats.items()}
    return {**figures, "per_class": {name: row["AP"] for name, row in rows.items()}}, rows


def _indexed(content: dict[str, Any]) -> COCO:
    """Annotations as pycocotools wants them."""
    coco = COCO()
    coco.dataset = content  # pyright: ignore[reportAttributeAccessIssue]
    coco.createIndex()
    return coco
