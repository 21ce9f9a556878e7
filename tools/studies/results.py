"""What a study found: results.json, and the same as tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_json
from common.stats import RULE, Contrast, claim_verdict, compare, mean_std
from tools.studies.documents import Chart, Section, Table, write_all
from tools.studies.grid import METRICS, Grid, Preset
from tools.studies.plots import Line, interval_chart
from tools.studies.store import Row

if TYPE_CHECKING:  # the report reads studies where what runs them is not installed
    from tools.studies.cells import Plan

FORMAT = "fa-study-1"
DASH = "-"


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
    paths = write_all(out, "tables", title(results), sections(results))
    return [out / "results.json", *paths]


def title(results: Mapping[str, Any]) -> str:
    """What a study is called."""
    return f"Study {results['preset']} on {results['data']}"


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The tables and charts of a study; all are marked while it is not complete."""
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
    compared = [comparison_cells(row) for row in table["comparisons"]]
    comparison_table = Table("Paired differences in points", COMPARISON_HEAD, compared)
    charts = [*_charts(table, metric)]
    return Section(
        f"{table['title']} ({metric})", paragraphs, (cell_table, comparison_table), charts
    )


def _charts(table: Mapping[str, Any], metric: str) -> list[Chart]:
    means = [
        Line(", ".join(row["axes"].values()), list(row["values"].values()), row["mean"], None)
        for row in table["rows"]
    ]
    stem = f"{table['name']}_{table['metric']}"
    charts = {
        f"{stem}_cells": interval_chart(table["title"], means, f"{metric}, percent", zero=False),
        f"{stem}_differences": difference_chart(table["title"], table["comparisons"]),
    }
    return [Chart(name, svg) for name, svg in charts.items() if svg is not None]


COMPARISON_HEAD = (
    "comparison", "n", "difference", "95 % bootstrap", "95 % Student t", "p (t)", "p (sign)",
    "p (Holm)", "verdict",
)  # fmt: skip


def comparison_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A comparison as cells below COMPARISON_HEAD."""
    mean = DASH if row["mean"] is None else f"{row['mean']:+.2f}"
    p_values = (p_text(row[key]) for key in ("p", "p_permutation", "p_holm"))
    intervals = (interval_text(row[key]) for key in ("bootstrap", "student_t"))
    return (row["name"], str(row["n"]), mean, *intervals, *p_values, row["verdict"])


def difference_chart(title: str, comparisons: Sequence[Mapping[str, Any]]):
    """Differences with their bootstrap intervals; None where there are none."""
    lines = [
        Line(row["name"], row["differences"], row["mean"], tuple(row["bootstrap"] or ()) or None)
        for row in comparisons
    ]
    return interval_chart(title, lines, "difference, points (bar: bootstrap 95 %)", zero=True)


def mean_text(row: Mapping[str, Any]) -> str:
    """`50.3 ± 2.0`; a dash where there is nothing."""
    if row["mean"] is None:
        return DASH
    return f"{row['mean']:.2f}" + ("" if row["std"] is None else f" ± {row['std']:.2f}")


def interval_text(interval: Sequence[float] | None) -> str:
    """`[+1.20, +2.30]`."""
    return DASH if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def p_text(p: float | None) -> str:
    """Three digits after the point."""
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
