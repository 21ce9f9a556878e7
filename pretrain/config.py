"""The one schema of a pretraining run: nested frozen dataclasses, YAML and dotted overrides.

Every key is read by code. Unknown keys stop the run and are named; impossible values are refused by
the dataclass that holds them, so that a config that loads is a config that can start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import read_settings
from common.errors import UserError, require
from pretrain.config_method import (
    FA_PARTNER_LINKS,
    FAConfig,
    HeadConfig,
    ObjectiveConfig,
)
from pretrain.data.order import LastBatch
from pretrain.data.sources.cache import CacheOptions
from pretrain.data.sources.remote import Patience

AugmentationName = Literal[
    "none", "symmetric_weak", "symmetric_strong", "asymmetric", "asymmetric_strong"
]


@dataclass(frozen=True)
class ArchConfig:
    """A ResNet: depth and widths. ``thin`` R50 is depth 50 with 16, 16, 64."""

    depth: Literal[18, 34, 50, 101, 152] = 50
    width_per_group: int = 64  # channels of the 3x3 convolution in res2
    stem_channels: int = 64
    res2_channels: int = 256  # channels that res2 puts out; doubled per stage

    def __post_init__(self) -> None:
        for name in ("width_per_group", "stem_channels", "res2_channels"):
            value = getattr(self, name)
            require(value > 0, f"arch.{name} must be positive, got {value}")
        if self.depth in (18, 34):
            require(
                self.res2_channels == self.width_per_group,
                f"arch: depth {self.depth} has basic blocks, so res2_channels must equal "
                f"width_per_group ({self.width_per_group}), got {self.res2_channels}",
            )
        else:
            require(
                self.res2_channels % 4 == 0,
                f"arch.res2_channels must be a multiple of 4 at depth {self.depth}, "
                f"got {self.res2_channels}",
            )
            require(
                256 * self.width_per_group % self.res2_channels == 0,
                f"arch: 256 * width_per_group ({self.width_per_group}) must be a multiple of "
                f"res2_channels ({self.res2_channels}) for depth {self.depth}, e.g. 64 and 256, "
                "16 and 64",
            )


@dataclass(frozen=True)
class InitConfig:
    """How weights start."""

    residual_gamma: float = 1.0  # last BN weight of each residual block; see models/backbone.py

    def __post_init__(self) -> None:
        require(self.residual_gamma >= 0, f"init.residual_gamma: {self.residual_gamma} is < 0")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how two views are made of each."""

    shards: dict[str, float] | list[str] | str | None = None  # one set; several; {set: weight}
    image_size: int = 224  # side of a view, pixels
    batch_size: int = 256  # global: over all processes
    augmentation: AugmentationName = "asymmetric"
    cache_dir: str | None = None  # of remote shards; null: $XDG_CACHE_HOME/fa-shards
    cache_gb: float = 64.0  # bound of that folder, 10^9 bytes
    read_retries: int = 5  # further tries of a failed read from a server
    read_timeout_seconds: float = 60.0  # without a byte: then a read has failed
    streaming: bool = False  # read tars from front to end, without an index (docs/streaming.md)
    samples_per_epoch: int = 0  # of a stream, whose length is not known; 0 otherwise
    photometric: Literal["auto", "device", "workers"] = "auto"  # where; auto: workers on a CPU
    shuffle_window: int = 16384  # samples; a stream's readers share it
    last_batch: LastBatch = "drop"  # the remainder of an epoch below one batch: drop, or pad
    num_workers: int = 2  # per process
    max_bad_samples: int = 0  # undecodable pictures that each process replaces before it stops
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB, 0..1
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, f"data.batch_size must be >= 2, got {self.batch_size}")
        require(self.image_size >= 16, f"data.image_size must be >= 16, got {self.image_size}")
        require(self.shuffle_window >= 1, f"data.shuffle_window: {self.shuffle_window} is < 1")
        require(self.num_workers >= 0, f"data.num_workers: {self.num_workers} is < 0")
        require(self.max_bad_samples >= 0, f"data.max_bad_samples: {self.max_bad_samples} is < 0")
        require(
            all(s > 0 for s in self.pixel_std),
            f"data.pixel_std must be positive, got {self.pixel_std}",
        )
        require(
            self.streaming == (self.samples_per_epoch > 0),
            f"data.samples_per_epoch ({self.samples_per_epoch}) goes with data.streaming=true, "
            "where it must be positive; an index knows its length: leave it at 0",
        )
        require(
            not self.streaming or self.last_batch == "drop",
            "data.last_batch=pad: a stream has no last batch; use drop",
        )
        _ = self.cache  # it refuses what cannot be

    @property
    def cache(self) -> CacheOptions:
        """How remote shards are fetched and kept."""
        return CacheOptions(
            folder=None if self.cache_dir is None else Path(self.cache_dir),
            max_bytes=round(self.cache_gb * 1e9),
            patience=Patience(self.read_retries, self.read_timeout_seconds),
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule. The rate is ``base_lr`` x batch_size / 256, cosine to 0."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    epochs: int = 100
    base_lr: float = 0.45
    momentum: float = 0.9  # lars, sgd
    weight_decay: float = 1e-6
    head_weight_decay: float | None = None  # of projector and predictor; null: weight_decay
    exclude_bias_and_norm: bool = True  # no decay, no trust ratio there; SimSiam, MoCo: false
    warmup_epochs: float = 10.0
    predictor_constant_lr: bool = False  # SimSiam: the predictor's rate does not follow the cosine
    lars_eta: float = 1e-3  # trust coefficient
    lars_clip: bool = False  # the trust ratio raises no layer's rate above the scheduled one
    micro_batch_size: int = 0  # global; 0: the whole batch in one pass
    accumulation: Literal["plain", "cached"] = "plain"  # how micro-batches make one batch

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"optim.epochs must be >= 1, got {self.epochs}")
        require(0 <= self.momentum < 1, f"optim.momentum must be in [0, 1), got {self.momentum}")
        require(self.lars_eta > 0, f"optim.lars_eta must be > 0, got {self.lars_eta}")
        require(self.base_lr > 0, f"optim.base_lr must be > 0, got {self.base_lr}")
        for name in ("weight_decay", "head_weight_decay"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optim.{name}: {value} is < 0")
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"optim.warmup_epochs ({self.warmup_epochs}) must be >= 0 and below optim.epochs "
            f"({self.epochs})",
        )
        require(
            self.micro_batch_size == 0 or self.micro_batch_size >= 2,
            f"optim.micro_batch_size must be 0 (off) or >= 2, got {self.micro_batch_size}",
        )


@dataclass(frozen=True)
class EngineConfig:
    """How the loop runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where it is native
    min_loss_scale: float = 1.0  # fp16: the run stops where the loss scale falls below
    tf32: bool = True  # on a GPU, fp32 products rounded to 10 bits; neighbours are searched exactly
    channels_last: bool = True
    compile: bool = False  # the backbone, by torch.compile; takes minutes before the first step
    batch_norm: Literal["per_process", "synchronised"] = "per_process"  # whose rows BN sees
    activation_checkpointing: bool = False  # stages are computed twice, and not kept: less memory
    fused_optimizer: bool | Literal["auto"] = "auto"  # sgd, adamw; auto: on a GPU
    num_threads: int = 0  # of the CPU; 0 leaves torch's own choice
    log_every_steps: int = 10
    checkpoint_every_steps: int = 500
    async_checkpoints: bool = True  # written by a thread while the steps go on
    keep_checkpoints: int = 2  # the newest ones stay in checkpoints/; 2: one to fall back on
    keep_every_steps: int = 0  # checkpoints at multiples of this stay for good; 0: none
    on_collapse: Literal["warn", "stop"] = "warn"  # pretrain/model/diagnostics.py
    collapse_std: float = 0.1  # alarm below this feature_std; 0.1: mean cosine of samples 0.99
    collapse_rank: float = 2.0  # alarm below this effective rank
    collapse_patience: int = 5  # logged rows in a row until the alarm
    on_nonfinite: Literal["stop", "skip"] = "stop"  # loss or gradients that are (docs/guards.md)
    max_nonfinite_steps: int = 10  # so many are skipped in a run; one more stops it
    watchdog_seconds: float = 300.0  # without a new batch: then all stacks are printed; 0: never
    on_hang: Literal["warn", "stop"] = "warn"  # stop: the process ends, torchrun may start again

    def __post_init__(self) -> None:
        for name in (
            "log_every_steps", "checkpoint_every_steps", "collapse_patience", "max_nonfinite_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= 1, f"engine.{name} must be >= 1, got {value}")
        require(
            not (self.compile and self.activation_checkpointing),
            "engine.compile=true and engine.activation_checkpointing=true do not go together: a "
            "compiled graph decides itself what it keeps; set one to false",
        )
        require(
            self.min_loss_scale > 0, f"engine.min_loss_scale must be > 0, got {self.min_loss_scale}"
        )
        require(self.num_threads >= 0, f"engine.num_threads: {self.num_threads} is < 0")
        for name in ("keep_checkpoints", "keep_every_steps"):
            require(getattr(self, name) >= 0, f"engine.{name}: {getattr(self, name)} is < 0")
        for name in ("collapse_std", "collapse_rank", "watchdog_seconds"):
            value = getattr(self, name)
            require(value >= 0, f"engine.{name} must be >= 0 (0: never), got {value}")


@dataclass(frozen=True)
class AdversarialConfig:
    """Adversarial training: view 1 is changed to raise the loss before each step. A study tool."""

    epsilon: float = 0.0  # largest change of a pixel value, in 1/255; 0: off
    num_steps: int = 1  # 1: FGSM; more: PGD
    step_size: float | None = None  # in 1/255; null: 1.25 epsilon; of PGD 2.5 epsilon / num_steps

    def __post_init__(self) -> None:
        require(
            0 <= self.epsilon <= 255,
            f"adversarial.epsilon must be in [0, 255] (1/255 of a pixel's range), "
            f"got {self.epsilon}",
        )
        require(self.num_steps >= 1, f"adversarial.num_steps must be >= 1, got {self.num_steps}")
        require(
            self.step_size is None or self.step_size > 0,
            f"adversarial.step_size must be > 0 or null, got {self.step_size}",
        )


@dataclass(frozen=True)
class EvalConfig:
    """The probes of the features, and the pictures that a person looks at."""

    probe_train: str | None = None
    probe_val: str | None = None
    knn_every_epochs: int = 10
    knn_k: int = 20
    knn_temperature: float = 0.07
    knn_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the stored features
    online_probe: bool = False  # a linear classifier learns beside, from the training batches
    online_probe_lr: float = 1e-3  # of its Adam; constant
    image_size: int = 0  # pixels; 0: data.image_size
    num_pictures: int = 8  # rows in the views and neighbours pictures; 0: none, and no map
    num_map_points: int = 1000  # of the picture of the probe's features; 0: none

    def __post_init__(self) -> None:
        require(self.knn_every_epochs >= 1, f"eval.knn_every_epochs: {self.knn_every_epochs} < 1")
        require(self.knn_k >= 1, f"eval.knn_k must be >= 1, got {self.knn_k}")
        require(self.knn_temperature > 0, f"eval.knn_temperature: {self.knn_temperature} <= 0")
        require(self.online_probe_lr > 0, f"eval.online_probe_lr: {self.online_probe_lr} <= 0")
        require(
            self.image_size == 0 or self.image_size >= 16,
            f"eval.image_size must be 0 (data.image_size) or >= 16, got {self.image_size}",
        )
        require(self.num_pictures >= 0, f"eval.num_pictures: {self.num_pictures} is < 0")
        require(
            self.num_map_points == 0 or 8 <= self.num_map_points <= 3000,
            f"eval.num_map_points must be 0 (no map) or from 8 to 3000, got {self.num_map_points}",
        )
        require(
            (self.probe_train is None) == (self.probe_val is None),
            "eval.probe_train and eval.probe_val go together: give both or neither",
        )


@dataclass(frozen=True)
class TrackingConfig:
    """Who gets the figures besides ``metrics.jsonl`` and TensorBoard."""

    wandb: bool = False  # Weights & Biases
    project: str = "feature-augmented-pretraining"  # of W&B

    def __post_init__(self) -> None:
        require(bool(self.project.strip()), "tracking.project is empty: name a project")


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
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        self._check_micro_batches()
        self._check_engine()

    def _check_engine(self) -> None:
        require(
            self.engine.fused_optimizer is not True or self.optim.name != "lars",
            "engine.fused_optimizer=true: optim.name=lars has no fused kernel, it is computed in "
            "foreach operations; use auto, or optim.name=sgd or adamw",
        )
        require(
            self.engine.precision != "fp16" or self.adversarial.epsilon == 0,
            "engine.precision=fp16: the gradient at a picture that adversarial.epsilon needs is "
            "lost in fp16; use bf16 or fp32",
        )

    def _check_micro_batches(self) -> None:
        micro, batch = self.optim.micro_batch_size, self.data.batch_size
        if micro == 0:
            return
        require(
            batch % micro == 0,
            f"optim.micro_batch_size ({micro}) must divide data.batch_size ({batch})",
        )
        if self.optim.accumulation == "cached":
            return
        cached = "use optim.accumulation=cached"
        require(
            self.objective.name in ("byol", "simsiam", "moco"),
            f"optim.accumulation=plain: the loss of {self.objective.name} compares all samples of "
            f"the batch, so it is not the sum over micro-batches; {cached}",
        )
        links = {name for chain in self.fa.chains() for name in chain}
        require(
            self.fa.partner != "batch" or not links & set(FA_PARTNER_LINKS),
            f"optim.accumulation=plain: fa.partner=batch takes partners from the whole batch; "
            f"{cached}, or fa.partner=view or queue",
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a YAML file and apply ``key=value`` overrides with dotted keys.

    Raises:
        UserError: File missing, unknown key, or a value that its dataclass refuses.
    """
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist; see configs/pretrain/ for examples")
    return read_settings(PretrainConfig, Path(path), overrides)
