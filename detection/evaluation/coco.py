"""COCO's AP by pycocotools on the boxes that the VOC evaluator sees: a cross-check of the figures.

docs/metrics.md says what separates the two metrics, rule by rule, and by how much.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.annotations.canonical import coco_content
from detection.dataset import VocSplit

_STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of COCOeval.stats


class CocoEvaluator(DatasetEvaluator):
    """COCO's metric on a VOC-layout list; "difficult" objects are what COCO calls crowds.

    pycocotools reads no other mark of an object that shall neither help nor harm: it overwrites
    `ignore` with `iscrowd`.
    """

    def __init__(self, split: VocSplit, classes: Sequence[str]) -> None:
        """Evaluate on the pictures of `split`; detections name classes by their place."""
        self._split, self._classes = split, tuple(classes)
        self._numbers = {item.image_id: i for i, item in enumerate(split.pictures, start=1)}
        self._rows: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget."""
        self._rows = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the boxes of a batch, as (x0, y0, width, height) in pixels, not rounded."""
        for given, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.double()
            boxes[:, 2:] -= boxes[:, :2]
            found = zip(
                boxes.tolist(),
                instances.scores.tolist(),
                instances.pred_classes.tolist(),
                strict=True,
            )
            self._rows += [
                {
                    "image_id": self._numbers[given["image_id"]],
                    "category_id": label + 1,
                    "bbox": box,
                    "score": score,
                }
                for box, score, label in found
            ]

    def evaluate(self) -> dict[str, Any] | None:
        """AP, and the curves by COCO's matching.

        Returns:
            {"coco": {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class": {class: AP}},
            "coco_classes": rows}, in percent; None where no object counts, such as no small one.
            A row of `coco_classes` has AP, AP50, AP75 and "curves" of a class (see `_row`). On
            other ranks than the first nothing is returned.
        """
        gathered = comm.gather(self._rows, dst=0)
        if not comm.is_main_process():
            return None
        rows = [row for part in gathered for row in part or ()]
        content = coco_content(self._split.pictures, self._classes)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its tables
            truth = _indexed(content)
            # loadRes takes a list, too, whatever its type says; but not an empty one.
            found = truth.loadRes(rows) if rows else _indexed(content | {"annotations": []})  # pyright: ignore[reportArgumentType]
            evaluation = COCOeval(truth, found, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats = dict(zip(_STATISTICS, evaluation.stats.tolist(), strict=False))
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # threshold, recall, class
        recall = evaluation.eval["recall"][:, :, 0, -1]
        rows = {
            name: _row(precision[:, :, label], recall[:, label])
            for label, name in enumerate(self._classes)
            if precision[0, 0, label] > -1
        }
        return {
            "coco": {
                **{key: _percent(value) for key, value in stats.items()},
                "per_class": {name: row["AP"] for name, row in rows.items()},
            },
            "coco_classes": rows,
        }


def _row(precision: np.ndarray, recall: np.ndarray) -> dict[str, Any]:
    """One class.

    Args:
        precision: (10 overlaps, 101 levels of recall), in 0..1.
        recall: (10 overlaps,), the highest one.

    Returns:
        {"AP", "AP50", "AP75"} in percent and "curves" as ClasswiseVOCEvaluator has them.
    """
    by_overlap = (100 * precision.mean(axis=1)).tolist()
    curves = {
        key: {
            "precision": [round(value, 4) for value in precision[place].tolist()],
            "max_recall": round(float(recall[place]), 4),
        }
        for key, place in (("0.50", 0), ("0.75", 5))
    }
    mean = float(100 * precision.mean())
    return {"AP": mean, "AP50": by_overlap[0], "AP75": by_overlap[5], "curves": curves}


def _percent(share: float) -> float | None:
    """Pycocotools says -1 where nothing counts."""
    return None if share < 0 else 100 * share


def _indexed(content: dict[str, Any]) -> COCO:
    """Annotations as pycocotools wants them."""
    coco = COCO()
    coco.dataset = content  # pyright: ignore[reportAttributeAccessIssue]
    coco.createIndex()
    return coco
