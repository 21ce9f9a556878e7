"""The one schema of a pretraining run: nested frozen dataclasses, YAML and dotted overrides.

Every key is read by code. Unknown keys stop the run and are named; impossible values are refused by
the dataclass that holds them, so that a config that loads is a config that can start.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from pretrain.errors import UserError

AugmentationName = Literal[
    "none", "symmetric_weak", "symmetric_strong", "asymmetric", "asymmetric_strong"
]
FAMethod = Literal["none", "identity", "nn", "mask", "noise", "mixup"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class ArchConfig:
    """A ResNet: depth and widths. ``thin`` R50 is depth 50 with 16, 16, 64."""

    depth: Literal[18, 34, 50] = 50
    width_per_group: int = 64  # channels of the 3x3 convolution in res2
    stem_channels: int = 64
    res2_channels: int = 256  # channels that res2 puts out; doubled per stage

    def __post_init__(self) -> None:
        for name in ("width_per_group", "stem_channels", "res2_channels"):
            value = getattr(self, name)
            _require(value > 0, f"arch.{name} must be positive, got {value}")
        if self.depth in (18, 34):
            _require(
                self.res2_channels == self.width_per_group,
                f"arch: depth {self.depth} has basic blocks, so res2_channels must equal "
                f"width_per_group ({self.width_per_group}), got {self.res2_channels}",
            )
        else:
            _require(
                self.res2_channels % 4 == 0,
                f"arch.res2_channels must be a multiple of 4 at depth 50, got {self.res2_channels}",
            )
            _require(
                256 * self.width_per_group % self.res2_channels == 0,
                f"arch: 256 * width_per_group ({self.width_per_group}) must be a multiple of "
                f"res2_channels ({self.res2_channels}) for depth 50, e.g. 64 and 256, 16 and 64",
            )


@dataclass(frozen=True)
class InitConfig:
    """How weights start."""

    residual_gamma: float = 1.0  # last BN weight of each residual block; see models/backbone.py

    def __post_init__(self) -> None:
        _require(self.residual_gamma >= 0, f"init.residual_gamma: {self.residual_gamma} is < 0")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how two views are made of each."""

    shards: str | None = None  # folder that tools/make_shards.py wrote, or of foreign tars
    image_size: int = 224  # side of a view, pixels
    batch_size: int = 256  # global: over all processes
    augmentation: AugmentationName = "asymmetric"
    shuffle_window: int = 16384  # samples
    num_workers: int = 2  # per process
    max_bad_samples: int = 0  # undecodable pictures tolerated in the whole run
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB, 0..1
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2, f"data.batch_size must be >= 2, got {self.batch_size}")
        _require(self.image_size >= 16, f"data.image_size must be >= 16, got {self.image_size}")
        _require(self.shuffle_window >= 1, f"data.shuffle_window: {self.shuffle_window} is < 1")
        _require(self.num_workers >= 0, f"data.num_workers: {self.num_workers} is < 0")
        _require(self.max_bad_samples >= 0, f"data.max_bad_samples: {self.max_bad_samples} is < 0")
        _require(
            all(s > 0 for s in self.pixel_std),
            f"data.pixel_std must be positive, got {self.pixel_std}",
        )


@dataclass(frozen=True)
class HeadConfig:
    """Projector g and predictor q: MLPs with BN and ReLU between the layers."""

    projector_layers: int = 2
    projector_hidden_dim: int = 4096
    projector_last_bn: bool = False
    predictor_hidden_dim: int = 4096
    output_dim: int = 256

    def __post_init__(self) -> None:
        for name in (
            "projector_layers",
            "projector_hidden_dim",
            "predictor_hidden_dim",
            "output_dim",
        ):
            value = getattr(self, name)
            _require(value >= 1, f"heads.{name} must be >= 1, got {value}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The base objective: a loss and what the target branch is."""

    name: Literal["infonce", "byol"] = "byol"
    temperature: float = 0.2  # infonce only
    ema_tau: float = 0.99  # byol only: tau_0 of the schedule that ends at 1

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"objective.temperature must be > 0, got {self.temperature}")
        _require(0 <= self.ema_tau <= 1, f"objective.ema_tau must be in [0, 1], got {self.ema_tau}")


@dataclass(frozen=True)
class FAConfig:
    """Feature augmentation A of the target features, in the parallel-predictor architecture."""

    method: FAMethod = "nn"
    stop_gradient: bool = True  # on the projected features that A takes; 'none' applies neither
    num_features: int = 1  # N augmented features per sample
    feature_loss: Literal["mean", "free"] = "mean"  # free: the sum over the N terms
    queue_size: int = 65536  # entries of the support queue (nn)
    min_fill: int = 1024  # nn is the identity until the queue holds so many
    top_k: int = 1  # nn: one of the k nearest at random; N > 1 takes the N nearest
    mask_ratio: float = 0.2  # mask: share of dimensions set to zero
    noise_sigma: float = 0.2  # noise: relative to the norm of the feature
    mixup_alpha: float = 1.0  # mixup: l ~ Beta(alpha, alpha), lambda = max(l, 1 - l)

    def __post_init__(self) -> None:
        _require(self.num_features >= 1, f"fa.num_features must be >= 1, got {self.num_features}")
        _require(
            0 <= self.mask_ratio < 1, f"fa.mask_ratio must be in [0, 1), got {self.mask_ratio}"
        )
        _require(self.noise_sigma >= 0, f"fa.noise_sigma must be >= 0, got {self.noise_sigma}")
        _require(self.mixup_alpha > 0, f"fa.mixup_alpha must be > 0, got {self.mixup_alpha}")
        if self.method in ("none", "identity"):
            _require(
                self.num_features == 1,
                f"fa.num_features={self.num_features} needs a method that draws; {self.method!r} "
                "gives the same feature each time",
            )
        if self.method == "nn":
            _require(
                1 <= self.top_k <= self.min_fill <= self.queue_size,
                f"fa: 1 <= top_k ({self.top_k}) <= min_fill ({self.min_fill}) <= queue_size "
                f"({self.queue_size}) must hold",
            )
            _require(
                self.num_features == 1 or self.top_k >= self.num_features,
                f"fa: nn with num_features={self.num_features} takes the N nearest and needs "
                f"top_k >= N, got top_k={self.top_k}",
            )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule. The rate is ``base_lr`` x batch_size / 256, cosine to 0."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    epochs: int = 100
    base_lr: float = 0.45
    momentum: float = 0.9  # lars, sgd
    weight_decay: float = 1e-6  # not applied to biases and normalisation layers
    warmup_epochs: float = 10.0
    lars_eta: float = 1e-3  # trust coefficient

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"optim.epochs must be >= 1, got {self.epochs}")
        _require(0 <= self.momentum < 1, f"optim.momentum must be in [0, 1), got {self.momentum}")
        _require(self.lars_eta > 0, f"optim.lars_eta must be > 0, got {self.lars_eta}")
        _require(self.base_lr > 0, f"optim.base_lr must be > 0, got {self.base_lr}")
        _require(self.weight_decay >= 0, f"optim.weight_decay: {self.weight_decay} is < 0")
        _require(
            0 <= self.warmup_epochs < self.epochs,
            f"optim.warmup_epochs ({self.warmup_epochs}) must be >= 0 and below optim.epochs "
            f"({self.epochs})",
        )


@dataclass(frozen=True)
class EngineConfig:
    """How the loop runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the hardware has it
    channels_last: bool = True
    num_threads: int = 0  # of the CPU; 0 leaves torch's own choice
    log_every_steps: int = 10
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 0  # older ones kept in checkpoints/, newest first

    def __post_init__(self) -> None:
        for name in ("log_every_steps", "checkpoint_every_steps"):
            value = getattr(self, name)
            _require(value >= 1, f"engine.{name} must be >= 1, got {value}")
        _require(self.num_threads >= 0, f"engine.num_threads: {self.num_threads} is < 0")
        _require(
            self.keep_checkpoints >= 0, f"engine.keep_checkpoints: {self.keep_checkpoints} < 0"
        )


@dataclass(frozen=True)
class EvalConfig:
    """The kNN probe on labelled shards, and the pictures that a person looks at."""

    probe_train: str | None = None
    probe_val: str | None = None
    knn_every_epochs: int = 10
    knn_k: int = 20
    knn_temperature: float = 0.07
    image_size: int = 0  # pixels; 0: data.image_size
    num_pictures: int = 8  # rows in the views and neighbours pictures; 0: none

    def __post_init__(self) -> None:
        _require(self.knn_every_epochs >= 1, f"eval.knn_every_epochs: {self.knn_every_epochs} < 1")
        _require(self.knn_k >= 1, f"eval.knn_k must be >= 1, got {self.knn_k}")
        _require(self.knn_temperature > 0, f"eval.knn_temperature: {self.knn_temperature} <= 0")
        _require(
            self.image_size == 0 or self.image_size >= 16,
            f"eval.image_size must be 0 (data.image_size) or >= 16, got {self.image_size}",
        )
        _require(self.num_pictures >= 0, f"eval.num_pictures: {self.num_pictures} is < 0")
        _require(
            (self.probe_train is None) == (self.probe_val is None),
            "eval.probe_train and eval.probe_val go together: give both or neither",
        )


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what a run computes."""

    out: str | None = None
    seed: int = 0
    arch: ArchConfig = field(default_factory=ArchConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    fa: FAConfig = field(default_factory=FAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a YAML file and apply ``key=value`` overrides with dotted keys.

    Raises:
        UserError: File missing, unknown key, or a value that its dataclass refuses.
    """
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist; see configs/pretrain/ for examples")
    arguments = ["--config", str(path)]
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or key.startswith("-") or not key:
            raise UserError(f"override {item!r} is not of the form key=value, e.g. optim.epochs=20")
        arguments.append(f"--{key}={value}")
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PretrainConfig, as_group=False, fail_untyped=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            namespace = parser.parse_args(arguments)
            # The method was renamed in jsonargparse 4.49; older ones know only the second name.
            instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
            values = instantiate(namespace)
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises its own kinds for what a user wrote
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        raise UserError(f"{path}: {_one_line(cause)}") from None
    return PretrainConfig(**{name: values[name] for name in PretrainConfig.__dataclass_fields__})


def to_plain(config: PretrainConfig) -> dict[str, Any]:
    """The config as nested dicts of plain types, as it stands in checkpoints and YAML."""
    plain = asdict(config)
    plain["data"]["pixel_mean"] = list(config.data.pixel_mean)
    plain["data"]["pixel_std"] = list(config.data.pixel_std)
    return plain


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
