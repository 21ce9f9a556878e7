"""Grids and presets of studies: YAML files, read strictly, and the cells that they span."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import check_keys, read_yaml
from common.errors import UserError

_LEVEL_KEYS = {"paradigm", "pool", "scale"}
METRICS = {"knn": "kNN top-1", "linear": "linear top-1", "online": "online linear top-1"}


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
        twice = [key for key in other.overrides if key in self.overrides]
        twice += [key for key in other.scale if key in self.scale]
        for name in ("paradigm", "pool"):
            if None not in (getattr(self, name), getattr(other, name)):
                twice.append(name)
        if twice:
            raise UserError(f"{where}: two axes set {twice[0]}; one of them must leave it alone")
        return Level(
            {**self.overrides, **other.overrides},
            self.paradigm if other.paradigm is None else other.paradigm,
            self.pool if other.pool is None else other.pool,
            {**self.scale, **other.scale},
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
        parallel: Cells at once.
        gpus: Of each cell.
        max_minutes: Length of a slice; None: to the end.
    """

    name: str
    base: Path
    seeds: int
    metrics: tuple[str, ...]
    sets: dict[str, dict[str, Any]]
    paradigms: dict[str, dict[str, Any]]
    overrides: dict[str, Any]
    parallel: int = 1
    gpus: int = 0
    max_minutes: float | None = None


def read_preset(path: Path) -> Preset:
    """Read a preset; its name is the file's.

    Raises:
        UserError: For keys that are missing or unknown, and values that cannot be.
    """
    raw = read_yaml(path)
    known = set(Preset.__dataclass_fields__) - {"name"}
    check_keys(raw, known, {"base", "seeds", "metrics", "sets"}, str(path))
    base = path.parent / str(raw["base"])
    if not base.is_file():
        raise UserError(f"{path}: base {raw['base']!r}: {base} does not exist")
    for name, least in (("seeds", 1), ("parallel", 1), ("gpus", 0)):
        value = raw.get(name, least)
        if not isinstance(value, int) or value < least:
            raise UserError(f"{path}: {name} is {value!r}; give a whole number from {least} on")
    metrics = _entries(raw, "metrics", str(path))
    if not metrics or any(name not in METRICS for name in metrics):
        raise UserError(f"{path}: metrics {metrics!r}: give some of {', '.join(METRICS)}")
    check_keys(raw["sets"], None, set(), f"{path}: sets")
    if not raw["sets"]:
        raise UserError(f"{path}: sets is empty: name at least one set of data")
    for name, options in raw["sets"].items():
        check_keys(options, None, {"recipe"}, f"{path}: sets.{name}")
    values: dict[str, Any] = {"paradigms": {}, "overrides": {}} | raw
    return Preset(**values | {"name": path.stem, "base": base, "metrics": tuple(raw["metrics"])})


def read_grid(path: Path, preset: str) -> Grid:
    """Read a grid as a preset runs it: `left_out` entries may name the preset that they hold for.

    Raises:
        UserError: For keys that are missing or unknown, and names that nothing defines.
    """
    raw = read_yaml(path)
    keys = {"title", "claim", "axes", "left_out", "comparisons"}
    check_keys(raw, keys, {"title", "claim", "axes", "comparisons"}, str(path))
    if not path.stem.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"{path}: name the file with letters, digits, _ and - only")
    check_keys(raw["axes"], None, set(), f"{path}: axes")
    for where, value in (("axes", raw["axes"]), *raw["axes"].items()):
        check_keys(value, None, set(), f"{path}: {where}")
        if not value:
            raise UserError(f"{path}: {where} is empty")
    axes = {
        axis: {str(name): _level(level, f"{path}: {axis}: {name}") for name, level in names.items()}
        for axis, names in raw["axes"].items()
    }
    left_out = []
    for entry in _entries(raw, "left_out", str(path)):
        check_keys(entry, {"cells", "reason", "preset"}, {"cells", "reason"}, f"{path}: left_out")
        if entry.get("preset", preset) == preset:
            left_out.append((_axes(entry["cells"], axes, f"{path}: left_out"), entry["reason"]))
    grid = Grid(path.stem, raw["title"], raw["claim"], axes, tuple(left_out), ())
    comparisons = []
    for entry in _entries(raw, "comparisons", str(path)):
        comparison = _comparison(entry, grid, path)
        # A comparison with a cell that this preset leaves out is left out with it.
        if all(grid.reason_left_out(cell) is None for _, cell in comparison.terms):
            comparisons.append(comparison)
    return Grid(path.stem, raw["title"], raw["claim"], axes, tuple(left_out), tuple(comparisons))


def _entries(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = raw.get(key, [])
    if not isinstance(value, list):
        raise UserError(f"{where}: {key} is {value!r} where a list is expected")
    return value


def _level(raw: Any, where: str) -> Level:
    raw = {} if raw is None else raw
    check_keys(raw, None, set(), where)
    overrides = {key: value for key, value in raw.items() if key not in _LEVEL_KEYS}
    pool = raw.get("pool")
    if pool is not None and not (isinstance(pool, int | float) and 0 < pool <= 1):
        raise UserError(f"{where}: pool is {pool!r}; give a share above 0, up to 1")
    return Level(overrides, raw.get("paradigm"), pool, dict(raw.get("scale", {})))


def _comparison(entry: dict[str, Any], grid: Grid, path: Path) -> Comparison:
    """Read {name, treated, control, minus: {treated, control}, decides}."""
    where = f"{path}: comparisons"
    check_keys(
        entry,
        {"name", "treated", "control", "minus", "decides"},
        {"name", "treated", "control"},
        where,
    )
    where = f"{where}: {entry['name']}"
    pairs = [(1.0, entry)]
    if "minus" in entry:
        check_keys(entry["minus"], {"treated", "control"}, {"treated", "control"}, where)
        pairs.append((-1.0, entry["minus"]))
    terms = []
    for sign, pair in pairs:
        for weight, side in ((sign, "treated"), (-sign, "control")):
            cell = _axes(pair[side], grid.axes, where)
            missing = [axis for axis in grid.axes if axis not in cell]
            if missing:
                raise UserError(f"{where}: {side} names no level of {missing[0]}")
            terms.append((weight, cell))
    return Comparison(str(entry["name"]), tuple(terms), bool(entry.get("decides", True)))


def _axes(raw: Any, axes: Mapping[str, Mapping[str, Level]], where: str) -> dict[str, str]:
    check_keys(raw, set(axes), set(), where)
    cell = {axis: str(level) for axis, level in raw.items()}
    for axis, level in cell.items():
        if level not in axes[axis]:
            raise UserError(
                f"{where}: {axis} has no level {level!r}; it has {', '.join(axes[axis])}"
            )
    return cell
