"""Evaluation of a detector: AP by VOC's or COCO's metric, kinds of errors, rows of detections.

The detections of all processes are collected once; every figure is computed from them and from the
records of the test list. No file of the user's annotations is read here.
"""

# Detectron2 makes these at run time.
# pyright: reportOptionalMemberAccess=false
import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader

from common.annotations.record import (
    LabelledSet,
    LabelledSplit,
    PictureRecord,
    coco_content,
    evenly,
)
from common.errors import UserError
from common.picture_draws import METRICS
from detection.evaluation.error_analysis import (
    ALL_KINDS,
    Detections,
    error_table,
    judge,
    objects_of,
)
from detection.evaluation.resampled_ap import THRESHOLDS, Matches, coco_matches, voc_matches

RECALL_LEVELS = tuple(level / 100 for level in range(101))
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
        matches: Of every class by the set's metric, for `resampled_ap`.
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
    matches: list[Matches]
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
            "classes": {name: asdict(row)["curves"] for name, row in self.classes.items()},
        }


def voc_metric(
    split: LabelledSplit, classes: Sequence[str], boxes: DetectedBoxes, metric_year: int
) -> tuple[dict[str, ClassFigures], list[Matches]]:
    """AP of every class that has a test object.

    Detectron2's `voc_eval` reads and matches everything anew for each overlap, and its evaluator
    returns means over all classes only. Here one pass matches for all overlaps, with the same bits;
    the caller averages over the classes that occur.

    Returns:
        The figures of each class that occurs, and the matches of all classes.
    """
    found = voc_matches(
        objects_of(split, classes), boxes.in_voc(), len(classes), len(split.pictures)
    )
    rows = {}
    for class_name, matches in zip(classes, found, strict=True):
        num_objects = int(matches.num_objects.sum())
        if num_objects == 0:
            continue
        precisions, curves = [], {}
        for threshold, hit, counted in zip(THRESHOLDS, matches.hit, matches.counted, strict=True):
            right, num_counted = np.cumsum(hit), np.cumsum(counted)
            recall, precision = right / num_objects, right / np.maximum(num_counted, 1)
            precisions.append(100 * float(voc_ap(recall, precision, metric_year == 2007)))
            if threshold in _CURVE_THRESHOLDS:
                curves[f"{threshold / 100:.2f}"] = curve_points(recall, precision)
        at_50, at_75 = (precisions[THRESHOLDS.index(place)] for place in (50, 75))
        rows[class_name] = ClassFigures(float(np.mean(precisions)), at_50, at_75, curves)
    return rows, found


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
) -> tuple[dict[str, Any], dict[str, ClassFigures], COCOeval]:
    """AP, and the curves by COCO's matching.

    "Difficult" objects are what COCO calls crowds: pycocotools reads no other mark of an object
    that must neither help nor harm, since it overwrites `ignore` with `iscrowd`.

    Returns:
        {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class": {class: AP}} in percent, None where
        no object counts, such as no small one; the figures of each class that occurs; and
        pycocotools' evaluation.
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
    return {**figures, "per_class": {name: row.ap for name, row in rows.items()}}, rows, evaluation


def _indexed(content: dict[str, Any]) -> COCO:
    """Annotations in pycocotools' own class."""
    coco = COCO()
    coco.dataset = content  # pyright: ignore[reportAttributeAccessIssue]
    coco.createIndex()
    return coco


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
    """The pictures that are evaluated: TEST.NUM_IMAGES (0: all) of the test list, see `evenly`.

    Raises:
        UserError: If none of them holds an object that counts.
    """
    split = replace(data.test, pictures=tuple(evenly(data.test.pictures, cfg.TEST.NUM_IMAGES)))
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
    year, num_images = data.metric_year, len(split.pictures)
    objects, in_voc = objects_of(split, data.classes), boxes.in_voc()
    coco, rows, coco_evaluation = coco_metric(split, data.classes, boxes)
    if year is None:
        means = {key: coco[key] for key in METRICS}
        matches = coco_matches(coco_evaluation, len(data.classes), num_images)
    else:
        rows, matches = voc_metric(split, data.classes, boxes, year)
        columns = zip(*((row.ap, row.ap50, row.ap75) for row in rows.values()), strict=True)
        means = {key: float(np.mean(x)) for key, x in zip(METRICS, columns, strict=True)}

    # Kinds of errors, also of the detections that are kept for people to look at.
    verdicts = judge(objects, in_voc)
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
        errors=error_table(verdicts, data.classes, num_images, year),
        detections=detections,
        matches=matches,
        absent=split.classes_without_objects(data.classes),
        num_images=num_images,
        seconds=time.perf_counter() - began,
    )


def labelled_picture(picture: PictureRecord, data: LabelledSet) -> dict[str, Any]:
    """One picture with its objects, for JSON; its file is relative to the set's folder."""
    return {
        "file_name": picture.file.relative_to(data.root).as_posix(),
        "width": picture.width,
        "height": picture.height,
        "ground_truth": [
            {"class": item.class_name, "box": list(item.box), "difficult": item.is_ignored}
            for item in picture.objects
        ],
    }


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
        num_saved: How many pictures are kept, see `evenly`.
        score_thresh: Lowest score that is kept.
    """
    rows = []
    for place in evenly(range(len(split.pictures)), num_saved) if num_saved else ():
        picture = split.pictures[place]
        own = np.flatnonzero(boxes.image == place)
        own = own[np.argsort(-boxes.score[own], kind="stable")]
        rows.append(
            {
                **labelled_picture(picture, data),
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
