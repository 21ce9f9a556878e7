"""Our own VOC and COCO metrics against Detectron2's evaluator and pycocotools, on random sets.

What separates the two metrics is measured too: from the VOC rules to the COCO rules, one rule after
another, each also alone (docs/detection.md explains the rules).

Examples:
  .venv/bin/python benchmarks/voc_eval_parity.py --json parity.json
  .venv/bin/python benchmarks/voc_eval_parity.py --sets 100 --detections runs/a/detections.json
"""

import functools
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks import reference_metrics as metrics
from benchmarks.reference_metrics import COCO, VOC_2007, VOC_2012, DetectionSet, Rules

TOLERANCE = 1e-6
VOC_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
COCO_AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
_WHOLE_EVALUATOR_EVERY = 10  # sets; it computes each class and threshold once more

# From the rules of VOC 2012 to those of COCO, in this order; after the last one all are COCO's.
PATH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scores and corners not rounded", {"rounded": False}),
    ("equal scores in a fixed order", {"order": metrics.stable_order}),
    ("an overlap equal to the threshold matches", {"reached": True}),
    ("lengths from 0, no extra pixel", {"origin": 0, "extra_pixel": False}),
    ("a claimed object is not claimed again", {"matching": "free"}),
    ("counted objects before difficult ones", {"counted_first": True}),
    ("difficult: overlap with the detection only", {"crowd_overlap": True}),
    ("101 recall levels, not the area", {"recall_points": metrics.POINTS_101}),
    ("at most 100 detections a picture and class", {"max_detections": 100}),
)
ALONE: tuple[tuple[str, Rules, dict[str, Any]], ...] = (
    *((name, VOC_2012, change) for name, change in PATH),
    ("11 recall levels, not the area", VOC_2012, {"recall_points": metrics.ELEVEN_POINTS}),
    (
        "11 levels as decimals, not as 3 * 0.1",
        VOC_2007,
        {"recall_points": metrics.ELEVEN_EXACT_POINTS},
    ),
    ("mistake: the extra pixel forgotten", VOC_2012, {"extra_pixel": False}),
    ("COCO: small objects only", COCO, {"area_range": COCO_AREAS[1]}),
    ("COCO: medium objects only", COCO, {"area_range": COCO_AREAS[2]}),
    ("COCO: large objects only", COCO, {"area_range": COCO_AREAS[3]}),
)


def voc_differences(data: DetectionSet, folder: Path, *, whole: bool) -> list[float]:
    """Compare with Detectron2's VOC evaluator on one set.

    Args:
        data: The set.
        folder: An empty place for annotations.
        whole: Whether the means of the whole evaluator are compared too, beside its `voc_eval`.

    Returns:
        Difference of each AP in 0..1, of classes, thresholds and both years; infinite if one side
        says that AP is not defined and the other does not.
    """
    theirs = metrics.Detectron2Evaluation(data, folder)
    ours = {rules: by_class(data, rules) for rules in (VOC_2007, VOC_2012)}
    differences = []
    for label in range(data.num_classes):
        for place, threshold in enumerate(VOC_THRESHOLDS):
            recall, *values = theirs.class_figures(label, threshold)
            # Without an object that counts its recall is no number; its 11-point sum makes 0 of it.
            is_undefined = ours[VOC_2012][label] is None and not np.isfinite(recall).any()
            for rows, value in zip(ours.values(), values, strict=True):
                differences.append(_apart(rows[label], place, None if is_undefined else value))
    for year, rows in zip((2007, 2012), ours.values(), strict=True) if whole else ():
        defined = [row for row in rows if row is not None]
        if len(defined) == data.num_classes:
            stock, means = theirs.means(year), _means(defined)
            differences += [abs(stock[key] / 100 - value) for key, value in means.items()]
    return differences


def by_class(data: DetectionSet, rules: Rules) -> list[list[float] | None]:
    """AP of each class at VOC_THRESHOLDS, in 0..1; None if none of its objects counts."""
    labels = range(data.num_classes)
    return [metrics.average_precisions(data, label, VOC_THRESHOLDS, rules) for label in labels]


def _apart(ours: Sequence[float] | None, place: int, theirs: float | None) -> float:
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    return abs(ours[place] - theirs)


def coco_differences(data: DetectionSet) -> list[float]:
    """Compare with pycocotools on one set, over classes, thresholds and areas."""
    evaluation = metrics.pycocotools_evaluation(data)
    thresholds = evaluation.params.iouThrs.tolist()
    differences = []
    for area, limits in enumerate(COCO_AREAS):
        rules = replace(COCO, area_range=limits)
        for label in range(data.num_classes):
            theirs = evaluation.eval["precision"][:, :, label, area, -1].mean(axis=1)
            ours = metrics.average_precisions(data, label, thresholds, rules)
            for place, value in enumerate(theirs.tolist()):
                differences.append(_apart(ours, place, None if value < 0 else value))
    return differences


def _means(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """AP, AP50, AP75 over classes."""
    table = np.array(rows)
    columns = {"AP": table, "AP50": table[:, 0], "AP75": table[:, 5]}
    return {name: float(values.mean()) for name, values in columns.items()}


def figures(data: DetectionSet, rules: Rules) -> dict[str, float] | None:
    """AP, AP50 and AP75 of a set in percent; None if no class has an object that counts."""
    defined = [row for row in by_class(data, rules) if row is not None]
    return {key: 100 * value for key, value in _means(defined).items()} if defined else None


def separation(sets: Sequence[DetectionSet]) -> dict[str, Any]:
    """What each rule is worth, in points of AP and AP50.

    Returns:
        {"alone": rows, "path": rows}; a row has the name of the rule, and for AP and AP50 the mean,
        the mean size and the largest size of its effect (None if no set has an AP under it).
    """
    known = functools.cache(lambda number, rules: figures(sets[number], rules))

    def effect(name: str, before: Rules, after: Rules) -> dict[str, Any]:
        row: dict[str, Any] = {"rule": name}
        pairs = [(known(number, before), known(number, after)) for number in range(len(sets))]
        for key in ("AP", "AP50"):
            changes = np.array([b[key] - a[key] for a, b in pairs if a and b])
            size, row["num_sets"], row[key] = np.abs(changes), len(changes), None
            if len(changes):  # some object of that size
                row[key] = {
                    "mean": float(changes.mean()), "mean_size": float(size.mean()),
                    "max_size": float(size.max()),
                }  # fmt: skip
        return row

    alone = [effect(name, rules, replace(rules, **change)) for name, rules, change in ALONE]
    path, rules = [], VOC_2012
    for name, change in PATH:
        after = replace(rules, **change)
        path.append(effect(name, rules, after))
        rules = after
    assert rules == COCO
    path.append(effect("all of them: VOC 2012 to COCO", VOC_2012, COCO))
    path.append(effect("VOC 2007 to COCO", VOC_2007, COCO))
    return {"alone": alone, "path": path}


def compare(num_sets: int, first_seed: int, folder: Path) -> dict[str, Any]:
    """Both comparisons on sets first_seed, first_seed + 1, .."""
    differences: dict[str, list[float]] = {"voc": [], "coco": []}
    for number in range(num_sets):
        data = metrics.random_set(first_seed + number)
        whole = number % _WHOLE_EVALUATOR_EVERY == 0
        differences["voc"] += voc_differences(data, folder / str(number), whole=whole)
        differences["coco"] += coco_differences(data)
    worst = {name: max(values, default=0.0) for name, values in differences.items()}
    return {
        "sets": num_sets,
        "max_difference": max(worst.values()),
        "max_difference_voc": worst["voc"],
        "max_difference_coco": worst["coco"],
        "num_compared_voc": len(differences["voc"]),
        "num_compared_coco": len(differences["coco"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 also if the metrics differ."""
    counts = (("sets", 1000, 1, "random sets"), ("seed", 0, 0, "of the first set"))
    parser = harness.make_parser(__doc__, counts)
    parser.add_argument(
        "--detections", type=Path, action="append", default=[], metavar="FILE",
        help="a detections.json: what the rules are worth there, too (may be given several times)",
    )  # fmt: skip
    options = parser.parse_args(arguments)

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="voc-eval-parity-") as folder:
            result = compare(options.sets, options.seed, Path(folder))
        sets = [metrics.random_set(options.seed + number) for number in range(options.sets)]
        result["separation"] = separation(sets)
        if options.detections:
            real = [metrics.real_set(file)[0] for file in options.detections]
            result["separation_real"] = separation(real)
        return result

    return harness.run_and_report(
        measure, options.json, is_success=lambda figures: figures["max_difference"] <= TOLERANCE
    )


if __name__ == "__main__":
    sys.exit(main())
