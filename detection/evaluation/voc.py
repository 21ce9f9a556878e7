"""VOC evaluation by Detectron2's evaluator, class by class, and the boxes for the report."""

# Detectron2 makes these at run time.
# pyright: reportOptionalMemberAccess=false
import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
)
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from common.annotations.canonical import write_annotations
from common.annotations.voc import list_file
from detection.dataset import VocSplit
from detection.evaluation.coco import CocoEvaluator
from detection.evaluation.error_analysis import ErrorEvaluator

_METRICS = ("AP", "AP50", "AP75")
_THRESHOLDS = tuple(range(50, 100, 5))  # percent of overlap
_CURVE_THRESHOLDS = (50, 75)
_RECALL_LEVELS = tuple(level / 100 for level in range(101))


class ClasswiseVOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's VOC evaluator, class by class, with the precision-recall curves.

    The stock evaluator returns means over all classes only and drops the curves. Here its own
    `voc_eval` is called as it does, on the same lines, and the mean is taken over the classes that
    occur: over all classes the figures equal the stock ones. Classes without a test object have no
    AP; they are left out and named in the result.
    """

    def __init__(self, dataset_name: str, split: VocSplit, absent: list[str]) -> None:
        """Evaluate on the pictures of a list.

        Args:
            dataset_name: Registered name.
            split: The list.
            absent: Classes without an object that counts.
        """
        super().__init__(dataset_name)
        self._split, self._absent = split, set(absent)
        self._numbers = {item.image_id: str(i) for i, item in enumerate(split.pictures)}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the boxes of a batch; pictures are called by their place, see `evaluate`."""
        inputs = [{"image_id": self._numbers[given["image_id"]]} for given in inputs]
        super().process(inputs, outputs)

    def evaluate(self) -> dict[str, Any] | None:
        """AP of every class that occurs, and the means, in percent.

        Returns:
            {"bbox": {"AP", "AP50", "AP75"}, "per_class": {class: AP}, "per_class_AP50": ..,
            "per_class_AP75": .., "curves": {class: {"0.50": curve, "0.75": curve}}}; None on other
            ranks. For a curve see `curve_points`.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        rows: dict[str, dict[str, float]] = {}
        curves: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory(prefix="voc-evaluation-") as folder:
            # Not the user's own files: Detectron2's reader takes UTF-8 and whole numbers only, does
            # not strip class names, and no name of a picture may hold a space.
            write_annotations(Path(folder), "test", self._split.pictures)
            self._anno_file_template = f"{folder}/Annotations/{{}}.xml"
            self._image_set_path = str(list_file(Path(folder), "test"))
            for label, name in enumerate(self._class_names):
                if name not in self._absent:
                    lines = [line for part in gathered for line in part.get(label, [])]
                    file = Path(folder) / "detections.txt"
                    file.write_text("\n".join(lines))
                    rows[name], curves[name] = self._evaluate_class(name, file)
        parse_rec.cache_clear()  # it keeps every annotation it has read
        return {
            "bbox": {key: float(np.mean([row[key] for row in rows.values()])) for key in _METRICS},
            "per_class": {name: row["AP"] for name, row in rows.items()},
            "per_class_AP50": {name: row["AP50"] for name, row in rows.items()},
            "per_class_AP75": {name: row["AP75"] for name, row in rows.items()},
            "curves": curves,
        }

    def _evaluate_class(
        self, name: str, detections: Path
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """AP, AP50 and AP75 of a class in percent, and its curves."""
        average_precisions, curves = {}, {}
        for threshold in _THRESHOLDS:
            recall, precision, average = voc_eval(
                str(detections),
                self._anno_file_template,
                self._image_set_path,
                name,
                ovthresh=threshold / 100.0,
                use_07_metric=self._is_2007,
            )
            average_precisions[threshold] = 100 * float(average)
            if threshold in _CURVE_THRESHOLDS:
                curves[f"{threshold / 100:.2f}"] = curve_points(recall, precision)
        mean = float(np.mean(list(average_precisions.values())))
        return {"AP": mean, "AP50": average_precisions[50], "AP75": average_precisions[75]}, curves


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


def evaluate_detector(
    cfg: CfgNode,
    model: nn.Module,
    loader: DataLoader,
    split: VocSplit,
    classes: Sequence[str],
    *,
    metric_year: int | None,
    root: Path,
    absent: list[str],
) -> dict[str, Any]:
    """Evaluate a detector on the pictures of a list, by VOC's metric and by COCO's.

    Args:
        cfg: Reads DATASETS.TEST (the name under which the list is registered) and TEST.
        model: In any mode; it is left as it was.
        loader: Exactly the pictures of `split`.
        split: What is evaluated.
        classes: Class names in the detector's order.
        metric_year: 2007 or 2012; None: COCO's metric only, which then is the result.
        root: File names of `detections` are relative to it.
        absent: Classes without an object that counts.

    Returns:
        What ClasswiseVOCEvaluator, CocoEvaluator, ErrorEvaluator ("errors") and DetectionRecorder
        give, and how many pictures took how many seconds; {} on other ranks than the first.
    """
    began = time.perf_counter()
    image_ids = [picture.image_id for picture in split.pictures]
    shown = spread_evenly(image_ids, cfg.TEST.NUM_SAVED_IMAGES)
    recorder = DetectionRecorder(split, shown, tuple(classes), root, cfg.TEST.SAVED_SCORE_THRESH)
    evaluators: list[DatasetEvaluator] = [CocoEvaluator(split, classes), recorder]
    evaluators.append(ErrorEvaluator(split, classes, metric_year))
    if metric_year is not None:
        name = cfg.DATASETS.TEST[0]
        evaluators.append(ClasswiseVOCEvaluator(name, split, absent))
    result = inference_on_dataset(model, loader, DatasetEvaluators(evaluators))
    if not comm.is_main_process():
        return {}
    rows, kinds = result.pop("coco_classes"), result.pop("kinds")
    for image_id, picture in zip(shown, result["detections"], strict=True):
        for found in picture["detections"]:
            found["kind"] = kinds[image_id][found.pop("place")]
    if metric_year is None:
        result = {**result, **_coco_as_result(result["coco"], rows)}
    return {**result, "num_images": len(image_ids), "seconds": time.perf_counter() - began}


def _coco_as_result(coco: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """COCO's figures under the names that ClasswiseVOCEvaluator gives."""
    return {
        "bbox": {key: coco[key] for key in _METRICS},
        "per_class": {name: row["AP"] for name, row in rows.items()},
        "per_class_AP50": {name: row["AP50"] for name, row in rows.items()},
        "per_class_AP75": {name: row["AP75"] for name, row in rows.items()},
        "curves": {name: row["curves"] for name, row in rows.items()},
    }


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


class DetectionRecorder(DatasetEvaluator):
    """Keeps the detections of a few test pictures."""

    def __init__(
        self,
        split: VocSplit,
        image_ids: list[str],
        classes: tuple[str, ...],
        root: Path,
        score_thresh: float,
    ) -> None:
        """Record what the detector says about `image_ids`; file names become relative to `root`."""
        self._pictures = {
            item.image_id: item for item in split.pictures if item.image_id in set(image_ids)
        }
        self._image_ids, self._classes, self._root = image_ids, classes, root
        self._score_thresh = score_thresh
        self._found: dict[str, list[dict[str, Any]]] = {}

    def reset(self) -> None:
        """Forget."""
        self._found = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the boxes of the wanted pictures, best score first."""
        for given, output in zip(inputs, outputs, strict=True):
            if given["image_id"] in self._pictures:
                self._found[given["image_id"]] = self._detections(output["instances"].to("cpu"))

    def _detections(self, instances: Any) -> list[dict[str, Any]]:
        found = zip(
            instances.pred_classes.tolist(),
            instances.scores.tolist(),
            instances.pred_boxes.tensor.tolist(),
            strict=True,
        )
        return [
            {
                "class": self._classes[label],
                "score": round(score, 4),
                "box": [round(value, 1) for value in box],
                "place": place,  # among all detections of the picture
            }
            for place, (label, score, box) in sorted(enumerate(found), key=lambda item: -item[1][1])
            if score >= self._score_thresh
        ]

    def evaluate(self) -> dict[str, Any] | None:
        """{"detections": rows of detections.json}; None on other ranks."""
        gathered = comm.gather(self._found, dst=0)
        if not comm.is_main_process():
            return None
        found = {key: value for part in gathered for key, value in part.items()}
        return {
            "detections": [
                self._row(image_id, found.get(image_id, [])) for image_id in self._image_ids
            ]
        }

    def _row(self, image_id: str, detections: list[dict[str, Any]]) -> dict[str, Any]:
        picture = self._pictures[image_id]
        return {
            "file_name": picture.file.relative_to(self._root).as_posix(),
            "width": picture.width,
            "height": picture.height,
            "ground_truth": [
                {"class": item.class_name, "box": list(item.box), "difficult": item.is_ignored}
                for item in picture.objects
            ],
            "detections": detections,
        }


def spread_evenly(items: list[str], count: int) -> list[str]:
    """At most `count` items at even distances, the first among them."""
    if count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]
