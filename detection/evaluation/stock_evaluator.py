"""Detectron2's own VOC evaluator, as it is, on given boxes: what others are compared with."""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_ap, voc_eval
from detectron2.structures import Boxes, Instances

Detection = tuple[int, float, tuple[float, float, float, float]]  # class, score, (x0, y0, x1, y1)


class StockEvaluator:
    """The evaluator after the last picture."""

    def __init__(
        self, folder: Path, num_classes: int, detections: Mapping[str, Sequence[Detection]]
    ) -> None:
        """Feed it.

        Args:
            folder: Annotations/ID.xml and ImageSets/Main/test.txt, classes named class0, class1, ..
            num_classes: How many.
            detections: By picture, in the order of the pictures; pixels from 0.
        """
        self._folder, self._num_classes = folder, num_classes
        self._detections = detections
        self._lines = self._fed(2012)._predictions

    def _fed(self, year: int) -> PascalVOCDetectionEvaluator:
        dataset = f"stock-{uuid.uuid4()}"
        MetadataCatalog.get(dataset).set(
            thing_classes=[f"class{label}" for label in range(self._num_classes)],
            dirname=str(self._folder),
            year=year,
            split="test",
        )
        evaluator = PascalVOCDetectionEvaluator(dataset)
        MetadataCatalog.remove(dataset)
        evaluator.reset()
        for image_id, found in self._detections.items():
            instances = Instances((1, 1))
            instances.pred_boxes = Boxes(torch.tensor([box for _, _, box in found]).reshape(-1, 4))
            instances.scores = torch.tensor([score for _, score, _ in found])
            labels = torch.tensor([label for label, _, _ in found], dtype=torch.int64)
            instances.pred_classes = labels
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        return evaluator

    def means(self, year: int) -> dict[str, float]:
        """AP, AP50 and AP75 over all classes, in percent."""
        result = self._fed(year).evaluate()
        assert result is not None
        return {key: float(value) for key, value in result["bbox"].items()}

    def class_figures(self, label: int, threshold: float) -> tuple[np.ndarray, float, float]:
        """Recall after each detection of a class, and its AP in 0..1 by 11 points and by area.

        Without an object that counts it divides by zero: then no recall is a number.
        """
        lines = self._folder / f"class{label}.txt"
        lines.write_text("\n".join(self._lines.get(label, [""])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0
            recall, precision, eleven = voc_eval(
                str(lines),
                str(self._folder / "Annotations" / "{}.xml"),
                str(self._folder / "ImageSets/Main/test.txt"),
                f"class{label}",
                ovthresh=threshold,
                use_07_metric=True,
            )
        return recall, float(eleven), float(voc_ap(recall, precision, use_07_metric=False))


def forget_annotations() -> None:
    """Empty Detectron2's cache, which keeps every annotation it has read."""
    parse_rec.cache_clear()
