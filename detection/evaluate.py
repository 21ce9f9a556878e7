"""VOC evaluation by Detectron2's evaluator, class by class, and the boxes for the report."""

# Detectron2 makes these at run time.
# pyright: reportOptionalMemberAccess=false
import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm

from detection.files import write_text
from detection.voc import VocSplit

_METRICS = ("AP", "AP50", "AP75")


class ClasswiseVOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's VOC evaluator, asked for one class at a time.

    The stock evaluator returns means over classes only. Its own `evaluate` is called with one class
    after another, and the mean is taken here over the classes that occur: over all classes the
    figures equal the stock ones. Classes without a test object have no AP; they are left out and
    named in the result.
    """

    def __init__(
        self, dataset_name: str, image_ids: list[str], list_file: Path, absent: list[str]
    ) -> None:
        """Evaluate on some pictures of a list.

        Args:
            dataset_name: Registered name.
            image_ids: Pictures that are evaluated.
            list_file: Where their names are written for Detectron2 to read.
            absent: Classes without an object that counts.
        """
        super().__init__(dataset_name)
        self._absent = set(absent)
        self._image_set_path = str(list_file)
        if comm.is_main_process():
            write_text(list_file, "".join(f"{image_id}\n" for image_id in image_ids))

    def evaluate(self) -> dict[str, Any] | None:
        """AP of every class that occurs, and the means, in percent.

        Returns:
            {"bbox": {"AP", "AP50", "AP75"}, "per_class": {class: AP}, "per_class_AP50": ..,
            "per_class_AP75": ..}; None on other ranks.
        """
        all_names, all_predictions = self._class_names, self._predictions
        rows: dict[str, dict[str, float]] = {}
        try:
            for index, name in enumerate(all_names):
                if name in self._absent:
                    continue
                self._class_names = [name]
                self._predictions = {0: all_predictions[index]} if index in all_predictions else {}
                result = super().evaluate()
                if result is not None:
                    rows[name] = result["bbox"]
        finally:
            self._class_names, self._predictions = all_names, all_predictions
        if not comm.is_main_process():
            return None
        means = {key: float(np.mean([row[key] for row in rows.values()])) for key in _METRICS}
        return {
            "bbox": means,
            "per_class": {name: float(row["AP"]) for name, row in rows.items()},
            "per_class_AP50": {name: float(row["AP50"]) for name, row in rows.items()},
            "per_class_AP75": {name: float(row["AP75"]) for name, row in rows.items()},
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
            }
            for label, score, box in sorted(found, key=lambda item: -item[1])
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
                {"class": item.class_name, "box": item.box_from_zero(), "difficult": item.difficult}
                for item in picture.objects
            ],
            "detections": detections,
        }


def spread_evenly(items: list[str], count: int) -> list[str]:
    """At most `count` items at even distances, the first among them."""
    if count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]
