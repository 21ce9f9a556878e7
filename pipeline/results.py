"""The figures of a run, gathered from the files that its stages left: `results.json`, tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import stats
from common.files import is_number, read_json_lines, read_json_or_none, write_json
from common.stats import mean_std, paired_difference
from pipeline import tables
from pipeline.config import ARMS, FROZEN
from pipeline.stages import read_run

METRICS = ("AP", "AP50", "AP75")
COCO_METRICS = ("coco_AP", "coco_AP50", "coco_AP75")  # by COCO's metric, on the same boxes
ALL_METRICS = (*METRICS, *COCO_METRICS)
PER_CLASS = {"AP": "per_class", "AP50": "per_class_AP50"}  # keys of result.json
Measured = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Metric -> variant or arm -> seed -> value."""
PAIRS = {"fine_tuned": ("pretrained", "random"), "frozen": ("pretrained_frozen", "random_frozen")}
PAIR_TITLES = {"fine_tuned": "Fine-tuned", "frozen": "Backbone frozen"}


def assemble(out: Path) -> dict[str, Any]:
    """Return the figures of the run in `out`; what did not run is empty or None."""
    run = read_run(out)
    plan, good = run.get("plan") or [], finished_stages(run)

    def left_by(stage: str, file: str) -> dict[str, Any]:
        return (read_json_or_none(out / stage / file) if stage in good else None) or {}

    pretrain, card = left_by("pretrain", "summary.json"), left_by("convert", "backbone.json")
    detection: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*ARMS, *run.get("arms", ()))}
    kept = ("per_class", "per_class_AP50", "iterations", "seconds", "num_threads")
    for arm, rows in detection.items():
        seeds = (name.rpartition("/seed-")[2] for name in good if name.startswith(f"{arm}/"))
        for seed in sorted(map(int, seeds)):
            result = read_json_or_none(out / f"detection/{arm}/seed-{seed}/result.json")
            if isinstance(result, dict):
                rows.append(seed_row(seed, result, (*kept, "peak_memory_bytes")))
    results = {
        "format": "fa-results-1",
        "name": run.get("name"),
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
        "versions": run.get("versions") or {},
        "commit": run.get("commit"),
        "summary": {arm: summarise(rows) for arm, rows in detection.items()},
        "differences": {pair: compare(detection, *arms) for pair, arms in PAIRS.items()},
    }
    others = {name.removeprefix("pretrain/"): left_by(name, "summary.json")
              for name in good if name.startswith("pretrain/")}  # fmt: skip
    if others:  # variant/seed-N, or the variant alone
        results["pretrainings"] = others
    if run.get("tables"):
        found = measured(out)
        classes = {metric: [m for m in found if m.startswith(f"{metric}:")] for metric in PER_CLASS}
        results |= {
            "rule": stats.RULE,
            "tables": [make_table(table, found, metric, [metric])
                       for table in run["tables"] for metric in found if ":" not in metric]
            # All classes and pairs are one family of comparisons.
            + [make_table(table, found, f"{metric} by class", names)
               for table in run["tables"] for metric, names in classes.items() if names],
            "failures": [
                {"stage": name, "label": record["label"], "reason": record["error"]}
                for name, record in run["stages"].items()
                if name in plan and record["status"] == "failed"
            ],
            # More than one: figures of the table may not agree.
            "commits": sorted({str(r["commit"]) for r in good.values() if r.get("commit")}),
        }  # fmt: skip
    return results


def make_table(
    table: Mapping[str, Any], found: Measured, title: str, metrics: Sequence[str]
) -> dict[str, Any]:
    """Return a table by one metric, or by its values class by class.

    Args:
        table: A `TableConfig` as plain values.
        found: See `measured`.
        title: What the metric is called.
        metrics: Of `found`; their comparisons are one family.
    Returns:
        `name`, `title`, `claim`, `metric`, `left_out`; `rows`: `label`, `variant`, `n`, `mean`,
        `std`, `values` by seed; `comparisons`: see `stats.compare`; comparisons of variants whose
        frozen arms were trained come once more, of these; `verdict` on the claim.
    """
    rows, contrasts = [], []
    for metric in metrics:
        prefix = metric.partition(":")[2] + ": " * (":" in metric)
        values = found[metric]
        for label, variant in table["rows"].items():
            by_seed = dict(sorted(values.get(variant, {}).items()))
            row = {"label": prefix + label, "variant": variant, "values": by_seed}
            rows.append(row | mean_std(list(by_seed.values())))
        for ending in ("", FROZEN):
            for item in table["comparisons"]:
                if ending and not all(variant + ending in values for variant in item["terms"]):
                    continue
                terms = ((w, values.get(v + ending, {})) for v, w in item["terms"].items())
                name = prefix + item["name"] + ending.replace("_", ", ")
                contrasts.append(stats.Contrast(name, tuple(terms), item["decides"]))
    compared = stats.compare(contrasts)
    kept = {key: table[key] for key in ("name", "title", "claim", "left_out")}
    return kept | {"metric": title, "rows": rows, "comparisons": compared} | {
        "verdict": stats.claim_verdict(compared)
    }  # fmt: skip


def finished_stages(run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Finished stages of the plan whose records speak of the present settings."""
    return {
        name: record
        for name in run.get("plan") or ()
        if (record := run["stages"].get(name)) and record.get("status") == "finished"
        if record.get("current")
    }


def measured(out: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Return metric -> variant or arm -> seed -> value in percent, of the finished stages of a run.

    Metrics: `knn`, `online`, `linear` of variants; of arms `ALL_METRICS`, and by class as
    `AP50:dog`. A seed of pretraining that is not named is 0.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}

    def enter(metric: str, name: str, content: Any, key: str, percent: float = 100.0) -> None:
        variant, _, seed = name.partition("/seed-")
        value = content.get(key) if isinstance(content, dict) else None
        if is_number(value):
            found.setdefault(metric, {}).setdefault(variant, {})[int(seed or 0)] = percent * value

    for name in finished_stages(read_run(out)):
        kind, _, tail = name.partition("/")
        tail = tail or "pretrained"
        if kind == "pretrain":
            enter("knn", tail, read_json_or_none(out / name / "summary.json"), "knn_top1")
            rows = read_json_lines(out / name / "metrics.jsonl")
            last = next((row for row in rows[::-1] if "online_top1" in row), None)
            enter("online", tail, last, "online_top1")
        elif kind == "linear":
            enter("linear", tail, read_json_or_none(out / name / "linear.json"), "top1")
        elif "/seed-" in name and kind != "convert":
            result = read_json_or_none(out / "detection" / name / "result.json") or {}
            for metric in ALL_METRICS:
                enter(metric, name, seed_row(0, result, ()), metric, 1.0)
            for metric, key in PER_CLASS.items():
                for label in result.get(key) or ():
                    enter(f"{metric}:{label}", name, result[key], label, 1.0)
    return found


def write(out: Path, further: Sequence[tables.Section] = (), **about: Any) -> None:
    """Write `out/results.json`, each arm's summary over its finished seeds, and tables.

    Args:
        out: The run's folder.
        further: Sections at the end of the tables.
        about: Further keys of the results.
    """
    results = assemble(out)
    write_json(out / "results.json", results | about)
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
    if "tables" in results:
        tables.write(out, results, further)


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
    texts = [item["text"] for item in found if item["kind"] != "missing"]
    for table in results.get("tables", ()):
        for row in table["comparisons"] if table["metric"] in ("knn", "linear", "AP50") else ():
            if row["n"]:
                texts.append(
                    f"{table['metric']}, {row['name']}: {row['mean']:+.2f} points, 95 % interval "
                    f"{tables.interval_text(row['student_t'])}, n = {row['n']}: {row['verdict']}"
                )
    return texts
