"""Studies: grids of pretraining runs, and trials of given weights, as an experiment.

A grid is a YAML of axes of named levels whose combinations are variants; it is one table with a
claim. A preset is the scale at which grids are run. Trials are detectors trained from several
given weights over seeds.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.config import check_keys, dotted, read_settings, read_yaml
from common.errors import UserError, require
from pipeline import config as schema
from pipeline.plan import digest
from pipeline.results import METRICS as DETECTION_METRICS

METRICS = ("knn", "linear")
NAME_LENGTH = 12  # of a cell's hash
_TREATED, _CONTROL = "treated", "control"


@dataclass(frozen=True)
class Preset:
    """The scale of a study.

    Attributes:
        base: Pretraining config that every cell changes; relative to the preset.
        seeds: How many.
        first_seed: The lowest of them.
        metrics: Of METRICS.
        sets: Name -> `data` of an experiment, and `overrides`; the first is the default.
        paradigms: Name -> overrides.
        overrides: For every cell.
        parallel: Stages side by side.
        gpus: Of each job of a cluster.
        max_minutes: Length of a call; None: to the end.
    """

    base: str
    seeds: int
    metrics: tuple[Literal["knn", "linear"], ...]
    sets: dict[str, dict[str, Any]]
    paradigms: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    parallel: int = 1
    first_seed: int = 0
    gpus: int = 0
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        require(min(self.seeds, self.parallel) >= 1, "seeds, parallel: give 1 or more")
        require(len(self.metrics) > 0, f"metrics is empty: give some of {', '.join(METRICS)}")
        require(len(self.sets) > 0, "sets is empty: name at least one set of data")


def make_config(
    grids: Sequence[Path], preset: Preset, path: Path, data: str
) -> schema.PipelineConfig:
    """The cells of some grids as an experiment; cells that come to the same are one variant.

    Args:
        grids: Their files.
        preset: The scale.
        path: Of the preset.
        data: Which of its sets.
    Raises:
        UserError: For what the files define wrongly or not at all.
    """
    base = path.parent / preset.base
    of_set: dict[str, Any] = dict(preset.sets[data])
    # What changes the base config for all cells.
    own = of_set.pop("overrides", {})
    check_keys(own, None, set(), f"{path}: sets.{data}.overrides")
    changes = dotted(own) | preset.overrides
    check_keys(
        of_set, set(schema.DataStageConfig.__dataclass_fields__), {"kind"}, f"{path}: sets.{data}"
    )
    variants: dict[str, dict[str, Any]] = {}
    tables = []
    for grid in grids:
        try:
            cells = _read_grid(grid, path.stem, preset, dotted(read_yaml(base)), changes, variants)
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{grid}: a value is of another kind than a grid holds there ({error}); see "
                "configs/studies/"
            ) from error
        tables.append(cells)
    names = [table.name for table in tables]
    require(len(set(names)) == len(names), f"two grids have one name ({names}); rename a file")
    try:
        words = [f"{key}={json.dumps(value)}" for key, value in of_set.items()]  # JSON is YAML, too
        config = schema.PipelineConfig(
            name=f"{path.stem}-{data}",
            data=read_settings(schema.DataStageConfig, None, words),
            pretrain=schema.PretrainStageConfig(str(base.resolve()), side_by_side=True),
            variants=variants,
            seeds=schema.SeedsConfig(preset.seeds, preset.first_seed),
            evaluations=preset.metrics,
            tables=tuple(tables),
        )
        return schema.check_config(config)
    except UserError as error:
        raise UserError(f"{path}: sets.{data}: {error}") from None


def _read_grid(
    path: Path, preset_name: str, preset: Preset, base: dict[str, Any], changes: dict[str, Any],
    variants: dict[str, dict[str, Any]],
) -> schema.TableConfig:  # fmt: skip
    """Read a grid as a preset runs it, and enter its cells among the variants.

    `left_out` entries may name the preset that they hold for; comparisons with a cell that is left
    out are left out with it.
    """
    raw = read_yaml(path)
    needed = {"title", "claim", "axes", "comparisons"}
    check_keys(raw, needed | {"left_out"}, needed, str(path))
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    check_keys(raw["axes"], None, set(), f"{path}: axes")
    for axis, levels in raw["axes"].items():
        check_keys(levels, None, set(), f"{path}: {axis}")
        require(len(levels) > 0, f"{path}: {axis} is empty")
        axes[axis] = {str(name): dict(level or {}) for name, level in levels.items()}

    def levels_of(cell: Any, where: str) -> dict[str, str]:
        check_keys(cell, set(axes), set(), where)
        named = {axis: str(level) for axis, level in cell.items()}
        for axis, level in named.items():
            known = ", ".join(axes[axis])
            require(level in axes[axis], f"{where}: {axis} has no level {level!r}; it has {known}")
        return named

    left_out: dict[str, str] = {}
    patterns = []
    for entry in raw.get("left_out") or []:
        check_keys(entry, {"cells", "reason", "preset"}, {"cells", "reason"}, f"{path}: left_out")
        if entry.get("preset", preset_name) == preset_name:
            patterns.append(levels_of(entry["cells"], f"{path}: left_out"))
            left_out[", ".join(patterns[-1].values())] = entry["reason"]

    # The cells: all levels of a combination together change the base config.
    cells: dict[tuple[str, ...], str] = {}
    for names in itertools.product(*axes.values()):
        chosen = dict(zip(axes, names, strict=True))
        if any(pattern.items() <= chosen.items() for pattern in patterns):
            continue
        level: dict[str, Any] = {}
        for axis, name in chosen.items():
            for key, value in axes[axis][name].items():
                require(key not in level, f"{path}: two axes set {key}; one must leave it alone")
                level[key] = value
        merged = dict(base) | changes
        pool, scale, paradigm = (level.pop(key, None) for key in ("pool", "scale", "paradigm"))
        if paradigm is not None:
            known = ", ".join(preset.paradigms)
            text = f"{path}: preset {preset_name} has no paradigm {paradigm!r}; it has {known}"
            require(paradigm in preset.paradigms, text)
            merged |= preset.paradigms[paradigm]
        merged |= level
        for key, factor in (scale or {}).items():
            value = merged.get(key)
            if not isinstance(value, int | float):
                raise UserError(f"{path}: scale {key}: its value is {value!r}, no number")
            merged[key] = round(value * factor) if isinstance(value, int) else value * factor
        # The name follows from what decides the result: grids may be added and reordered.
        name = digest({"config": merged, "pool": pool or 1.0})[:NAME_LENGTH]
        cells[names] = name
        overrides = {key: value for key, value in merged.items() if base.get(key) != value}
        label = ", ".join(names)
        variants.setdefault(name, {"overrides": overrides, "pool": pool or 1.0, "label": label})

    comparisons = []
    for entry in raw["comparisons"]:
        sides = {_TREATED, _CONTROL}
        check_keys(entry, {"name", *sides, "minus", "decides"}, {"name", *sides}, f"{path}")
        where = f"{path}: comparison {entry['name']!r}"
        terms: dict[str, float] = defaultdict(float)  # both differences may share a cell
        is_whole = True
        for sign, pair in ((1.0, entry), (-1.0, entry.get("minus"))):
            if pair is None:
                continue
            check_keys(pair, None, sides, where)
            for weight, side in ((sign, _TREATED), (-sign, _CONTROL)):
                levels = levels_of(pair[side], where)
                missing = ", ".join(axis for axis in axes if axis not in levels)
                require(not missing, f"{where}: {side} names no level of {missing}")
                cell = cells.get(tuple(levels[axis] for axis in axes))
                is_whole &= cell is not None
                terms[str(cell)] += weight
        if is_whole:
            decides = bool(entry.get("decides", True))
            comparisons.append(schema.Comparison(str(entry["name"]), dict(terms), decides))
    rows = {", ".join(names): name for names, name in cells.items()}
    return schema.TableConfig(
        path.stem, tuple(comparisons), rows, raw["title"], raw["claim"], left_out
    )


def chosen_variants(config: schema.PipelineConfig, texts: Sequence[str]) -> Mapping[str, bool]:
    """Return for each variant whether its table or its levels hold one of some texts."""
    found = dict.fromkeys(config.all_variants, False)
    for table in config.tables:
        for label, variant in table.rows.items():
            found[variant] |= any(text in name for text in texts for name in (table.name, label))
    return found


# -- trials ---------------------------------------------------------------------------------------


def trials_config(
    inits: Sequence[str], control: str | None, compare: Sequence[str], seeds: int, config: Path,
    data: str, words: Sequence[str],
) -> schema.PipelineConfig:  # fmt: skip
    """Detectors trained from given weights, each compared with the control.

    `{seed}` in the name of weights or of the data set stands for the seed: then each seed has its
    own pretraining run or its own split, and the spread over seeds covers that as well.

    Args:
        inits: "random" or "NAME=FILE".
        control: The one that all are compared with; None: the first.
        compare: Further comparisons, "A:B".
        seeds: How many.
        config: Detectron2's YAML.
        data: The labelled set.
        words: Further words for tools/train_voc.sh.
    Raises:
        UserError: For names or files that there are not.
    """
    variants: dict[str, dict[str, str]] = {}
    for word in inits:
        name, separator, file = word.partition("=")
        if not name or (not separator and name != schema.RANDOM):
            raise UserError(f"--init {word!r}: give NAME=FILE, or random")
        require(name not in variants, f"--init {name}: comes twice; choose another name")
        variants[name] = {"weights": file if separator else schema.RANDOM}
    known, control = ", ".join(variants), control or next(iter(variants))
    require(control in variants, f"--control {control}: give one of {known}")
    pairs = [(name, control) for name in variants if name != control]
    for word in compare:
        treated, _, other = word.partition(":")
        is_pair = treated in variants and other in variants and treated != other
        require(is_pair, f"--compare {word}: give A:B with two different ones of {known}")
        pairs.append((treated, other))
    comparisons = {f"{a} - {b}": schema.Comparison(f"{a} - {b}", {a: 1, b: -1}) for a, b in pairs}
    return schema.check_config(
        schema.PipelineConfig(
            name="trials",
            data=schema.DataStageConfig(kind="existing", dataset=data),
            variants=dict(variants),
            evaluations=("detection",),
            detection=schema.DetectionConfig(
                str(config), words=tuple(words), seeds=seeds, arms=tuple(variants)
            ),
            comparisons=tuple(comparisons.values()),
        )
    )


def read_published(path: Path) -> dict[str, Any]:
    """Published rows with their sources: `protocol`, and `rows` with `init`, metrics, `source`.

    Raises:
        UserError: If the file is not of the right form.
    """
    raw = read_yaml(path)
    check_keys(raw, {"protocol", "rows"}, {"protocol", "rows"}, str(path))
    require(isinstance(raw["rows"], list), f"{path}: rows is {raw['rows']!r}; give a list")
    for row in raw["rows"]:
        known = {"init", "source", "recalled", *DETECTION_METRICS}
        check_keys(row, known, {"init", "source"}, f"{path}: rows")
    return raw
