"""What a cell is judged by: which commands measure it, and where the figures stand."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.files import read_json, read_json_lines
from pipeline.grid.data import StudyData
from pipeline.grid.jobs import Step


def metric_steps(
    metrics: Sequence[str], folder: Path, root: Path, data: StudyData, num_workers: int
) -> Iterator[Step]:
    """The commands after pretraining; kNN and the online probe need none.

    Args:
        metrics: Of grid.METRICS.
        folder: Of the cell with its seed; the run lies in `run`.
        root: The repository.
        data: Where the labelled shards are.
        num_workers: Loader processes, as in pretraining.
    """
    if "linear" in metrics:
        out = folder / "linear"
        command = (
            *(
                sys.executable,
                str(root / "tools/linear_eval.py"),
                str(folder / "run/checkpoint.pth"),
            ),
            *("--train", str(data.probe_train), "--val", str(data.probe_val)),
            *("--out", str(out), "--protocol", "cached"),
            *("--resume", f"num_workers={num_workers}"),
        )
        yield Step("linear", command, out / "linear.json")


def read_metrics(metrics: Sequence[str], folder: Path) -> dict[str, float]:
    """The figures of a finished cell, in percent.

    Raises:
        ValueError: If one is missing or no number.
    """
    readers = {"knn": _knn, "online": _online, "linear": _linear}
    found = {}
    for name in metrics:
        try:
            value = readers[name](folder)
        except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: no figure in {folder.name} ({what})") from None
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{name}: {value!r} is no share of 1")
        found[name] = 100 * float(value)
    return found


def _knn(folder: Path) -> float:
    return read_json(folder / "run/summary.json")["knn_top1"]


def _online(folder: Path) -> float:
    rows = read_json_lines(folder / "run/metrics.jsonl")
    return [row["online_top1"] for row in rows if "online_top1" in row][-1]


def _linear(folder: Path) -> float:
    return read_json(folder / "linear/linear.json")["top1"]
