"""The settings of an experiment: one strict schema, read from YAML and `key=value` overrides.

An experiment is data, variants (pretraining configs, given weights, or random ones), seeds,
evaluations and comparisons. `tools/run_pipeline.py` reads one from a file; `tools/ablate.py` and
`tools/run_trials.py` make one from their arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from common.config import check_keys, dotted, read_settings
from common.errors import UserError, at_least, require

RANDOM = "random"
FROZEN = "_frozen"
"""Ending of an arm whose heads are trained on the backbone as it is."""
ARMS = (RANDOM, "pretrained", RANDOM + FROZEN, "pretrained" + FROZEN)
"""The arms of an experiment that names no variants of its own."""
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_STAGES = ("data", "shards", "probe_train", "probe_val", "pretrain", "linear", "convert", "report")

Evaluation = Literal["knn", "linear", "detection"]


@dataclass(frozen=True)
class DataStageConfig:
    """Where the pictures come from.

    Attributes:
        kind: A generator of `tools/make_dataset.py`, or `existing` for one's own data.
        options: Handed to the generator: `train: 300` becomes `--train 300`.
        shares: Parts of the pool below 1 that variants ask for, ascending, as [0.1, 0.25].
        dataset: With `existing`: labelled pictures for detection (docs/data.md); `{seed}` in it
            stands for the seed.
        pool: With `existing`: pictures for pretraining (folder, ImageNet tree or VOC devkit).
        pool_split: With `existing`: the split of a VOC devkit that is packed.
        shards: With `existing`: ready shards instead of `pool`.
        probe_train: With `existing`: labelled class folders, or ready shards, for the probe's bank.
        probe_val: With `existing`: the same for the probe's queries.
    """

    kind: Literal["procedural", "photos", "letters", "fashion", "existing"] = "procedural"
    options: dict[str, Any] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    dataset: str | None = None
    pool: str | None = None
    pool_split: str | None = None
    shards: str | None = None
    probe_train: str | None = None
    probe_val: str | None = None


@dataclass(frozen=True)
class ShardsConfig:
    """How pictures are packed: options of `tools/make_shards.py`; of probes `labels: folders`."""

    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PretrainStageConfig:
    """Pretraining: its own YAML and what this experiment changes in it, for all variants.

    `side_by_side`: runs share the slots and cores of `detection.parallel`, instead of one at a time
    with all cores.
    """

    config: str = "configs/pretrain/demo.yaml"
    overrides: dict[str, Any] = field(default_factory=dict)
    side_by_side: bool = False


@dataclass(frozen=True)
class ConvertConfig:
    """Conversion: which network of the checkpoint, and the file's format."""

    branch: Literal["online", "ema"] = "online"
    format: Literal["pkl", "pth"] = "pkl"


@dataclass(frozen=True)
class DetectionConfig:
    """Detection: one config and one budget for all arms.

    Attributes:
        config: Detectron2's YAML.
        options: Options of `tools/train_voc.sh`, the same for every arm.
        overrides: Detectron2's KEY VALUE pairs, the same for every arm.
        words: Further words for `tools/train_voc.sh`, as they are.
        seeds: Seeds per arm: 0, 1, ..., seeds - 1.
        arms: Names of variants, `_frozen` after them for a backbone that stays as it is; null: all.
        parallel: How many stages run side by side; `auto` is explained in docs/pipeline.md.
    """

    config: str = "configs/detection/thin_R50_C4.yaml"
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    seeds: int = 1
    arms: tuple[str, ...] | None = None
    parallel: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class SeedsConfig:
    """What a seed covers.

    `pretraining`: null: one pretraining run, and `detection.seeds` seeds of the detector. A number
    N: N seeds, each with a pretraining run and a detector's seed of its own. `first`: the lowest
    seed; settings are chosen on other seeds than those that are reported. `data`: whether each has
    a generated data set of its own, too.
    """

    pretraining: int | None = None
    first: int = 0
    data: bool = False


@dataclass(frozen=True)
class Comparison:
    """A weighted sum of variants, as {fa: 1, base: -1}; `decides` its table's claim or not."""

    name: str
    terms: dict[str, float]
    decides: bool = True


@dataclass(frozen=True)
class TableConfig:
    """Variants beside each other, and their comparisons: the family of Holm's correction.

    Attributes:
        name: Letters, digits, `_` and `-`.
        comparisons: Of variants among the rows.
        rows: Label -> variant.
        title: A heading.
        claim: What the deciding comparisons tell, in one sentence.
        left_out: Label of rows that are not run -> reason.
    """

    name: str
    comparisons: tuple[Comparison, ...]
    rows: dict[str, str]
    title: str = ""
    claim: str = ""
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One way to come by a backbone.

    Attributes:
        name: In tables and folders.
        config: The YAML of its pretraining; None: the experiment's.
        overrides: Dotted keys; they follow those of the experiment.
        pool: Share of the pool.
        weights: None: pretrained here. `random`, or a file; `{seed}` in it stands for the seed.
        label: In messages.
    """

    name: str
    config: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    pool: float = 1.0
    weights: str | None = None
    label: str = ""


@dataclass(frozen=True)
class PipelineConfig:
    """Everything that one experiment is a function of.

    `variants` is {name: {config, overrides, pool, weights, label}}; null: `random` and
    `pretrained`. `comparisons` make one table of all variants; studies have several `tables`.
    `question` is what the deciding comparisons answer: the heading of the page.
    """

    name: str = ""  # default: that of the file
    data: DataStageConfig = DataStageConfig()
    shards: ShardsConfig = ShardsConfig()
    probes: ShardsConfig = ShardsConfig()
    pretrain: PretrainStageConfig = PretrainStageConfig()
    variants: dict[str, Any] | None = None
    seeds: SeedsConfig = SeedsConfig()
    evaluations: tuple[Evaluation, ...] = ("knn", "detection")
    convert: ConvertConfig = ConvertConfig()
    detection: DetectionConfig = DetectionConfig()
    question: str = ""
    comparisons: tuple[Comparison, ...] = ()
    tables: tuple[TableConfig, ...] = ()

    @property
    def all_variants(self) -> dict[str, Variant]:
        """The variants by name, in their order."""
        if self.variants is None:
            return {RANDOM: Variant(RANDOM, weights=RANDOM), "pretrained": Variant("pretrained")}
        return {name: Variant(name, **(raw or {})) for name, raw in self.variants.items()}

    @property
    def all_seeds(self) -> range:
        """The seeds of the detector, and of pretraining where it has some."""
        first = self.seeds.first
        return range(first, first + (self.seeds.pretraining or self.detection.seeds))

    @property
    def all_tables(self) -> tuple[TableConfig, ...]:
        """The tables of studies, or that of the comparisons."""
        if self.tables or not self.comparisons:
            return self.tables
        rows = {name: name for name in (*self.all_variants, *self.arms)}
        return (TableConfig(self.name, self.comparisons, rows),)

    @property
    def arms(self) -> tuple[str, ...]:
        """Variants whose detector is trained, `_frozen` behind those with a frozen backbone."""
        if "detection" not in self.evaluations:
            return ()
        names = tuple(self.all_variants)
        return self.detection.arms or (*names, *(name + FROZEN for name in names))


def load_config(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read an experiment's YAML, apply `key=value` overrides and check both.

    Raises:
        UserError: For an unreadable file, an unknown key or an impossible value; names it.
    """
    config = read_settings(PipelineConfig, path, overrides)
    # jsonargparse checks dataclasses within a tuple, but does not make them where it has a default.
    comparisons = (Comparison(**vars(item)) for item in config.comparisons)
    try:
        require(not config.tables, "tables are for studies; give comparisons")
        name = config.name or path.stem
        return check_config(replace(config, name=name, comparisons=tuple(comparisons)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_config(config: PipelineConfig) -> PipelineConfig:
    """Refuse what the types alone do not; returns the config with flat overrides of the variants.

    Raises:
        UserError: Naming the key.
    """
    data, detection = config.data, config.detection
    require(
        _NAME.fullmatch(config.name) is not None,
        f"name {config.name!r} must consist of letters, digits, '-', '_' and '.'",
    )
    at_least(detection, "detection", seeds=1)
    at_least(config.seeds, "seeds", pretraining=1, first=0)
    parallel = detection.parallel
    if parallel != "auto" and parallel < 1:
        raise UserError(f"detection.parallel is {parallel}; give auto or a number from 1 on")
    config = _checked_variants(config)
    variants = config.all_variants
    arms, known = detection.arms, [*variants, *(name + FROZEN for name in variants)]
    if arms is not None:
        require(len(set(arms)) == len(arms) > 0, "detection.arms: name at least one, each once")
        for arm in arms:
            require(arm in known, f"detection.arms: no arm {arm!r}; there are {', '.join(known)}")
    for item in config.comparisons:
        for name in item.terms:
            known = list(variants)
            require(name in known, f"comparison {item.name!r}: {name!r} is none of {known}")

    # The data.
    require(
        not config.seeds.data
        or (data.kind not in ("existing", "fashion") and config.seeds.pretraining is not None),
        "seeds.data needs a generated set with a split (data.kind) and seeds.pretraining",
    )
    own = ("dataset", "pool", "pool_split", "shards", "probe_train", "probe_val")
    given = [name for name in own if getattr(data, name) is not None]
    shares = list(data.shares)
    require(
        shares == sorted(set(shares)) and all(0 < share < 1 for share in shares),
        f"data.shares {shares}: give ascending numbers between 0 and 1",
    )
    for variant in variants.values():
        require(
            variant.pool in (*shares, 1),
            f"variant {variant.name}: no pool {variant.pool}; data.shares is {shares}, and 1",
        )
    if data.kind != "existing":
        require(not given, f"data.{(given or [''])[0]} needs data.kind: existing")
        require(
            data.kind != "fashion" or not config.arms,
            "data.kind fashion has no boxes; leave detection out of evaluations",
        )
        return config
    require(not data.options, "data.options belong to the generators; data.kind is existing")
    require(
        not config.arms or data.dataset is not None,
        "data.kind existing needs data.dataset, the labelled pictures for detection",
    )
    if any(variant.weights is None for variant in variants.values()):
        require(
            (data.pool is None) != (data.shards is None),
            "data.kind existing needs either data.pool (pictures) or data.shards (ready shards)",
        )
    require(not shares or data.pool is not None, "data.shares needs data.pool")
    require(
        "linear" not in config.evaluations or data.probe_train is not None,
        "evaluations: linear needs data.probe_train and data.probe_val; give them, or leave it out",
    )
    require(
        (data.probe_train is None) == (data.probe_val is None),
        "give both data.probe_train and data.probe_val, or neither",
    )
    for name in given:
        for seed in config.all_seeds:
            path = getattr(data, name).replace("{seed}", str(seed))
            exists = name == "pool_split" or Path(path).exists()
            require(exists, f"data.{name}: {path} does not exist")
    return config


def _checked_variants(config: PipelineConfig) -> PipelineConfig:
    if config.variants is None:
        return config
    flat: dict[str, Any] = {}
    require(len(config.variants) > 0, "variants is empty; leave it out, or name some")
    fields = set(Variant.__dataclass_fields__) - {"name"}
    for name, raw in config.variants.items():
        where = f"variants.{name}"
        is_good = _NAME.fullmatch(str(name)) is not None and not str(name).endswith(FROZEN)
        is_good &= isinstance(name, str)  # YAML reads 1 as a number
        require(name not in _STAGES, f"{where}: stages are called {name}; choose another name")
        require(is_good, f"{where}: name it with letters, digits, '-', '_' and '.'; not ..{FROZEN}")
        raw = {} if raw is None else dict(raw) if isinstance(raw, dict) else raw
        check_keys(raw, fields, set(), where)
        for key in ("config", "weights", "label"):
            is_text = isinstance(raw.get(key, ""), str | None)
            require(is_text, f"{where}.{key} is {raw.get(key)!r}; it takes text")
        overrides = raw.get("overrides") or {}
        check_keys(overrides, None, set(), f"{where}.overrides")
        raw["overrides"] = dotted(overrides)
        require(
            raw.get("weights") is None or not raw["overrides"],
            f"{where}: weights that are given are not pretrained; leave overrides out",
        )
        flat[name] = raw
    return replace(config, variants=flat)
