"""What pretraining runs have left behind: their state, their figures, how they differ."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import dotted, read_yaml
from common.errors import UserError, require
from common.files import (
    LOCK,
    NUMBER,
    Form,
    is_number,
    lock_file,
    open_regular,
    read_json,
    read_json_lines,
)

MARKS = ("metrics.jsonl", "environment.json", "checkpoint.pth")
"""A folder that holds one of these is a run."""
NO_RUN = ("experiment.json",)
"""A folder that holds this is an experiment's, and its runs lie below."""
LINEAR = "identity.json"
"""A folder that holds this is a linear evaluation's; its checkpoints are no runs."""
RECENT_SECONDS = 60.0
"""A run whose rows are younger goes on, where a lock cannot be seen (a shared file system)."""
NUM_LAST_ROWS = 10  # whose median speed stands for a run that is not finished
FIGURES = (
    "step", "epoch", "epochs", "loss", "knn_top1", "best_knn_top1", "online_top1",
    "images_per_second", "data_wait_share", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class RunInfo:
    """One run as its files tell it.

    Attributes:
        folder: Where it lies.
        state: finished, running, stopped (by a signal, with a checkpoint), failed (it ended without
            saying so: a crash, a kill), or damaged (the file that tells it cannot be read).
        reason: How the state is known.
        figures: The keys of `FIGURES`; None where the run does not tell.
        commit: Of the code; None where it is not known.
        updated: When the last row was written, seconds since 1970; None without rows.
        problems: Files that are missing or damaged.
        config: The resolved config; empty where it cannot be read.
        rows: Of `metrics.jsonl`, each with a kind and a step.
        replaced: Bad sample -> reason, of `bad_samples.jsonl`.
    """

    folder: Path
    state: str
    reason: str
    figures: dict[str, float | None]
    commit: str | None
    updated: float | None
    problems: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What `list --json` prints."""
        return {
            "run": str(self.folder), "state": self.state, "reason": self.reason, **self.figures,
            "commit": self.commit, "updated": self.updated, "problems": self.problems,
        }  # fmt: skip


def find(folder: Path) -> Iterator[Path]:
    """Every run at or below a folder, in the order of their names; links are not followed.

    Raises:
        UserError: If there is no such folder.
    """
    require(folder.is_dir(), f"{folder} is no folder; name the one that holds the runs, e.g. runs")
    for place, folders, files in os.walk(folder):
        folders.sort()
        if LINEAR in files:
            folders.clear()
        elif set(MARKS) & set(files) and not set(NO_RUN) & {*folders, *files}:
            folders.clear()  # its own folders hold pictures and checkpoints
            yield Path(place)


def read(folder: Path, now: float | None = None) -> RunInfo:
    """One run.

    Args:
        folder: Where it lies.
        now: Seconds since 1970 (default: the clock).

    Raises:
        UserError: If the folder holds no run.
    """
    is_linear = (folder / LINEAR).exists()
    if is_linear or not any((folder / mark).exists() for mark in MARKS):
        raise UserError(f"{folder} holds no run: none of {', '.join(MARKS)} is there")
    problems: list[str] = []
    config = _mapping(folder / "config.yaml", problems)
    commit = _mapping(folder / "environment.json", problems).get("commit")
    has_summary = (folder / "summary.json").exists()
    summary = _mapping(folder / "summary.json", problems) if has_summary else None
    if not (folder / "metrics.jsonl").exists():
        problems.append("metrics.jsonl is missing")
    rows = _rows(folder / "metrics.jsonl", {"kind": str, "step": NUMBER}, problems)
    last = max((row["step"] for row in rows), default=0)
    steps, num_bad = ((summary or {}).get(key) for key in ("steps", "num_skipped_samples"))
    if is_number(steps) and last < steps and (folder / "metrics.jsonl").exists():
        problems.append(f"metrics.jsonl ends at step {last} of {steps}")
    bad = _rows(folder / "bad_samples.jsonl", {"sample": int, "reason": str}, problems)
    if is_number(num_bad) and num_bad > 0 and not bad:
        problems.append("bad_samples.jsonl names none of the samples that were replaced")
    replaced: dict[str, str] = {}
    for row in bad:
        replaced.setdefault(str(row["sample"]), row["reason"])
    updated = (folder / "metrics.jsonl").stat().st_mtime if rows else None
    age = float("inf") if updated is None else (time.time() if now is None else now) - updated
    state, reason = _state(folder, summary, rows, age)
    return RunInfo(
        folder, state, reason, _figures(config, summary or {}, rows),
        commit if isinstance(commit, str) and commit != "unknown" else None,
        updated, problems, config, rows, replaced,
    )  # fmt: skip


def _mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """A file of YAML or JSON; empty, and named among the problems, where it cannot be read."""
    try:
        content = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    except UserError:
        content = None
    if isinstance(content, dict):
        return content
    problems.append(f"{path.name} is {'damaged' if path.exists() else 'missing'}")
    return {}


def _rows(path: Path, form: Form, problems: list[str]) -> list[dict[str, Any]]:
    """Rows of a form; a torn last line belongs to a kill and is no damage."""
    place = f"{path.parent}/"
    try:
        return read_json_lines(path, form, report=lambda m: problems.append(m.removeprefix(place)))
    except (OSError, UserError) as error:
        problems.append(f"{path.name} cannot be read ({getattr(error, 'strerror', None) or error})")
        return []


def _state(
    folder: Path, summary: dict[str, Any] | None, rows: Sequence[dict[str, Any]], age: float
) -> tuple[str, str]:
    """State and reason; ``summary`` is None where the file is missing."""
    # A look at the lock of a living process of this machine; the run does not notice it.
    with contextlib.suppress(OSError), open_regular(folder / LOCK) as file:
        if not lock_file(file, folder, shared=True, of_process=True):
            return "running", "a process holds the run's lock"
    if summary is not None and not summary:
        return "damaged", "summary.json cannot be read"
    step = rows[-1]["step"] if rows else 0
    steps = (summary or {}).get("steps")
    if is_number(steps) and steps >= step:  # a run that goes on after its end is ahead of it
        return "finished", "summary.json is there"
    stops = [row for row in rows[-1:] if str(row.get("message", "")).startswith("stopped by ")]
    if stops:
        return "stopped", str(stops[0]["message"])
    if age < RECENT_SECONDS:
        return "running", f"its last row is {max(age, 0):.0f} s old"
    last = str(rows[-1].get("message", "")) if rows else ""
    return "failed", last or "it ended and left neither summary.json nor a word"


def _figures(
    config: dict[str, Any], summary: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    def values(key: str) -> list[float]:
        return [float(row[key]) for row in rows if is_number(row.get(key))]

    figures = {key: (values(key) or [None])[-1] for key in FIGURES}
    figures["best_knn_top1"] = max(values("knn_top1"), default=None)
    for key in ("images_per_second", "data_wait_share"):
        recent = values(key)[-NUM_LAST_ROWS:]
        figures[key] = statistics.median(recent) if recent else None
    optim = config.get("optim")
    figures["epochs"] = optim.get("epochs") if isinstance(optim, dict) else None
    own = {"step": "steps", "epoch": "epochs", "images_per_second": "images_per_second",
           "seconds": "seconds"}  # fmt: skip
    figures |= {key: summary[name] for key, name in own.items() if is_number(summary.get(name))}
    return {key: value if is_number(value) else None for key, value in figures.items()}


def differences(runs: Sequence[RunInfo]) -> dict[str, list[Any]]:
    """Dotted config keys at which runs differ, with the value of each run; None where it has none.

    A run whose config cannot be read has None everywhere and makes no difference by that.
    """
    configs = [dotted(run.config) for run in runs]
    differing = {}
    for key in sorted(set().union(*configs)):
        if len({repr(config.get(key)) for config in configs if config}) > 1:
            differing[key] = [config.get(key) for config in configs]
    return differing


# What did not go as planned: nothing is left out silently.


@dataclass(frozen=True)
class Item:
    """One entry: of a kind, where it happened, to what, and why."""

    kind: str
    where: str
    what: str
    why: str


def skipped(run: RunInfo, where: str) -> list[Item]:
    """Damaged files, alarms, replaced samples, notes."""
    items = [Item("damaged", where, *problem.split(" ", 1)) for problem in run.problems]
    for row in run.rows:
        if row["kind"] != "event":
            continue
        message, step = str(row.get("message")), f"step {row['step']}"
        if row.get("collapse"):
            items.append(Item("alarm", where, step, message))
        # The page shows a figure and the run's state elsewhere.
        elif "knn_top1_initial" not in row and not message.startswith("stopped by "):
            items.append(Item("noted", where, step, message))
    counts = [row["num_overflow_steps"] for row in run.rows if "num_overflow_steps" in row]
    if any(counts[-1:]):
        why = "gradients were too large for fp16, and the loss scale was halved"
        items.append(Item("noted", where, f"{counts[-1]} steps, left out", why))
    return items + [
        Item("replaced", where, f"sample {sample}", why) for sample, why in run.replaced.items()
    ]
