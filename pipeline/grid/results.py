"""What a study found: results.json, and the same as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_json
from common.stats import RULE, Contrast, claim_verdict, compare, mean_std
from pipeline.grid import documents
from pipeline.grid.documents import DASH, Section, Table, comparison_table, mean_text
from pipeline.grid.grid import METRICS, Grid, Preset
from pipeline.grid.store import Row

if TYPE_CHECKING:  # the report reads studies where what runs them is not installed
    from pipeline.grid.cells import Plan

FORMAT = "fa-study-1"


def summarise(
    plan: Plan, rows: Sequence[Row], preset: Preset, data_name: str, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a page or a paper needs of a study.

    Args:
        plan: Grids and cells.
        rows: Of the store.
        preset: Seeds and metrics.
        data_name: Of the set.
        about: Commit, versions, machine.
    Returns:
        `format`, `preset`, `data`, `rule`, `metrics`, `seeds`, `is_complete`, `counts` of the
        statuses, `seconds`, `cells` (one per cell and seed), `tables` (one per grid), `failures`.
    """
    wanted = [row for row in rows if row.fingerprint in plan.cells and row.seed < preset.seeds]
    counts: dict[str, int] = {}
    for row in wanted:
        counts[row.status] = counts.get(row.status, 0) + 1
    num_cells = len(plan.cells) * preset.seeds
    return {
        "format": FORMAT,
        "preset": preset.name,
        "data": data_name,
        "rule": RULE,
        "metrics": {name: METRICS[name] for name in preset.metrics},
        "seeds": preset.seeds,
        "is_complete": counts.get("finished", 0) == num_cells,
        "counts": {"cells": num_cells, **counts},
        "seconds": sum(row.seconds for row in wanted),
        "tables": [
            _table(grid, plan, values_by_cell(wanted, metric), metric)
            for grid in plan.grids
            for metric in preset.metrics
        ],
        "cells": [_cell(row, plan) for row in wanted],
        "failures": [
            {"cell": row.label, "seed": row.seed, "attempts": row.attempts, "reason": row.error}
            for row in wanted
            if row.status == "failed"
        ],
        **about,
    }


def values_by_cell(rows: Sequence[Row], metric: str) -> dict[str, dict[int, float]]:
    """Fingerprint -> seed -> value, of finished cells."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.status == "finished" and metric in row.metrics:
            found.setdefault(row.fingerprint, {})[row.seed] = row.metrics[metric]
    return found


def _cell(row: Row, plan: Plan) -> dict[str, Any]:
    return {
        "fingerprint": row.fingerprint,
        "seed": row.seed,
        "axes": plan.cells[row.fingerprint].axes,
        "status": row.status,
        "metrics": row.metrics,
        "seconds": row.seconds,
        "attempts": row.attempts,
        "error": row.error,
        "code": row.code,
    }


def _table(
    grid: Grid, plan: Plan, values: Mapping[str, Mapping[int, float]], metric: str
) -> dict[str, Any]:
    rows = []
    for axes, _ in grid.cells():
        fingerprint = plan.fingerprint(grid, axes)
        found = dict(sorted(values.get(fingerprint, {}).items()))
        summary = mean_std(list(found.values()))
        rows.append({"axes": axes, "fingerprint": fingerprint, **summary, "values": found})
    contrasts = [
        Contrast(
            comparison.name,
            tuple(
                (weight, values.get(plan.fingerprint(grid, axes), {}))
                for weight, axes in comparison.terms
            ),
            comparison.decides,
        )
        for comparison in grid.comparisons
    ]
    compared = compare(contrasts)
    return {
        "name": grid.name,
        "title": grid.title,
        "claim": grid.claim,
        "metric": metric,
        "rows": rows,
        "comparisons": compared,
        "verdict": claim_verdict(compared),
        "left_out": [{"cells": cells, "reason": reason} for cells, reason in grid.left_out],
    }


def write(out: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write results.json and the tables beside it; returns the files."""
    write_json(out / "results.json", results)
    tables = documents.write(out, title(results), sections(results), comparisons(results))
    return [out / "results.json", *tables]


def title(results: Mapping[str, Any]) -> str:
    """What a study is called."""
    return f"Study {results['preset']} on {results['data']}"


def comparisons(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paired differences that are drawn."""
    return [
        {**row, "name": f"{table['name']}, {table['metric']}: {row['name']}"}
        for table in results["tables"]
        for row in table["comparisons"]
    ]


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The tables of a study; all are marked while it is not complete."""
    found = [_overview(results), *(_section(table, results) for table in results["tables"])]
    return [replace(section, is_preliminary=not results["is_complete"]) for section in found]


def _overview(results: Mapping[str, Any]) -> Section:
    counts = results["counts"]
    finished, cells = counts.get("finished", 0), counts["cells"]
    hours = results["seconds"] / 3600
    lines = [f"{finished} of {cells} runs are finished ({hours:.2f} hours of running)."]
    if not results["is_complete"]:
        lines.insert(0, "PRELIMINARY: the study is not complete; nothing here is a result yet.")
    lines.append(results["rule"])
    rows = [
        (table["claim"], results["metrics"][table["metric"]], table["verdict"])
        for table in results["tables"]
    ]
    tables = [Table("Claims", ("claim", "metric", "verdict"), rows)]
    if results["failures"]:
        failed = [
            (entry["cell"], str(entry["seed"]), str(entry["attempts"]), entry["reason"] or DASH)
            for entry in results["failures"]
        ]
        tables.append(Table("Failed runs", ("cell", "seed", "attempts", "reason"), failed))
    return Section("Overview", lines, tables)


def _section(table: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
    metric = results["metrics"][table["metric"]]
    paragraphs = [f"Claim: {table['claim']}. Verdict by {metric}: {table['verdict']}."]
    paragraphs += [
        f"Left out: {', '.join(entry['cells'].values())} ({entry['reason']})."
        for entry in table["left_out"]
    ]
    axes = list(table["rows"][0]["axes"])
    cells = [
        (*(row["axes"][axis] for axis in axes), mean_text(row), str(row["n"]))
        for row in table["rows"]
    ]
    cell_table = Table(f"{metric} in percent", (*axes, "mean ± std", "n"), cells)
    compared = comparison_table("Paired differences in points", table["comparisons"])
    return Section(f"{table['title']} ({metric})", paragraphs, (cell_table, compared))
