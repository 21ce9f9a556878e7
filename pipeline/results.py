"""`results.json`: the figures of a run, gathered from the files that its stages left."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import is_number, read_json_or_none, write_json
from common.stats import mean_std, paired_difference
from pipeline.config import ARMS

METRICS = ("AP", "AP50", "AP75")
COCO_METRICS = ("coco_AP", "coco_AP50", "coco_AP75")  # by COCO's metric, on the same boxes
ALL_METRICS = (*METRICS, *COCO_METRICS)
PAIRS = {"fine_tuned": ("pretrained", "random"), "frozen": ("pretrained_frozen", "random_frozen")}
PAIR_TITLES = {"fine_tuned": "Fine-tuned", "frozen": "Backbone frozen"}


def assemble(out: Path) -> dict[str, Any]:
    """Return the figures of the run in `out`; what did not run is empty or None."""
    store = read_json_or_none(out / "stages.json") or {}
    plan, records = store.get("plan") or [], store.get("stages") or {}
    # Finished stages whose records speak of the present settings.
    good = {
        name: record
        for name in plan
        if (record := records.get(name)) and record.get("status") == "finished"
        if record.get("current")
    }

    def left_by(stage: str, file: str) -> dict[str, Any]:
        return (read_json_or_none(out / stage / file) if stage in good else None) or {}

    pretrain, card = left_by("pretrain", "summary.json"), left_by("convert", "backbone.json")
    detection: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    kept = ("per_class", "per_class_AP50", "iterations", "seconds", "num_threads")
    for arm, rows in detection.items():
        seeds = (name.rpartition("/seed-")[2] for name in good if name.startswith(f"{arm}/"))
        for seed in sorted(map(int, seeds)):
            result = read_json_or_none(out / f"detection/{arm}/seed-{seed}/result.json")
            if isinstance(result, dict):
                rows.append(seed_row(seed, result, (*kept, "peak_memory_bytes")))
    return {
        "format": "fa-results-1",
        "name": store.get("name"),
        "detection": detection,
        "pretrain": {"images_per_second": None, "knn_top1": None} | pretrain,
        "conversion": {
            "max_relative_difference": card.get("max_relative_difference"),
            "stages": card.get("stages"),
            "seconds": card.get("seconds"),
        },
        "stages": {
            name: {
                "seconds": record.get("seconds"),
                "skipped": record.get("skipped", False),
                "peak_memory_bytes": record.get("peak_memory_bytes"),
            }
            for name, record in good.items()
        },
        "unfinished": [name for name in plan if name not in good],
        "versions": store.get("versions") or {},
        "commit": store.get("commit"),
        "summary": {arm: summarise(rows) for arm, rows in detection.items()},
        "differences": {pair: compare(detection, *arms) for pair, arms in PAIRS.items()},
    }


def write(out: Path) -> None:
    """Write `out/results.json`, and each arm's summary over all its finished seeds."""
    results = assemble(out)
    write_json(out / "results.json", results)
    for arm, rows in results["detection"].items():
        if rows:
            table = results["summary"][arm]
            summary: dict[str, Any] = {"n": len(rows), "seeds": [row["seed"] for row in rows]}
            for key in ("mean", "std"):
                summary[key] = {metric: table[metric][key] for metric in METRICS}
            coco = {metric.removeprefix("coco_"): table[metric]["mean"] for metric in COCO_METRICS}
            if all(table[metric]["n"] == len(rows) for metric in COCO_METRICS):
                summary["coco"] = coco
            write_json(out / f"detection/{arm}/summary.json", summary)


def seed_row(seed: int, result: Mapping[str, Any], kept: Collection[str]) -> dict[str, Any]:
    """Return the figures of one seed, all metrics side by side; None where one is missing.

    Args:
        seed: Its number.
        result: Content of its result.json, or of its eval-on-NAME.json.
        kept: What else of the result is kept.
    """
    coco = result.get("coco") or {}  # results of older versions have none
    figures = {**result, **{f"coco_{metric}": coco.get(metric) for metric in METRICS}}
    return {"seed": seed} | {key: figures.get(key) for key in (*ALL_METRICS, *kept)}


def values(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Return one metric by seed; seeds where it is missing or not a number are left out."""
    return {row["seed"]: float(row[metric]) for row in rows if is_number(row.get(metric))}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return n, mean and standard deviation of every metric of one arm."""
    return {metric: mean_std(list(values(rows, metric).values())) for metric in ALL_METRICS}


def compare(
    detection: Mapping[str, list[dict[str, Any]]], treated: str, control: str
) -> dict[str, Any]:
    """Return the paired differences of every metric, `treated` minus `control`."""
    arms = {"minuend": treated, "subtrahend": control}
    return arms | {
        metric: paired_difference(
            values(detection[treated], metric), values(detection[control], metric)
        )
        for metric in ALL_METRICS
    }


def verdict(results: Mapping[str, Any], pair: str, metric: str = "AP50") -> dict[str, str]:
    """Return `kind` (better, worse, unclear, single, missing) and `text`, the finding in words."""
    treated, control = PAIRS[pair]
    difference = results["differences"][pair][metric]
    words = PAIR_TITLES[pair].lower()
    if not difference["n"]:
        return {"kind": "missing", "text": f"Not compared ({words}): no seed ran in both arms."}
    seeds = set(difference["seeds"])
    means = [
        mean_std([v for s, v in values(results["detection"][arm], metric).items() if s in seeds])
        for arm in (control, treated)
    ]
    change = f"{metric} {means[0]['mean']:.1f} from random, {means[1]['mean']:.1f} from pretrained"
    gain = f"a difference of {difference['mean']:+.1f} points"
    if difference["student_t"] is None:
        text = f"{change}: {gain} ({words}). One seed: no interval, so it may be chance."
        return {"kind": "single", "text": text}
    low, high = difference["student_t"]
    kind = "better" if low > 0 else "worse" if high < 0 else "unclear"
    leads = {"better": "Pretraining helps", "worse": "Pretraining hurts"}
    lead = leads.get(kind, "No clear difference")
    interval = f"95 % interval {low:+.1f} to {high:+.1f}, {difference['n']} paired seeds"
    return {"kind": kind, "text": f"{lead} ({words}): {change}, {gain} ({interval})."}


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Return the findings of all pairs that ran."""
    found = [verdict(results, pair) for pair in PAIRS]
    return [item["text"] for item in found if item["kind"] != "missing"]
