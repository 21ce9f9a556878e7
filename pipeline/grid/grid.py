"""Grids of pretraining runs: YAML of grids and presets, read strictly, and the cells they span."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.config import check_keys, read_yaml
from common.errors import UserError, require
from pipeline.grid.data import StudyData
from pipeline.stages import digest

METRICS = {"knn": "kNN top-1", "linear": "linear top-1", "online": "online linear top-1"}
_LEVEL_KEYS = {"paradigm", "pool", "scale"}


@dataclass(frozen=True)
class Preset:
    """The scale of a study: base config, data, seeds.

    Attributes:
        name: `reproduce-cpu` or the like.
        base: Pretraining config that every cell changes.
        seeds: How many: 0 .. seeds-1.
        metrics: Of METRICS; the first is the one tables judge by.
        sets: Name -> recipe and options of the data, and `overrides`; the first is the default.
        paradigms: Name -> overrides.
        overrides: For every cell.
        parallel: Runs at once.
        gpus: Of each run.
        max_minutes: Length of a slice; None: to the end.
    """

    name: str
    base: Path
    seeds: int
    metrics: tuple[str, ...]
    sets: dict[str, dict[str, Any]]
    paradigms: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    parallel: int = 1
    gpus: int = 0
    max_minutes: float | None = None


def read_preset(path: Path) -> Preset:
    """Read a preset; its name is the file's, and `base` is found from its folder.

    Raises:
        UserError: For keys that are missing or unknown, and values that cannot be.
    """
    raw = read_yaml(path)
    known = set(Preset.__dataclass_fields__) - {"name"}
    check_keys(raw, known, {"base", "seeds", "metrics", "sets"}, str(path))
    base = path.parent / str(raw["base"])
    require(base.is_file(), f"{path}: base {raw['base']!r}: {base} does not exist")
    for name, least in (("seeds", 1), ("parallel", 1), ("gpus", 0)):
        value = raw.get(name, least)
        is_good = isinstance(value, int) and value >= least
        require(is_good, f"{path}: {name} is {value!r}; give a whole number from {least} on")
    metrics = raw["metrics"]
    is_good = isinstance(metrics, list) and all(str(name) in METRICS for name in metrics)
    is_good = is_good and len(metrics) > 0
    require(is_good, f"{path}: metrics {metrics!r}: give a list of some of {', '.join(METRICS)}")
    check_keys(raw["sets"], None, set(), f"{path}: sets")
    require(len(raw["sets"]) > 0, f"{path}: sets is empty: name at least one set of data")
    for name, options in raw["sets"].items():
        check_keys(options, None, {"recipe"}, f"{path}: sets.{name}")
    return Preset(**raw | {"name": path.stem, "base": base, "metrics": tuple(metrics)})


@dataclass(frozen=True)
class Level:
    """One value of an axis, or several of them merged: what it changes in the base config.

    Attributes:
        overrides: Dotted key -> value.
        paradigm: Name of the preset's overrides that come first, or None.
        pool: Share of the pretraining pool, 0..1; None is all of it.
        scale: Dotted key -> factor on the value that the key has in the end.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    paradigm: str | None = None
    pool: float | None = None
    scale: dict[str, float] = field(default_factory=dict)

    def merged(self, other: Level, where: str) -> Level:
        """Both together.

        Raises:
            UserError: If both set the same thing.
        """
        twice = [*(self.overrides.keys() & other.overrides), *(self.scale.keys() & other.scale)]
        for name in ("paradigm", "pool"):
            if getattr(self, name) and getattr(other, name):
                twice.append(name)
        if twice:
            raise UserError(f"{where}: two axes set {twice[0]}; one of them must leave it alone")
        return Level(
            self.overrides | other.overrides,
            self.paradigm or other.paradigm,
            self.pool or other.pool,
            self.scale | other.scale,
        )


@dataclass(frozen=True)
class Comparison:
    """What a table compares: (weight, axes of a cell) terms; `decides` its claim or not."""

    name: str
    terms: tuple[tuple[float, dict[str, str]], ...]
    decides: bool


@dataclass(frozen=True)
class Grid:
    """One table: axes of named levels, cells that are left out, comparisons.

    Attributes:
        name: Letters, digits, `_` and `-`: names of files are made of it.
        claim: What the paper says, in one sentence.
        axes: Axis -> level -> what it changes.
        left_out: (axes of the cells, reason).
        comparisons: All of cells of this grid.
    """

    name: str
    title: str
    claim: str
    axes: dict[str, dict[str, Level]]
    left_out: tuple[tuple[dict[str, str], str], ...]
    comparisons: tuple[Comparison, ...]

    def cells(self) -> list[tuple[dict[str, str], Level]]:
        """The cells that are run: ({axis: level}, all that they change)."""
        found = []
        for names in itertools.product(*self.axes.values()):
            axes = dict(zip(self.axes, names, strict=True))
            if self.reason_left_out(axes) is None:
                merged = Level()
                for axis, name in axes.items():
                    merged = merged.merged(self.axes[axis][name], f"grid {self.name}")
                found.append((axes, merged))
        return found

    def reason_left_out(self, axes: Mapping[str, str]) -> str | None:
        """Why a cell is not run; None if it is."""
        for pattern, reason in self.left_out:
            if all(axes[axis] == level for axis, level in pattern.items()):
                return reason
        return None


def read_grid(path: Path, preset: str) -> Grid:
    """Read a grid as a preset runs it: `left_out` entries may name the preset that they hold for.

    Raises:
        UserError: For keys that are missing or unknown, and names that nothing defines.
    """
    raw = read_yaml(path)
    needed = {"title", "claim", "axes", "comparisons"}
    check_keys(raw, needed | {"left_out"}, needed, str(path))
    is_plain = path.stem.replace("-", "").replace("_", "").isalnum()
    require(is_plain, f"{path}: name the file with letters, digits, _ and - only")
    check_keys(raw["axes"], None, set(), f"{path}: axes")
    axes: dict[str, dict[str, Level]] = {}
    for axis, levels in raw["axes"].items():
        check_keys(levels, None, set(), f"{path}: {axis}")
        require(len(levels) > 0, f"{path}: {axis} is empty")
        axes[axis] = {str(n): _level(v, f"{path}: {axis}: {n}") for n, v in levels.items()}
    require(len(axes) > 0, f"{path}: axes is empty")
    for key in ("left_out", "comparisons"):
        value = raw.setdefault(key, [])
        require(isinstance(value, list), f"{path}: {key} is {value!r} where a list is expected")

    left_out = []
    for entry in raw["left_out"]:
        where = f"{path}: left_out"
        check_keys(entry, {"cells", "reason", "preset"}, {"cells", "reason"}, where)
        if entry.get("preset", preset) == preset:
            left_out.append((_cell_axes(entry["cells"], axes, where), entry["reason"]))
    grid = Grid(path.stem, raw["title"], raw["claim"], axes, tuple(left_out), ())
    comparisons = [_comparison(entry, axes, f"{path}: comparisons") for entry in raw["comparisons"]]
    # A comparison with a cell that this preset leaves out is left out with it.
    kept = [
        comparison
        for comparison in comparisons
        if all(grid.reason_left_out(cell) is None for _, cell in comparison.terms)
    ]
    return replace(grid, comparisons=tuple(kept))


def _level(raw: Any, where: str) -> Level:
    raw = {} if raw is None else raw
    check_keys(raw, None, set(), where)
    pool = raw.get("pool")
    if pool is not None and not (isinstance(pool, int | float) and 0 < pool <= 1):
        raise UserError(f"{where}: pool is {pool!r}; give a share above 0, up to 1")
    overrides = {key: value for key, value in raw.items() if key not in _LEVEL_KEYS}
    return Level(overrides, raw.get("paradigm"), pool, dict(raw.get("scale", {})))


def _comparison(entry: dict[str, Any], axes: Mapping[str, Any], where: str) -> Comparison:
    """Read {name, treated, control, minus: {treated, control}, decides}."""
    needed = {"name", "treated", "control"}
    check_keys(entry, needed | {"minus", "decides"}, needed, where)
    where = f"{where}: {entry['name']}"
    pairs = [(1.0, entry)]
    if "minus" in entry:
        check_keys(entry["minus"], {"treated", "control"}, {"treated", "control"}, where)
        pairs.append((-1.0, entry["minus"]))
    terms = []
    for sign, pair in pairs:
        for weight, side in ((sign, "treated"), (-sign, "control")):
            cell = _cell_axes(pair[side], axes, where)
            missing = [axis for axis in axes if axis not in cell]
            require(not missing, f"{where}: {side} names no level of {', '.join(missing)}")
            terms.append((weight, cell))
    return Comparison(str(entry["name"]), tuple(terms), bool(entry.get("decides", True)))


def _cell_axes(raw: Any, axes: Mapping[str, Mapping[str, Level]], where: str) -> dict[str, str]:
    check_keys(raw, set(axes), set(), where)
    cell = {axis: str(level) for axis, level in raw.items()}
    for axis, level in cell.items():
        known = ", ".join(axes[axis])
        require(level in axes[axis], f"{where}: {axis} has no level {level!r}; it has {known}")
    return cell


# -- from grids and a preset to cells -------------------------------------------------------------


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
    plan = Plan(tuple(grids), {}, {})
    for grid in grids:
        require(grid.name not in plan.members, f"two grids are called {grid.name}; rename one file")
        plan.members[grid.name] = {}
        for axes, level in grid.cells():
            settings = {
                "config": merged_config(base, preset, level, data.overrides, grid.name),
                "pool": data.check_pool(level.pool or 1.0, grid.name),
                "data": data.digest,
            }
            name = digest(settings)
            cell = plan.cells.setdefault(name, Cell(name, settings))
            cell.axes.setdefault(grid.name, axes)
            plan.members[grid.name][tuple(axes.values())] = name
    return plan


def merged_config(
    base: Mapping[str, Any], preset: Preset, level: Level, of_data: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The base config with the overrides of data, preset, paradigm and level, then the factors.

    Raises:
        UserError: For an unknown paradigm, or a factor on what is no number.
    """
    config = json.loads(json.dumps(base))

    def section(key: str) -> dict[str, Any]:
        node = config
        for part in key.split(".")[:-1]:
            node = node.setdefault(part, {})
        return node

    paradigm: Mapping[str, Any] = {}
    if level.paradigm is not None:
        if level.paradigm not in preset.paradigms:
            raise UserError(
                f"grid {where}: preset {preset.name} has no paradigm {level.paradigm!r}; "
                f"it has {', '.join(preset.paradigms)}"
            )
        paradigm = preset.paradigms[level.paradigm]
    for overrides in (of_data, preset.overrides, paradigm, level.overrides):
        for key, value in overrides.items():
            section(key)[key.split(".")[-1]] = value
    for key, factor in level.scale.items():
        holder, name = section(key), key.split(".")[-1]
        value = holder.get(name)
        if not isinstance(value, int | float):
            raise UserError(f"grid {where}: scale {key}: its value is {value!r}, no number")
        product = value * factor
        holder[name] = round(product) if isinstance(value, int) else product
    return config
