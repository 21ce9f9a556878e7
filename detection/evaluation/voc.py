"""Evaluation of a detector: VOC's AP by Detectron2's `voc_eval`, COCO's AP, kinds of errors.

The detections of all processes are collected once; every figure is computed from them.
"""

# Detectron2 makes these at run time.
# pyright: reportOptionalMemberAccess=false
import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from common.annotations.canonical import write_annotations
from common.annotations.voc import list_file
from common.errors import UserError
from detection.dataset import VocSet, VocSplit, classes_without_objects
from detection.evaluation.coco import coco_metric
from detection.evaluation.error_analysis import (
    ALL_KINDS,
    Detections,
    error_table,
    judge,
    objects_of,
)

_METRICS = ("AP", "AP50", "AP75")
_THRESHOLDS = tuple(range(50, 100, 5))  # percent of overlap
_CURVE_THRESHOLDS = (50, 75)
_RECALL_LEVELS = tuple(level / 100 for level in range(101))


@dataclass(frozen=True)
class Found:
    """Detections of all pictures, in the order in which the processes saw them.

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


class Collector(DatasetEvaluator):
    """Collects the detections of every picture from every process."""

    def __init__(self, split: VocSplit) -> None:
        """Collect the detections of the pictures of `split`."""
        self._numbers = {item.image_id: i for i, item in enumerate(split.pictures)}
        self._parts: list[Found] = []

    def reset(self) -> None:
        """Forget."""
        self._parts = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the detections of a batch."""
        for given, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            image = np.full(len(found), self._numbers[given["image_id"]])
            box = found.pred_boxes.tensor.numpy()
            self._parts.append(Found(image, found.pred_classes.numpy(), found.scores.numpy(), box))

    def evaluate(self) -> dict[str, Any] | None:
        """{"found": Found} on the first process, None on the others."""
        gathered = comm.gather(self._parts, dst=0)
        if not comm.is_main_process():
            return None
        parts = [part for own in gathered for part in own or ()]
        columns = (np.concatenate([vars(part)[x.name] for part in parts]) for x in fields(Found))
        return {"found": Found(*columns)}


def evaluated_split(cfg: CfgNode, voc: VocSet) -> VocSplit:
    """The pictures that are evaluated: the first TEST.NUM_IMAGES (0: all) of the test list.

    Raises:
        UserError: If none of them holds an object that counts.
    """
    split, count = voc.test, cfg.TEST.NUM_IMAGES
    if count:
        split = VocSplit(split.folder, split.name, split.pictures[:count])
    if len(classes_without_objects(split, voc.classes)) == len(voc.classes):
        raise UserError(
            f"{voc.root}: list {split.name!r}: no object of the detector's classes in the pictures "
            "evaluated, so there is no AP; raise TEST.NUM_IMAGES, or choose another list with "
            "--test-split or --eval-split"
        )
    return split


def evaluate_detector(
    cfg: CfgNode, model: nn.Module, loader: DataLoader, voc: VocSet
) -> dict[str, Any]:
    """Evaluate a detector on the test list of a set, by VOC's metric and by COCO's.

    Args:
        cfg: Reads TEST.
        model: In any mode; it is left as it was.
        loader: Exactly the pictures of `evaluated_split`.
        voc: The set; without a metric year COCO's metric only is computed, and is the result.

    Returns:
        What `voc_metric` gives, "coco" (see `coco_metric`), "errors" (see `error_table`), rows of
        "detections", the classes "absent" from the pictures, and how many pictures took how many
        seconds; {} on other processes than the first.
    """
    began = time.perf_counter()
    split = evaluated_split(cfg, voc)
    result = inference_on_dataset(model, loader, Collector(split))
    if not comm.is_main_process():
        return {}
    found: Found = result["found"]
    coco, rows = coco_metric(split, voc.classes, found.image, found.label, found.score, found.box)
    if voc.metric_year is not None:
        figures = voc_metric(split, voc.classes, found, voc.metric_year)
    else:
        figures = {"bbox": {key: coco[key] for key in _METRICS}, **_by_class(rows)}
    objects, in_voc = objects_of(split, voc.classes), found.in_voc()
    verdicts = judge(objects, in_voc)
    num_images = len(split.pictures)
    kinds = [ALL_KINDS[kind] for kind in verdicts.kind]
    return {
        **figures,
        "coco": coco,
        "errors": error_table(objects, in_voc, verdicts, voc.classes, num_images, voc.metric_year),
        "detections": detection_rows(
            split,
            voc,
            found,
            kinds,
            num_saved=cfg.TEST.NUM_SAVED_IMAGES,
            score_thresh=cfg.TEST.SAVED_SCORE_THRESH,
        ),
        "absent": classes_without_objects(split, voc.classes),
        "num_images": num_images,
        "seconds": time.perf_counter() - began,
    }


def voc_metric(
    split: VocSplit, classes: Sequence[str], found: Found, metric_year: int
) -> dict[str, Any]:
    """AP of every class that occurs, and the means, in percent.

    Detectron2's evaluator returns means over all classes only. Here its `voc_eval` is called as it
    does, on the same lines, and the mean is taken over the classes that occur: over all classes the
    figures equal the stock ones. Classes without a test object have no AP.

    Returns:
        {"bbox": {"AP", "AP50", "AP75"}, "per_class": {class: AP}, "per_class_AP50": ..,
        "per_class_AP75": .., "curves": {class: {"0.50": curve, "0.75": curve}}}; for a curve see
        `curve_points`.
    """
    absent = classes_without_objects(split, classes)
    in_voc, rows = found.in_voc(), {}
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
            mean = float(np.mean(precisions))
            rows[class_name] = {"AP": mean, "AP50": at_50, "AP75": at_75, "curves": curves}
    parse_rec.cache_clear()  # it keeps every annotation it has read
    means = {key: float(np.mean([row[key] for row in rows.values()])) for key in _METRICS}
    return {"bbox": means, **_by_class(rows)}


def _by_class(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows of classes, figure by figure."""
    names = {"per_class": "AP", "per_class_AP50": "AP50", "per_class_AP75": "AP75"}
    return {
        new: {name: row[old] for name, row in rows.items()}
        for new, old in (names | {"curves": "curves"}).items()
    }


def curve_points(recall: np.ndarray, precision: np.ndarray) -> dict[str, Any]:
    """A precision-recall curve at 101 levels of recall.

    Args:
        recall: (num_detections,), in 0..1, as it grows with every detection, best score first.
        precision: (num_detections,).

    Returns:
        {"precision": 101 values, "max_recall"}: at recall 0, 0.01, .., 1 the highest precision at
        that recall or beyond, 0 where it is not reached.
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, _RECALL_LEVELS, side="left")
    values = np.append(envelope, 0.0)[places]
    highest = float(recall[-1]) if len(recall) else 0.0
    return {
        "precision": [round(float(value), 4) for value in values],
        "max_recall": round(highest, 4),
    }


def detection_rows(
    split: VocSplit,
    voc: VocSet,
    found: Found,
    kinds: Sequence[str],
    *,
    num_saved: int,
    score_thresh: float,
) -> list[dict[str, Any]]:
    """Rows of detections.json: objects and detections, best score first, of a few pictures.

    Args:
        split: The pictures that were evaluated.
        voc: Their set; file names become relative to its root.
        found: All detections.
        kinds: Of each detection, see `error_analysis.ALL_KINDS`.
        num_saved: How many pictures are kept, at even distances, the first among them.
        score_thresh: Lowest score that is kept.
    """
    total = len(split.pictures)
    places = [place * total // num_saved for place in range(num_saved)]
    rows = []
    for place in range(total) if num_saved >= total else places:
        picture = split.pictures[place]
        own = np.flatnonzero(found.image == place)
        own = own[np.argsort(-found.score[own], kind="stable")]
        rows.append(
            {
                "file_name": picture.file.relative_to(voc.root).as_posix(),
                "width": picture.width,
                "height": picture.height,
                "ground_truth": [
                    {"class": item.class_name, "box": list(item.box), "difficult": item.is_ignored}
                    for item in picture.objects
                ],
                "detections": [
                    {
                        "class": voc.classes[found.label[number]],
                        "score": round(score, 4),
                        "box": [round(value, 1) for value in found.box[number].tolist()],
                        "kind": kinds[number],
                    }
                    for number, score in zip(own, found.score[own].tolist(), strict=True)
                    if score >= score_thresh
                ],
            }
        )
    return rows


def measured(last: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that an evaluation decides: AP by VOC's metric and by COCO's.

    Args:
        last: What `evaluate_detector` gives.
    """
    return {
        **{key: last["bbox"][key] for key in _METRICS},
        **{key: last[key] for key in ("per_class", "per_class_AP50", "per_class_AP75", "coco")},
        "num_test_images": last["num_images"],
        "evaluation_seconds": last["seconds"],
    }


def curves_file(last: dict[str, Any], metric_year: int | None) -> dict[str, Any]:
    """What pr.json holds: the curves of `evaluate_detector`, class by class, and their levels."""
    return {
        "format": "fa-pr-1",
        "metric_year": metric_year,
        "recall": list(_RECALL_LEVELS),
        "classes": last["curves"],
    }
