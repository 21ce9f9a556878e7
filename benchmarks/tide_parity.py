"""Our error analysis against TIDE's own program (`tidecv`), on the boxes of trained detectors.

tidecv is no dependency of this repository: install it somewhere and name the folder.
docs/metrics.md has the figures, and what the two decide differently.

Example:
    python3 -m pip install --target /tmp/tide tidecv
    .venv/bin/python benchmarks/tide_parity.py --tide /tmp/tide SEED/eval-on-NAME-detections.json ..
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.random_detections import real_set
from benchmarks.reference_metrics import DetectionSet, Found
from detection.error_analysis import KINDS, Detections, Objects, error_table, judge

_CLASSES = dict(zip(KINDS[1:], ("BoxError", "ClassError", "OtherError", "DuplicateError",
                                "BackgroundError"), strict=True))  # fmt: skip
_CLASSES |= {"unseen": "MissedError"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures of both programs and their largest difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("detections", type=Path, nargs="+", help="detections.json, all boxes")
    parser.add_argument("--tide", type=Path, required=True, help="folder in which tidecv lies")
    options = parser.parse_args(arguments)
    sys.path.append(str(options.tide))  # last: its numpy shall not be ours
    rows: list[dict[str, Any]] = [
        compare(*real_set(path)) | {"file": str(path)} for path in options.detections
    ]
    gaps = [abs(row["ours"]["gained"][k] - row["tide"]["gained"][k]) for row in rows
            for k in row["ours"]["gained"]]  # fmt: skip
    counts = [abs(row["ours"]["counts"][k] - row["tide"]["counts"][k]) for row in rows
              for k in row["ours"]["counts"]]  # fmt: skip
    print(json.dumps({
        "files": rows,
        "largest_difference_of_a_gain": max(gaps),
        "largest_difference_of_a_count": max(counts),
        "num_detections": sum(row["num_detections"] for row in rows),
    }, indent=2))  # fmt: skip
    return 0


def compare(data: DetectionSet, names: Sequence[str]) -> dict[str, Any]:
    """Counts of all detections, AP50 and its gains, by both programs; difficult objects left out.

    Equal scores are set apart by less than they are rounded to, since the programs order them
    differently.
    """
    truth = tuple(item for item in data.truth if not item.difficult)
    order = sorted(range(len(data.found)), key=lambda place: data.found[place].score)
    score = {place: (rank + 1) / (len(order) + 1) for rank, place in enumerate(order)}
    found = tuple(
        Found(item.image, item.label, score[place], item.box)
        for place, item in enumerate(data.found)
    )
    apart = DetectionSet(data.num_images, data.num_classes, truth, found)
    return {"num_detections": len(found), "ours": ours(apart, names), "tide": tides(apart, names)}


def ours(data: DetectionSet, names: Sequence[str]) -> dict[str, Any]:
    """Figures of detection/error_analysis.py, averaged over 101 levels of recall as TIDE does."""
    one = np.array([1.0, 1.0, 0.0, 0.0])
    objects = Objects(
        np.array([item.image for item in data.truth]),
        np.array([item.label for item in data.truth]),
        np.array([item.box for item in data.truth], dtype=float),
        np.array([item.difficult for item in data.truth]),
    )
    detections = Detections(
        np.array([item.image for item in data.found]),
        np.array([item.label for item in data.found]),
        np.array([item.box for item in data.found]) + one,
        np.array([item.score for item in data.found]),
    )
    table = error_table(
        objects, detections, judge(objects, detections), names, data.num_images, None
    )
    gained = {**table["AP50_gained"], "unseen": table["AP50_gained"]["missed"]}
    return {
        "AP50": table["AP50"],
        "counts": {kind: table["all"][kind] for kind in _CLASSES},
        "gained": {kind: gained[kind] for kind in _CLASSES},
    }


def tides(data: DetectionSet, names: Sequence[str]) -> dict[str, Any]:
    """Figures of tidecv."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tidecv = importlib.import_module("tidecv")
    truth, found = tidecv.Data("truth"), tidecv.Data("found")
    for label, name in enumerate(names):
        truth.add_class(label, name)
        found.add_class(label, name)
    for image in range(data.num_images):
        truth.add_image(image, str(image))
    for item in data.truth:
        xmin, ymin, xmax, ymax = item.box
        box = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
        truth.add_ground_truth(item.image, item.label, box)
    for item in data.found:
        x0, y0, x1, y1 = item.box
        found.add_detection(item.image, item.label, item.score, [x0, y0, x1 - x0, y1 - y0])
    with contextlib.redirect_stdout(io.StringIO()):
        tide = tidecv.TIDE()
        run = tide.evaluate(truth, found, mode=tidecv.TIDE.BOX)
        gains = {error.__name__: gain for error, gain in run.fix_main_errors().items()}
    counts = Counter(type(error).__name__ for error in run.errors)
    return {
        "AP50": run.ap,
        "counts": {kind: counts[name] for kind, name in _CLASSES.items()},
        "gained": {kind: gains[name] for kind, name in _CLASSES.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
