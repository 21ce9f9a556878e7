"""Detection in the report: precision-recall curves, kinds of errors, pictures side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.files import read_json_or_none
from tools.flow import charts, gallery, results
from tools.flow import report_data as data
from tools.flow.charts import Series
from tools.flow.config import ARMS
from tools.flow.detection_charts import stacked_bars

KINDS = {
    "correct": "right class, overlap above 0.5, the first on its object",
    "localisation": "right class, overlap from 0.1 to 0.5",
    "confusion": "overlap above 0.5 with an object of another class",
    "both": "overlap from 0.1 to 0.5 with an object of another class",
    "duplicate": "a better-scored detection has the object already",
    "background": "overlap below 0.1 with every object",
}
MENDS = {**{kind: kind for kind in list(KINDS)[1:]}, "missed": "missed"}
TONES = ("random", "pretrained")
NUM_FIRST, NUM_DIFFERENT = 6, 6
NUM_CONFUSIONS = 12
MAX_OPEN_CHARTS = 12
_LEVELS = (0.25, 0.5, 0.75)

Curve = list[float]
"""Precision at each level of recall."""


def context(run: data.Run) -> dict[str, Any]:
    """What `detection_section.html.j2` shows."""
    summary = run.results["summary"]
    has_coco = any(summary[arm][metric]["n"] for arm in ARMS for metric in results.COCO_METRICS)
    return {
        "coco_metrics": results.COCO_METRICS if has_coco else (),
        "curve_pairs": [found for pair in results.PAIRS if (found := curve_pair(run, pair))],
        "errors": errors(run),
        "shots": shots(run),
        "arm_words": data.ARM_WORDS,
        "sentence": gallery.sentence,
        "kinds": KINDS,
    }


def curve_pair(run: data.Run, pair: str) -> dict[str, Any] | None:
    """Return a chart a class with the curves of both arms, means over the seeds, and a table.

    The first chart is the mean over the classes; `folded` are the others if there are many.
    """
    treated, control = results.PAIRS[pair]
    arms = [mean_curves(run, arm) for arm in (control, treated)]
    names = sorted(set().union(*(curves for curves, _ in arms)))
    if not names:
        return None
    per_class = data.per_class_rows(run.results["detection"], pair, "per_class_AP50")
    aps = {name: both for name, *both in per_class}
    drawn, rows = [], []
    for name in names:
        both = [curves.get(name) for curves, _ in arms]
        drawn.append({"name": name, "aps": aps.get(name), "chart": curve_chart(name, both)})
        rows.append((name, [curve_figures(curve) for curve in both]))
    means = [mean_of(list(curves.values())) for curves, _ in arms]
    overall: dict[str, Any] = {"name": "Mean over the classes", "aps": None}
    overall["chart"] = curve_chart("mean over the classes", means)
    is_folded = len(drawn) > MAX_OPEN_CHARTS
    return {
        "title": results.PAIR_TITLES[pair],
        "numbers": [seeds for _, seeds in arms],
        "charts": [overall] if is_folded else [overall, *drawn],
        "folded": drawn if is_folded else [],
        "rows": rows,
    }


def mean_curves(run: data.Run, arm: str) -> tuple[dict[str, Curve], int]:
    """Return every class's curve at an overlap of 0.5, mean over the seeds, and how many seeds."""
    found: dict[str, list[Curve]] = {}
    seeds = 0
    for folder in seed_folders(run, arm):
        classes = as_table(read_json_or_none(folder / "pr.json"), "fa-pr-1").get("classes") or {}
        seeds += bool(classes)
        for name, curves in classes.items():
            values = (curves.get("0.50") or {}).get("precision") or []
            if len(values) == 101 and all(map(data.is_number, values)):
                found.setdefault(name, []).append(values)
    return {name: mean_of(curves) for name, curves in found.items()}, seeds


def seed_folders(run: data.Run, arm: str) -> list[Any]:
    """Return the folders of an arm's finished seeds."""
    rows = run.results["detection"][arm]
    return [run.out / f"detection/{arm}/seed-{row['seed']}" for row in rows]


def as_table(raw: Any, form: str) -> dict[str, Any]:
    """Return a file's content if it is of the right form, else nothing."""
    return raw if isinstance(raw, dict) and raw.get("format") == form else {}


def mean_of(curves: Sequence[Curve]) -> Curve:
    """Return the mean at each level of recall; empty without curves."""
    return [math.fsum(column) / len(curves) for column in zip(*curves, strict=True)]


def curve_chart(name: str, both: Sequence[Curve | None]) -> charts.Markup | None:
    """Return precision over recall, 0 to 1, random and pretrained."""
    lines = [
        Series(tone, reached(curve or []), tone) for tone, curve in zip(TONES, both, strict=True)
    ]
    title = f"Precision over recall, {name}"
    return charts.line_chart(title, lines, "recall", from_zero=True, corner=(1.0, 1.0))


def reached(curve: Curve) -> list[charts.Point]:
    """Return (recall, precision) up to the first level of recall that is not reached."""
    points = [(level / 100, value) for level, value in enumerate(curve)]
    last = next((i for i, value in enumerate(curve) if value == 0), len(curve) - 1)
    return points[: last + 1]


def curve_figures(curve: Curve | None) -> list[float | None]:
    """Return precision at a quarter, half and three quarters of recall, and the highest recall."""
    if not curve:
        return [None] * (len(_LEVELS) + 1)
    highest = max((level / 100 for level, value in enumerate(curve) if value > 0), default=0.0)
    return [*(curve[round(100 * level)] for level in _LEVELS), highest]


def errors(run: data.Run) -> dict[str, Any]:
    """Return kinds of errors and the AP50 they cost, arm by arm; empty where no arm has them."""
    arms = [found for arm in ARMS if (found := arm_errors(run, arm))]
    if not arms:
        return {}
    by_arm = {found["arm"]: found for found in arms}
    bars = [(found["words"], {k: found["counts"][k] for k in KINDS}) for found in arms]
    return {
        "arms": arms,
        "chart": stacked_bars("Kinds of detections", bars, "best-scored detections"),
        "gains": [gain_pair(pair, by_arm) for pair in results.PAIRS if has_both(pair, by_arm)],
        "digits": int(any(found["n"] > 1 for found in arms)),
        "confusions": confusion_rows(arms),
        "classes": sorted({name for found in arms for name in found["classes"]}),
    }


def arm_errors(run: data.Run, arm: str) -> dict[str, Any] | None:
    """Return the counts and gains of an arm, means over its seeds; None where there are none."""
    tables = [
        table
        for folder in seed_folders(run, arm)
        if (table := as_table(read_json_or_none(folder / "errors.json"), "fa-errors-1"))
    ]
    if not tables:
        return None
    classes = {name for table in tables for name in table.get("classes") or {}}
    pairs: dict[tuple[str, str], float] = {}
    for table in tables:
        for row in table.get("confusions") or []:
            key = (row["object"], row["taken_for"])
            pairs[key] = pairs.get(key, 0.0) + row["count"] / len(tables)
    by_class = {
        name: [row for table in tables if (row := (table.get("classes") or {}).get(name))]
        for name in classes
    }
    return {
        "arm": arm,
        "words": data.ARM_WORDS[arm],
        "n": len(tables),
        "num_objects": tables[0].get("num_objects"),
        "confusions": pairs,
        "classes": {name: figures(rows) for name, rows in by_class.items()},
        **figures(tables),
    }


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over the seeds: `counts` (best-scored), `gained`, `AP50`."""
    return {
        "counts": {
            kind: mean(row.get("best_scored", {}).get(kind) for row in rows) or 0.0
            for kind in (*KINDS, "missed")
        },
        "gained": {
            kind: mean((row.get("AP50_gained") or {}).get(kind) for row in rows) for kind in MENDS
        },
        "AP50": mean(row.get("AP50") for row in rows),
    }


def mean(values: Iterable[Any]) -> float | None:
    """Return the mean of the numbers among some values."""
    known = [value for value in values if data.is_number(value)]
    return math.fsum(known) / len(known) if known else None


def has_both(pair: str, by_arm: Mapping[str, Any]) -> bool:
    """Whether both arms of a comparison have errors."""
    return all(arm in by_arm for arm in results.PAIRS[pair])


def gain_pair(pair: str, by_arm: Mapping[str, Any]) -> dict[str, Any]:
    """Return what mending each kind of error would gain in both arms of a comparison."""
    treated, control = (by_arm[arm] for arm in results.PAIRS[pair])
    rows = [
        (word, control["gained"][kind], treated["gained"][kind]) for kind, word in MENDS.items()
    ]
    title = f"AP50 gained by mending, {results.PAIR_TITLES[pair].lower()}"
    chart = charts.dumbbell_chart(title, rows)
    return {"title": results.PAIR_TITLES[pair], "rows": rows, "chart": chart}


def confusion_rows(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the most frequent confusions, by their sum over the arms."""
    totals: dict[tuple[str, str], float] = {}
    for found in arms:
        for key, count in found["confusions"].items():
            totals[key] = totals.get(key, 0.0) + count
    best = sorted(totals, key=lambda key: (-totals[key], key))[:NUM_CONFUSIONS]
    return [
        {"pair": key, "counts": [found["confusions"].get(key, 0.0) for found in arms]}
        for key in best
    ]


def shots(run: data.Run) -> dict[str, Any]:
    """Return test pictures with the detections of both arms, of the lowest seed.

    `first`: the first ones of the list; `different`: those where the arms differ most in how many
    objects they find, the first ones left out; `num_saved`: how many there are to choose from.
    """
    pair, seed, arms = saved_detections(run, run.results["detection"], "detections.json")
    pictures = gallery.shared(arms)
    first = gallery.rows(pictures, run.dataset(), NUM_FIRST)
    names = {row["item"]["file_name"] for row in first}
    rest = [row for row in pictures if row["item"]["file_name"] not in names]
    different: list[dict] = []
    if len(arms) == len(TONES):
        ordered = sorted((row for row in rest if lead(row)), key=lambda row: -abs(lead(row)))
        different = gallery.rows(ordered, run.dataset(), NUM_DIFFERENT)
    return {
        "pair": results.PAIR_TITLES[pair].lower(),
        "seed": seed,
        "arms": list(arms),
        "first": first,
        "different": [{**row, "lead": lead(row)} for row in different],
        "num_saved": len(pictures),
    }


def saved_detections(
    run: data.Run, detection: Mapping[str, Sequence[Mapping[str, Any]]], file: str
) -> tuple[str, int | None, dict[str, list[Any]]]:
    """Return the pair that is shown, its lowest seed, and the boxes of each arm for it.

    Args:
        run: The run.
        detection: Rows of each arm, one a seed.
        file: Name of the file with the boxes, in the folder of each seed.
    """
    fine_tuned = any(detection[arm] for arm in results.PAIRS["fine_tuned"])
    pair = "fine_tuned" if fine_tuned else "frozen"
    treated, control = results.PAIRS[pair]
    arms: dict[str, list[Any]] = {}
    seed = None
    for arm in (control, treated):
        for row in detection[arm]:
            found = read_json_or_none(run.out / f"detection/{arm}/seed-{row['seed']}" / file)
            if isinstance(found, list) and (seed is None or row["seed"] == seed):
                arms[arm], seed = found, row["seed"]
                break
    return pair, seed, arms


def lead(row: Mapping[str, Any]) -> int:
    """Return how many objects more the pretrained arm finds in a picture than the random one."""
    control, treated = (sum(d["correct"] for d in found) for found in row["arms"].values())
    return treated - control
