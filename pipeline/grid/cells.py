"""From grids and a preset to cells: merged config, fingerprint, commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.config import read_yaml
from common.errors import UserError
from common.files import read_json, read_json_lines, write_text
from pipeline.grid.data import StudyData
from pipeline.grid.grid import Grid, Level, Preset
from pipeline.grid.jobs import Step
from pipeline.grid.schedule import Work
from pipeline.stages import digest


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


_NAME_LENGTH = 12  # of a fingerprint in names of folders


@dataclass(frozen=True)
class Cell:
    """One config without its seed; several tables may show it.

    Attributes:
        fingerprint: Hash of `settings`.
        settings: {"config": merged, "pool": share, "data": digest}: what decides its result.
        axes: Grid -> axis -> level.
    """

    fingerprint: str
    settings: dict[str, Any]
    axes: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its levels in the first table that shows it."""
        return ", ".join(next(iter(self.axes.values())).values())


@dataclass(frozen=True)
class Plan:
    """All cells of some grids, each once.

    Attributes:
        grids: In the order given.
        cells: Fingerprint -> cell, in the order of the grids.
        members: Grid -> levels of a cell (in the order of its axes) -> fingerprint.
    """

    grids: tuple[Grid, ...]
    cells: dict[str, Cell]
    members: dict[str, dict[tuple[str, ...], str]]

    def fingerprint(self, grid: Grid, axes: Mapping[str, str]) -> str:
        """Of the cell with these levels."""
        return self.members[grid.name][tuple(axes[axis] for axis in grid.axes)]


def make_plan(grids: Sequence[Grid], preset: Preset, data: StudyData) -> Plan:
    """Merge every cell's config; cells that come to the same are one.

    Raises:
        UserError: For a level that the preset or the data cannot serve.
    """
    base = read_yaml(preset.base)
    cells: dict[str, Cell] = {}
    members: dict[str, dict[tuple[str, ...], str]] = {}
    for grid in grids:
        if grid.name in members:
            raise UserError(f"two grids are called {grid.name}; rename one file")
        members[grid.name] = {}
        for axes, level in grid.cells():
            settings = {
                "config": merged_config(base, preset, level, data.overrides, grid.name),
                "pool": data.check_pool(level.pool or 1.0, grid.name),
                "data": data.digest,
            }
            name = digest(settings)
            cell = cells.setdefault(name, Cell(name, settings))
            cell.axes.setdefault(grid.name, axes)
            members[grid.name][tuple(axes.values())] = name
    return Plan(tuple(grids), cells, members)


def merged_config(
    base: Mapping[str, Any], preset: Preset, level: Level, of_data: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The base config with the overrides of data, preset, paradigm and level, then the factors.

    Raises:
        UserError: For an unknown paradigm, or a factor on what is no number.
    """
    config = json.loads(json.dumps(base))
    paradigm: Mapping[str, Any] = {}
    if level.paradigm is not None:
        if level.paradigm not in preset.paradigms:
            known = ", ".join(preset.paradigms)
            raise UserError(
                f"grid {where}: preset {preset.name} has no paradigm {level.paradigm!r}; "
                f"it has {known}"
            )
        paradigm = preset.paradigms[level.paradigm]
    for overrides in (of_data, preset.overrides, paradigm, level.overrides):
        for key, value in overrides.items():
            _holder(config, key)[key.split(".")[-1]] = value
    for key, factor in level.scale.items():
        holder, name = _holder(config, key), key.split(".")[-1]
        value = holder.get(name)
        if not isinstance(value, int | float):
            raise UserError(f"grid {where}: scale {key}: its value is {value!r}, no number")
        product = value * factor
        holder[name] = round(product) if isinstance(value, int) else product
    return config


def _holder(config: dict[str, Any], key: str) -> dict[str, Any]:
    for part in key.split(".")[:-1]:
        config = config.setdefault(part, {})
    return config


def cell_folder(out: Path, cell: Cell, seed: int) -> Path:
    """Where a cell's run with one seed lies."""
    return out / "cells" / cell.fingerprint[:_NAME_LENGTH] / f"seed-{seed}"


def make_work(
    cell: Cell, seed: int, out: Path, root: Path, data: StudyData, metrics: Sequence[str]
) -> Work:
    """A cell with one seed as commands; writes the config that they read."""
    folder = cell_folder(out, cell, seed)
    config = folder.parent / "config.yaml"
    if not config.exists():
        write_text(config, yaml.safe_dump(cell.settings["config"], sort_keys=False))
    command = (
        *("bash", str(root / "tools/pretrain.sh"), str(config)),
        *pretrain_overrides(cell, seed, folder, data),
        "--resume",
    )
    run = folder / "run"
    num_workers = int(cell.settings["config"].get("data", {}).get("num_workers", 2))
    steps = (
        Step("pretrain", command, run / "summary.json"),
        *metric_steps(metrics, folder, root, data, num_workers),
    )
    return Work(
        cell.fingerprint, seed, f"{cell.label}, seed {seed}", steps, folder,
        lambda: read_metrics(metrics, folder),
    )  # fmt: skip


def pretrain_overrides(cell: Cell, seed: int, folder: Path, data: StudyData) -> tuple[str, ...]:
    """What stands on the command line beside the config: seed and paths."""
    shards = [str(path) for path in data.pools[cell.settings["pool"]]]
    return (
        f"seed={seed}",
        f"out={folder / 'run'}",
        f"data.shards={json.dumps(shards)}",
        f"eval.probe_train={data.probe_train}",
        f"eval.probe_val={data.probe_val}",
    )
