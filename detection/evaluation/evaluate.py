"""Evaluation of a detector: AP by VOC's or COCO's metric, kinds of errors, rows of detections.

The detections of all processes are collected once; every figure is computed from them and from the
records of the test list. No file of the user's annotations is read here.
"""

# Detectron2 makes these at run time.
# pyright: reportOptionalMemberAccess=false
import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from common.annotations.record import LabelledSet, LabelledSplit
from common.errors import UserError
from detection.evaluation.error_analysis import ALL_KINDS, error_table, judge, objects_of
from detection.evaluation.metrics import METRICS, DetectedBoxes, Evaluation, coco_metric, voc_metric


class Collector(DatasetEvaluator):
    """Collects the detections of every picture from every process."""

    def __init__(self, split: LabelledSplit) -> None:
        """Collect the detections of the pictures of `split`."""
        self._places = {item.image_id: i for i, item in enumerate(split.pictures)}
        self._parts: list[DetectedBoxes] = []

    def reset(self) -> None:
        """Forget the detections."""
        self._parts = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the detections of a batch."""
        for example, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            image = np.full(len(instances), self._places[example["image_id"]])
            box = instances.pred_boxes.tensor.numpy()
            label, score = instances.pred_classes.numpy(), instances.scores.numpy()
            self._parts.append(DetectedBoxes(image, label, score, box))

    def evaluate(self) -> dict[str, Any] | None:
        """{"boxes": DetectedBoxes} on the first process, None on the others."""
        gathered = comm.gather(self._parts, dst=0)
        if not comm.is_main_process():
            return None
        parts = [part for own in gathered for part in own or ()]
        names = [field.name for field in fields(DetectedBoxes)]
        columns = (np.concatenate([vars(part)[name] for part in parts]) for name in names)
        return {"boxes": DetectedBoxes(*columns)}


def evaluated_split(cfg: CfgNode, data: LabelledSet) -> LabelledSplit:
    """The pictures that are evaluated: the first TEST.NUM_IMAGES (0: all) of the test list.

    Raises:
        UserError: If none of them holds an object that counts.
    """
    split, count = data.test, cfg.TEST.NUM_IMAGES
    if count:
        split = replace(split, pictures=split.pictures[:count])
    if len(split.classes_without_objects(data.classes)) == len(data.classes):
        raise UserError(
            f"{data.root}: list {split.name!r}: no object of the detector's classes in the "
            "pictures evaluated, so there is no AP; raise TEST.NUM_IMAGES, or choose another list "
            "with --test-split or --eval-split"
        )
    return split


def evaluate_detector(
    cfg: CfgNode, model: nn.Module, loader: DataLoader, data: LabelledSet
) -> Evaluation | None:
    """Evaluate a detector on the test list of a set.

    Args:
        cfg: Reads TEST.
        model: In any mode; it is left as it was.
        loader: Exactly the pictures of `evaluated_split`.
        data: The set; without a metric year COCO's metric is the result.

    Returns:
        The figures; None on other processes than the first.
    """
    began = time.perf_counter()
    split = evaluated_split(cfg, data)
    result = inference_on_dataset(model, loader, Collector(split))
    if not comm.is_main_process():
        return None
    boxes: DetectedBoxes = result["boxes"]

    # AP by COCO's metric, and by VOC's if that is the set's. Means are over the classes that occur.
    coco, rows = coco_metric(split, data.classes, boxes)
    means = {key: coco[key] for key in METRICS}
    if data.metric_year is not None:
        rows = voc_metric(split, data.classes, boxes, data.metric_year)
        columns = zip(*((row.ap, row.ap50, row.ap75) for row in rows.values()), strict=True)
        means = {key: float(np.mean(x)) for key, x in zip(METRICS, columns, strict=True)}

    # Kinds of errors, also of the detections that are kept for people to look at.
    objects, in_voc = objects_of(split, data.classes), boxes.in_voc()
    verdicts = judge(objects, in_voc)
    year, num_images = data.metric_year, len(split.pictures)
    detections = detection_rows(
        split,
        data,
        boxes,
        [ALL_KINDS[kind] for kind in verdicts.kind],
        num_saved=cfg.TEST.NUM_SAVED_IMAGES,
        score_thresh=cfg.TEST.SAVED_SCORE_THRESH,
    )
    return Evaluation(
        means=means,
        classes=rows,
        metric_year=year,
        coco=coco,
        errors=error_table(objects, in_voc, verdicts, data.classes, num_images, year),
        detections=detections,
        absent=split.classes_without_objects(data.classes),
        num_images=num_images,
        seconds=time.perf_counter() - began,
    )


def detection_rows(
    split: LabelledSplit,
    data: LabelledSet,
    boxes: DetectedBoxes,
    kinds: Sequence[str],
    *,
    num_saved: int,
    score_thresh: float,
) -> list[dict[str, Any]]:
    """Rows of detections.json: objects and detections, best score first, of a few pictures.

    Args:
        split: The pictures that were evaluated.
        data: Their set; file names become relative to its root.
        boxes: All detections.
        kinds: Of each detection, see `error_analysis.ALL_KINDS`.
        num_saved: How many pictures are kept, at even distances, the first among them.
        score_thresh: Lowest score that is kept.
    """
    total = len(split.pictures)
    places = [place * total // num_saved for place in range(num_saved)]
    rows = []
    for place in range(total) if num_saved >= total else places:
        picture = split.pictures[place]
        own = np.flatnonzero(boxes.image == place)
        own = own[np.argsort(-boxes.score[own], kind="stable")]
        rows.append(
            {
                "file_name": picture.file.relative_to(data.root).as_posix(),
                "width": picture.width,
                "height": picture.height,
                "ground_truth": [
                    {"class": item.class_name, "box": list(item.box), "difficult": item.is_ignored}
                    for item in picture.objects
                ],
                "detections": [
                    {
                        "class": data.classes[boxes.label[number]],
                        "score": round(score, 4),
                        "box": [round(value, 1) for value in boxes.box[number].tolist()],
                        "kind": kinds[number],
                    }
                    for number, score in zip(own, boxes.score[own].tolist(), strict=True)
                    if score >= score_thresh
                ],
            }
        )
    return rows
