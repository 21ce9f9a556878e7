"""VOC's AP by Detectron2's `voc_eval`, on a canonical devkit that is written for it."""

# Detectron2 makes these at run time.
# pyright: reportOptionalMemberAccess=false
import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval

from common.annotations.canonical import list_file, write_annotations
from common.annotations.record import LabelledSplit
from detection.evaluation.results import RECALL_LEVELS, ClassFigures, Curve, DetectedBoxes

_THRESHOLDS = tuple(range(50, 100, 5))  # percent of overlap
_CURVE_THRESHOLDS = (50, 75)


def voc_metric(
    split: LabelledSplit, classes: Sequence[str], boxes: DetectedBoxes, metric_year: int
) -> dict[str, ClassFigures]:
    """AP of every class that has a test object.

    Detectron2's evaluator returns means over all classes only. Here its `voc_eval` is called as it
    does, on the same lines, and the caller averages over the classes that occur: over all classes
    the figures equal the stock ones.
    """
    absent = split.classes_without_objects(classes)
    in_voc, rows = boxes.in_voc(), {}
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
            rows[class_name] = ClassFigures(float(np.mean(precisions)), at_50, at_75, curves)
    parse_rec.cache_clear()  # it keeps every annotation it has read
    return rows


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
