"""The tables and charts of detection trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.files import write_json
from tools.studies.documents import Chart, Section, Table, write_all
from tools.studies.plots import Line, interval_chart
from tools.studies.results import (
    COMPARISON_HEAD,
    DASH,
    comparison_cells,
    difference_chart,
    mean_text,
)
from tools.studies.trials import COCO_METRICS, METRICS

_SHOWN = (*METRICS, *COCO_METRICS)
_COCO = "Paired differences by COCO's metric; a family of comparisons for each of the three"


def write(out: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write results.json and the tables beside it; returns the files."""
    write_json(out / "results.json", results)
    paths = write_all(out, "tables", title(results), sections(results))
    return [out / "results.json", *paths]


def title(results: Mapping[str, Any]) -> str:
    """What the trials are called."""
    return f"Detection trials on {results['data']}"


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The tables and charts of trials; all are marked while they are not complete."""
    found = [_overview(results), *_metric_sections(results), *_coco_section(results)]
    found += _class_sections(results)
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
    rows = [
        (name, str(arm["AP50"]["n"]), *(_mean(arm, metric) for metric in _SHOWN), "measured")
        for name, arm in results["arms"].items()
    ]
    published = results["published"]
    if published is not None:
        lines.append(
            f"Published rows: {published['protocol']}. [M]: recalled, not checked against the "
            "source. They compare with the measured ones only if the protocol is the same."
        )
        rows += [
            (row["init"], DASH, *(_figure(row.get(metric)) for metric in _SHOWN),
             row["source"] + " [M]" * bool(row.get("recalled")))
            for row in published["rows"]
        ]  # fmt: skip
    head = ("initialisation", "n", *map(_word, _SHOWN), "source")
    caption = "Percent, mean ± std over seeds, by the set's metric and by COCO's on the same boxes"
    tables = [Table(caption, head, rows)]
    if results["failures"]:
        failed = [(e["arm"], str(e["seed"]), e["reason"] or DASH) for e in results["failures"]]
        tables.append(Table("Failed runs", ("initialisation", "seed", "reason"), failed))
    return Section("Overview", lines, tables)


def _figure(value: float | None) -> str:
    return DASH if value is None else f"{value:g}"


def _mean(arm: Mapping[str, Any], metric: str) -> str:
    """Mean and deviation; a dash in results of an older version, without COCO's metric."""
    return mean_text(arm[metric]) if metric in arm else DASH


def _word(metric: str) -> str:
    return metric.replace("coco_", "COCO ")


def _coco_section(results: Mapping[str, Any]) -> list[Section]:
    """The paired differences by COCO's metric; nothing if no seed has it."""
    rows = [
        (f"{_word(metric)}, {cells[0]}", *cells[1:])
        for metric in COCO_METRICS
        for row in results["comparisons"].get(metric, [])
        if row["n"]
        for cells in [comparison_cells(row)]
    ]
    return [Section("COCO's metric", (), (Table(_COCO, COMPARISON_HEAD, rows),))] if rows else []


def _metric_sections(results: Mapping[str, Any]) -> list[Section]:
    sections = []
    for metric in METRICS:
        compared = results["comparisons"][metric]
        table = Table("Paired differences", COMPARISON_HEAD, list(map(comparison_cells, compared)))
        lines = [
            Line(name, list(arm[metric]["values"].values()), arm[metric]["mean"], None)
            for name, arm in results["arms"].items()
        ]
        drawn = {
            f"{metric}_arms": interval_chart(metric, lines, f"{metric}, percent", zero=False),
            f"{metric}_differences": difference_chart(metric, compared),
        }
        charts = [Chart(name, svg) for name, svg in drawn.items() if svg is not None]
        sections.append(Section(metric, (), (table,) if compared else (), charts))
    return sections


def _class_sections(results: Mapping[str, Any]) -> list[Section]:
    sections = []
    for metric, found in results["per_class"].items():
        if not found["arms"]:
            continue
        arms = list(results["arms"])
        rows = [
            (name, *(mean_text(by_arm[arm]) if arm in by_arm else DASH for arm in arms))
            for name, by_arm in found["arms"].items()
        ]
        tables = [Table("Percent, mean ± std", ("class", *arms), rows)]
        compared = list(map(comparison_cells, found["comparisons"]))
        if compared:
            tables.append(Table("Paired differences", COMPARISON_HEAD, compared))
        sections.append(Section(f"{metric} by class", (), tables))
    return sections
