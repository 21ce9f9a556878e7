"""A study: the commands of each cell, the figures that they leave, and the tables of its claims."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.files import read_json, read_json_lines, write_text
from common.stats import RULE, Contrast, claim_verdict, compare, mean_std
from pipeline.grid import documents
from pipeline.grid.data import StudyData
from pipeline.grid.documents import Section, Table, comparison_table, mean_text, overview
from pipeline.grid.grid import METRICS, Cell, Grid, Plan, Preset
from pipeline.grid.jobs import Step
from pipeline.grid.schedule import Row, Work, count_statuses

FORMAT = "fa-study-1"
_NAME_LENGTH = 12  # of a fingerprint in names of folders
_KEPT = ("fingerprint", "seed", "status", "metrics", "seconds", "attempts", "error", "code")


# -- commands and figures -------------------------------------------------------------------------


def make_work(
    cell: Cell, seed: int, out: Path, root: Path, data: StudyData, metrics: Sequence[str]
) -> Work:
    """A cell with one seed as commands; writes the config that they read."""
    folder = out / "cells" / cell.fingerprint[:_NAME_LENGTH] / f"seed-{seed}"
    config = folder.parent / "config.yaml"
    if not config.exists():
        write_text(config, yaml.safe_dump(cell.settings["config"], sort_keys=False))
    shards = [str(path) for path in data.pools[cell.settings["pool"]]]
    command = (
        *("bash", str(root / "tools/pretrain.sh"), str(config)),
        *(f"seed={seed}", f"out={folder / 'run'}", f"data.shards={json.dumps(shards)}"),
        *(f"eval.probe_train={data.probe_train}", f"eval.probe_val={data.probe_val}"),
        "--resume",
    )
    steps = [Step("pretrain", command, folder / "run/summary.json")]
    if "linear" in metrics:  # kNN and the online probe are measured while pretraining goes on
        num_workers = int(cell.settings["config"].get("data", {}).get("num_workers", 2))
        command = (
            *(sys.executable, str(root / "tools/linear_eval.py")),
            *(str(folder / "run/checkpoint.pth"), "--train", str(data.probe_train)),
            *("--val", str(data.probe_val), "--out", str(folder / "linear")),
            *("--protocol", "cached", "--resume", f"num_workers={num_workers}"),
        )
        steps.append(Step("linear", command, folder / "linear/linear.json"))
    read = functools.partial(read_metrics, metrics, folder)
    return Work((cell.fingerprint, seed), tuple(steps), folder, read)


def read_metrics(metrics: Sequence[str], folder: Path) -> dict[str, float]:
    """The figures of a finished cell, in percent.

    Raises:
        ValueError: If one is missing or no number.
    """

    def online() -> Any:
        rows = read_json_lines(folder / "run/metrics.jsonl")
        return [row["online_top1"] for row in rows if "online_top1" in row][-1]

    readers = {
        "knn": lambda: read_json(folder / "run/summary.json")["knn_top1"],
        "linear": lambda: read_json(folder / "linear/linear.json")["top1"],
        "online": online,
    }
    found = {}
    for name in metrics:
        try:
            value = readers[name]()
        except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: no figure in {folder.name} ({what})") from None
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{name}: {value!r} is no share of 1")
        found[name] = 100 * float(value)
    return found


# -- results --------------------------------------------------------------------------------------


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
    mine = [row for row in rows if row.fingerprint in plan.cells and row.seed < preset.seeds]
    counts = count_statuses(mine, len(plan.cells) * preset.seeds)
    return {
        "format": FORMAT,
        "preset": preset.name,
        "data": data_name,
        "rule": RULE,
        "metrics": {name: METRICS[name] for name in preset.metrics},
        "seeds": preset.seeds,
        "is_complete": counts.get("finished", 0) == counts["cells"],
        "counts": counts,
        "seconds": sum(row.seconds for row in mine),
        "tables": [
            _table(grid, plan, mine, metric) for grid in plan.grids for metric in preset.metrics
        ],
        "cells": [
            {key: getattr(row, key) for key in _KEPT} | {"axes": plan.cells[row.fingerprint].axes}
            for row in mine
        ],
        "failures": [
            {"cell": row.label, "seed": row.seed, "attempts": row.attempts, "reason": row.error}
            for row in mine
            if row.status == "failed"
        ],
        **about,
    }


def _table(grid: Grid, plan: Plan, rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """One grid by one metric: mean and values of each cell, comparisons, verdict."""
    values: dict[str, dict[int, float]] = {name: {} for name in plan.cells}
    for row in rows:
        if row.status == "finished" and metric in row.metrics:
            values[row.fingerprint][row.seed] = row.metrics[metric]
    cells = []
    for axes, _ in grid.cells():
        name = plan.fingerprint(grid, axes)
        found = dict(sorted(values[name].items()))
        summary = mean_std(list(found.values()))
        cells.append({"axes": axes, "fingerprint": name, **summary, "values": found})
    compared = compare(
        [
            Contrast(
                comparison.name,
                tuple((w, values[plan.fingerprint(grid, axes)]) for w, axes in comparison.terms),
                comparison.decides,
            )
            for comparison in grid.comparisons
        ]
    )
    return {
        "name": grid.name,
        "title": grid.title,
        "claim": grid.claim,
        "metric": metric,
        "rows": cells,
        "comparisons": compared,
        "verdict": claim_verdict(compared),
        "left_out": [{"cells": cells, "reason": reason} for cells, reason in grid.left_out],
    }


def write(out: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write results.json and the tables beside it; returns the files."""
    finished, cells = results["counts"].get("finished", 0), results["counts"]["cells"]
    hours = results["seconds"] / 3600
    claims = [
        (table["claim"], results["metrics"][table["metric"]], table["verdict"])
        for table in results["tables"]
    ]
    state = f"{finished} of {cells} runs are finished ({hours:.2f} hours of running)."
    first = overview(results, state, Table("Claims", ("claim", "metric", "verdict"), claims))
    sections = [first, *(_section(table, results["metrics"]) for table in results["tables"])]
    comparisons = [
        {**row, "name": f"{table['name']}, {table['metric']}: {row['name']}"}
        for table in results["tables"]
        for row in table["comparisons"]
    ]
    title = f"Study {results['preset']} on {results['data']}"
    return documents.write(out, title, results, sections, comparisons)


def _section(table: Mapping[str, Any], metrics: Mapping[str, str]) -> Section:
    metric = metrics[table["metric"]]
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
