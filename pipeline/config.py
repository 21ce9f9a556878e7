"""The pipeline's settings: one strict schema, read from YAML and `key=value` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.config import read_settings
from common.errors import UserError

Arm = Literal["random", "pretrained", "random_frozen", "pretrained_frozen"]
ARMS: tuple[Arm, ...] = ("random", "pretrained", "random_frozen", "pretrained_frozen")
FREE_KEYS = (
    "data.options",
    "shards.options",
    "probes.options",
    "pretrain.overrides",
    "detection.options",
    "detection.overrides",
)
"""Settings that are handed on: what stands below them belongs to the stage's own command line."""


@dataclass(frozen=True)
class DataStageConfig:
    """Where the pictures come from.

    Attributes:
        kind: A generator of `tools/make_dataset.py`, or `existing` for one's own data.
        options: Handed to the generator: `train: 300` becomes `--train 300`.
        dataset: With `existing`: the VOC-layout folder for detection.
        pool: With `existing`: pictures for pretraining (folder, ImageNet tree or VOC devkit).
        pool_split: With `existing`: the split of a VOC devkit that is packed.
        shards: With `existing`: ready shards instead of `pool`.
        probe_train: With `existing`: labelled class folders for the kNN probe's bank.
        probe_val: With `existing`: labelled class folders for the kNN probe's queries.
    """

    kind: Literal["procedural", "photos", "existing"] = "procedural"
    options: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    pool: str | None = None
    pool_split: str | None = None
    shards: str | None = None
    probe_train: str | None = None
    probe_val: str | None = None


@dataclass(frozen=True)
class ShardsConfig:
    """How pictures are packed: options of `tools/make_shards.py`."""

    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PretrainStageConfig:
    """Pretraining: its own YAML and what this pipeline changes in it."""

    config: str = "configs/pretrain/demo.yaml"
    overrides: dict[str, Any] = field(default_factory=dict)


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
        seeds: Seeds per arm: 0, 1, ..., seeds - 1.
        arms: Initialisations; `_frozen` trains the heads on the backbone as it is.
        parallel: How many stages run side by side; `auto` is explained in docs/pipeline.md.
    """

    config: str = "configs/detection/thin_R50_C4.yaml"
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    arms: tuple[Arm, ...] = ARMS
    parallel: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class PipelineConfig:
    """Everything that one run of the pipeline is a function of."""

    name: str
    data: DataStageConfig = DataStageConfig()
    shards: ShardsConfig = ShardsConfig()
    probes: ShardsConfig = ShardsConfig()
    pretrain: PretrainStageConfig = PretrainStageConfig()
    convert: ConvertConfig = ConvertConfig()
    detection: DetectionConfig = DetectionConfig()


def load_config(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline's YAML, apply `key=value` overrides and check both.

    Raises:
        UserError: For an unreadable file, an unknown key or an impossible value; names it.
    """
    config = read_settings(
        PipelineConfig, path, overrides, free=FREE_KEYS,
        pattern="configs/pipeline/smoke.yaml", defaults={"name": path.stem},
    )  # fmt: skip
    problem = _problem(config)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    return config


def _problem(config: PipelineConfig) -> str | None:
    """What the types alone do not refuse."""
    data, detection = config.data, config.detection
    if not config.name or not all(c.isalnum() or c in "-_." for c in config.name):
        return f"name {config.name!r} must consist of letters, digits, '-', '_' and '.'"
    if detection.seeds < 1:
        return f"detection.seeds is {detection.seeds}; at least 1 is needed"
    parallel = detection.parallel
    if parallel != "auto" and (parallel is None or parallel < 1):  # None: jsonargparse lets it by.
        return f"detection.parallel is {parallel}; give auto or a number from 1 on"
    if not detection.arms or len(set(detection.arms)) < len(detection.arms):
        return "detection.arms must name at least one arm, each once"
    own = ("dataset", "pool", "pool_split", "shards", "probe_train", "probe_val")
    given = [name for name in own if getattr(data, name) is not None]
    if data.kind != "existing":
        return f"data.{given[0]} needs data.kind: existing" if given else None
    if data.options:
        return "data.options belong to the generators; data.kind is existing"
    if not data.dataset:
        return "data.kind existing needs data.dataset, the VOC-layout folder for detection"
    if (data.pool is None) == (data.shards is None):
        return "data.kind existing needs either data.pool (pictures) or data.shards (ready shards)"
    if (data.probe_train is None) != (data.probe_val is None):
        return "give both data.probe_train and data.probe_val, or neither"
    for name in given:
        if name != "pool_split" and not Path(getattr(data, name)).exists():
            return f"data.{name}: {getattr(data, name)} does not exist"
    return None
