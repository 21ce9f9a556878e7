"""Pretraining runs beside each other: figures, config keys that differ, curves with a legend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from tools.flow import page, runs
from tools.flow.charts import Series, line_chart, short_number
from tools.flow.runs import CURVES, FIGURES, RunInfo

TITLES = {
    "loss": "Loss", "knn_top1": "kNN top-1", "online_top1": "Online linear probe, top-1",
    "feature_std": "Feature deviation", "effective_rank": "Effective rank",
    "fa_cosine": "FA cosine", "lr": "Learning rate", "images_per_second": "Images per second",
    "data_wait_share": "Share of the time spent waiting for data",
}  # fmt: skip
HEADS = {
    "step": "Step", "epoch": "Epoch", "epochs": "Epochs", "loss": "Loss", "knn_top1": "kNN top-1",
    "best_knn_top1": "Best kNN", "online_top1": "Online", "images_per_second": "Images/s",
    "data_wait_share": "Waiting", "seconds": "Seconds",
}  # fmt: skip


def read_all(folders: Sequence[Path]) -> list[RunInfo]:
    """Every run at or below each folder; a run that two of them hold comes once.

    Raises:
        UserError: If one of them is no folder, or holds no run.
    """
    found: dict[Path, RunInfo] = {}
    for folder in folders:
        places = list(runs.find(folder))
        if not places:
            raise UserError(
                f"{folder} holds no pretraining run: no folder at or below it has one of "
                f"{', '.join(runs.MARKS)}"
            )
        for place in places:
            if place.resolve() not in found:
                found[place.resolve()] = runs.read(place)
    return list(found.values())


def context(found: Sequence[RunInfo]) -> dict[str, Any]:
    """What `runs_section.html.j2` shows: `runs`, `run_heads`, `run_charts`, `differing`."""
    labels = runs.names(found)
    differing = runs.differences(found)
    differing.pop("out", None)  # the folder, which names the run
    return {
        "runs": [
            {
                "key": f"run-{number}",
                "tone": page.tone(number),
                "label": label,
                "info": run,
                "figures": [_number(run.figures[key]) for key in FIGURES],
                "config": ["" if v[number] is None else str(v[number]) for v in differing.values()],
            }
            for number, (run, label) in enumerate(zip(found, labels, strict=True))
        ],
        "run_heads": [HEADS[key] for key in FIGURES],
        "run_charts": charts(found, labels),
        "differing": list(differing),
    }


def charts(found: Sequence[RunInfo], labels: Sequence[str]) -> list[dict[str, Any]]:
    """A chart for each curve that a run has, one line a run."""
    drawn = []
    for key in CURVES:
        lines = [
            Series(label, run.curves.get(key, []), page.tone(number), key=f"run-{number}")
            for number, (run, label) in enumerate(zip(found, labels, strict=True))
        ]
        chart = line_chart(TITLES[key], lines, "epoch")
        if chart is not None:
            drawn.append({"title": TITLES[key], "chart": chart})
    return drawn


def _number(value: float | None) -> str:
    return page.DASH if value is None else short_number(value)
