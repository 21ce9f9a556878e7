"""The tables of detection trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.files import write_json
from pipeline.grid import documents
from pipeline.grid.documents import DASH, Section, Table, comparison_table, mean_text
from pipeline.grid.trials import COCO_METRICS, METRICS

_SHOWN = (*METRICS, *COCO_METRICS)
_COCO = "Paired differences by COCO's metric; a family of comparisons for each of the three"


def write(out: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write results.json and the tables beside it; returns the files."""
    write_json(out / "results.json", results)
    tables = documents.write(out, title(results), sections(results), comparisons(results))
    return [out / "results.json", *tables]


def title(results: Mapping[str, Any]) -> str:
    """What the trials are called."""
    return f"Detection trials on {results['data']}"


def comparisons(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paired differences that are drawn."""
    return [
        {**row, "name": f"{metric}, {row['name']}"}
        for metric in METRICS
        for row in results["comparisons"][metric]
    ]


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The tables of trials; all are marked while they are not complete."""
    found = [_overview(results)]
    for metric in METRICS:
        if results["comparisons"][metric]:
            table = comparison_table("Paired differences", results["comparisons"][metric])
            found.append(Section(metric, (), (table,)))
    coco = [
        {**row, "name": f"{_word(metric)}, {row['name']}"}
        for metric in COCO_METRICS
        for row in results["comparisons"].get(metric, [])
        if row["n"]
    ]
    if coco:
        found.append(Section("COCO's metric", (), (comparison_table(_COCO, coco),)))
    for metric, by_class in results["per_class"].items():
        arms = list(results["arms"])
        rows = [
            (name, *(mean_text(by_arm.get(arm)) for arm in arms))
            for name, by_arm in by_class["arms"].items()
        ]
        tables = [Table("Percent, mean ± std", ("class", *arms), rows)]
        if by_class["comparisons"]:
            tables.append(comparison_table("Paired differences", by_class["comparisons"]))
        if rows:
            found.append(Section(f"{metric} by class", (), tables))
    return [replace(section, is_preliminary=not results["is_complete"]) for section in found]


def _overview(results: Mapping[str, Any]) -> Section:
    counts = results["counts"]
    lines = [
        f"{counts.get('finished', 0)} of {counts['cells']} runs are finished. Seeds "
        f"{', '.join(map(str, results['seeds']))}; set {results['data']}, config "
        f"{results['config']}. Intervals cover what differs between the seeds: the detector's "
        "training, and pretraining or split where their names hold {seed}.",
        results["rule"],
    ]
    if not results["is_complete"]:
        lines.insert(0, "PRELIMINARY: not all runs are finished; nothing here is a result yet.")
    # Results of an older version have no figures by COCO's metric.
    rows = [
        (name, str(arm["AP50"]["n"]), *(mean_text(arm.get(m)) for m in _SHOWN), "measured")
        for name, arm in results["arms"].items()
    ]
    published = results["published"]
    if published is not None:
        lines.append(
            f"Published rows: {published['protocol']}. [M]: recalled, not checked against the "
            "source. They compare with the measured ones only if the protocol is the same."
        )
        for row in published["rows"]:
            figures = (DASH if row.get(m) is None else f"{row[m]:g}" for m in _SHOWN)
            source = row["source"] + " [M]" * bool(row.get("recalled"))
            rows.append((row["init"], DASH, *figures, source))
    head = ("initialisation", "n", *map(_word, _SHOWN), "source")
    caption = "Percent, mean ± std over seeds, by the set's metric and by COCO's on the same boxes"
    tables = [Table(caption, head, rows)]
    if results["failures"]:
        failed = [(e["arm"], str(e["seed"]), e["reason"] or DASH) for e in results["failures"]]
        tables.append(Table("Failed runs", ("initialisation", "seed", "reason"), failed))
    return Section("Overview", lines, tables)


def _word(metric: str) -> str:
    return metric.replace("coco_", "COCO ")
