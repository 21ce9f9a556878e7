"""The one schema of a pretraining run: nested frozen dataclasses, YAML and dotted overrides.

Every key is read by code. Unknown keys stop the run and are named; impossible values are refused by
the dataclass that holds them, so that a config that loads is a config that can start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import find_config, read_settings, with_sections
from common.errors import at_least, positive, require, within_0_and_1
from pretrain.data.cache import CacheOptions
from pretrain.data.order import LastBatch
from pretrain.data.policy import AugmentationPolicy
from pretrain.data.remote import Patience, displayed
from pretrain.features.augmentations.base import (
    FeatureAugmentation,
    NeighbourAugmentation,
    PartnerAugmentation,
)
from pretrain.model.backbones.base import Backbone
from pretrain.model.backbones.resnet import ResNetBackbone
from pretrain.objectives.base import Objective
from pretrain.objectives.byol import Byol


@dataclass(frozen=True)
class HeadConfig:
    """Projector g and predictor q: MLPs with ReLU between the layers."""

    projector_layers: int = 2
    projector_hidden_dim: int = 4096
    projector_hidden_bn: bool = True  # BN after each hidden layer; MoCo v2 has none
    projector_last_bn: bool = False  # BN after the last layer as well: NNCLR, SimSiam
    projector_last_bn_affine: bool = True  # whether that BN has a weight and a bias; SimSiam: no
    predictor_hidden_dim: int = 4096
    output_dim: int = 256
    dropout: float = 0.0  # after each hidden layer of both heads

    def __post_init__(self) -> None:
        at_least(self, "heads", projector_layers=1, projector_hidden_dim=1)
        at_least(self, "heads", predictor_hidden_dim=1, output_dim=1)
        require(0 <= self.dropout < 1, f"heads.dropout must be in [0, 1), got {self.dropout}")


@with_sections(FeatureAugmentation.registry)
@dataclass(frozen=True)
class FAConfig:
    """Feature augmentation A: what it does, where it acts, and which gradient it lets through.

    Each method has a section with its parameters, e.g. ``fa.mask.ratio``.
    """

    method: str = "nn"  # "nn", "nn+noise" (one after another), "mask|mixup" (a random one per row)
    architecture: Literal["auto", "basic", "pre", "post", "parallel"] = "auto"
    side: Literal["auto", "target", "online"] = "auto"  # auto: as the architecture draws it
    views: Literal["both", "first", "second"] = "both"  # whose features A takes; both: small, too
    stop_gradient: bool = True  # on the features that A takes; 'none' applies neither
    num_features: int = 1  # N augmented features per sample
    feature_loss: Literal["mean", "free"] = "mean"  # free: the sum over the N terms
    partner: Literal["batch", "view", "queue"] = "batch"  # mixup, cutmix, extrapolate: z_j
    strength: float = 1.0  # scales every method; 0 is the identity
    strength_start: float | None = None  # at the first step, if the strength shall move
    strength_curve: Literal["linear", "cosine"] = "linear"  # from strength_start to strength
    queue_size: int = 65536  # entries of the support queue
    queue_dtype: Literal["fp32", "fp16"] = "fp32"
    min_fill: int = 1024  # methods that read the queue are the identity until it holds so many

    def __post_init__(self) -> None:
        at_least(self, "fa", num_features=1)
        within_0_and_1(self, "fa", "strength", "strength_start")
        methods = self.methods()
        require(
            self.num_features == 1 or any(method.is_random for method in methods),
            f"fa.num_features={self.num_features} needs a method that draws; {self.method!r} "
            "gives the same feature each time",
        )
        for method in methods:
            method.check(self.num_features, self.min_fill)
        if self.uses_queue():
            require(
                1 <= self.min_fill <= self.queue_size,
                f"fa: 1 <= min_fill ({self.min_fill}) <= queue_size ({self.queue_size}) must hold",
            )

    def chains(self) -> tuple[tuple[FeatureAugmentation, ...], ...]:
        """The method as its alternatives, each a chain: "a+b|c" -> ((a, b), (c,)); none -> ().

        Raises:
            UserError: An unknown name, or one that changes nothing beside others.
        """
        chains = [[n.strip() for n in chain.split("+")] for chain in self.method.split("|")]
        known = FeatureAugmentation.registry.names()
        for name in (name for chain in chains for name in chain):
            require(
                name in ("none", *known),
                f"fa.method={self.method!r}: {name!r} is none of none, {', '.join(known)}; join "
                "them with + (one after another) and | (one at random)",
            )
            require(
                chains == [[name]] or (name != "none" and getattr(self, name).is_random),
                f"fa.method={self.method!r}: {name!r} stands alone",
            )
        if chains == [["none"]]:
            return ()
        return tuple(tuple(getattr(self, name) for name in chain) for chain in chains)

    def methods(self) -> list[FeatureAugmentation]:
        """All methods of all chains."""
        return [method for chain in self.chains() for method in chain]

    def reads_queue(self, method: FeatureAugmentation) -> bool:
        """Whether a method takes neighbours, or partners, from the support queue."""
        takes_partner = isinstance(method, PartnerAugmentation) and self.partner == "queue"
        return takes_partner or isinstance(method, NeighbourAugmentation)

    def uses_queue(self) -> bool:
        """Whether a support queue is kept."""
        return any(self.reads_queue(method) for method in self.methods())


@dataclass(frozen=True)
class InitConfig:
    """How weights start."""

    residual_gamma: float = 1.0  # last BN weight of each residual block; see common/network.py

    def __post_init__(self) -> None:
        at_least(self, "init", residual_gamma=0)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how views are made of each."""

    shards: dict[str, float] | list[str] | str | None = None  # one set; several; {set: weight}
    image_size: int = 224  # side of a large view, pixels
    batch_size: int = 256  # global: over all processes
    augmentation: AugmentationPolicy = field(default_factory=AugmentationPolicy)
    cache_dir: str | None = None  # of remote shards; null: $XDG_CACHE_HOME/fa-shards
    cache_gb: float = 64.0  # bound of that folder, 10^9 bytes
    read_retries: int = 5  # further tries of a failed read from a server
    read_timeout_seconds: float = 60.0  # without a byte: then a read has failed
    streaming: bool = False  # read tars from front to end, without an index (docs/shards.md)
    samples_per_epoch: int = 0  # of a stream, whose length is not known; 0 otherwise
    photometric: Literal["auto", "device", "workers"] = "auto"  # where; auto: workers on a CPU
    shuffle_window: int = 16384  # samples; a stream's readers share it
    last_batch: LastBatch = "drop"  # the remainder of an epoch below one batch: drop, or pad
    num_workers: int = 2  # per process
    max_bad_samples: int = 0  # undecodable pictures that each process replaces before it stops
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB, 0..1
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        at_least(self, "data", batch_size=2, image_size=16, shuffle_window=1)
        at_least(self, "data", num_workers=0, max_bad_samples=0)
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
        names = [] if isinstance(self.shards, str | None) else list(self.shards)
        require(self.shards is None or bool(self.shards), "data.shards: name one shard set or more")
        for name in names:
            is_once = names.count(name) == 1
            require(is_once, f"data.shards: {displayed(name)} is listed twice; give it a weight")
        for name, weight in self.shards.items() if isinstance(self.shards, dict) else ():
            require(
                0 < weight < math.inf,
                f"data.shards: weight {weight} of {displayed(name)}: must be above 0",
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
    # joint: eta |w| / |g + wd w| (BYOL's code); separate: eta |w| / (|g| + wd |w|) (solo-learn)
    lars_norm: Literal["joint", "separate"] = "joint"
    lars_clip: bool = False  # the trust ratio raises no layer's rate above the scheduled one
    micro_batch_size: int = 0  # global; 0: the whole batch in one pass
    accumulation: Literal["plain", "cached"] = "plain"  # how micro-batches make one batch

    def __post_init__(self) -> None:
        at_least(self, "optim", epochs=1, weight_decay=0, head_weight_decay=0)
        positive(self, "optim", "lars_eta", "base_lr")
        require(0 <= self.momentum < 1, f"optim.momentum must be in [0, 1), got {self.momentum}")
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
    num_threads: int = 0  # of the CPU; 0: as many as there are free cores
    log_every_steps: int = 10
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 2  # the newest ones stay in checkpoints/; 2: one to fall back on
    keep_every_steps: int = 0  # checkpoints at multiples of this stay for good; 0: none
    on_collapse: Literal["warn", "stop"] = "warn"  # pretrain/engine/guards.py
    collapse_std: float = 0.1  # alarm below this feature_std; 0.1: mean cosine 0.99; 0: never
    collapse_rank: float = 2.0  # alarm below this effective rank; 0: never
    collapse_patience: int = 5  # logged rows in a row until the alarm
    watchdog_seconds: float = 300.0  # without a new batch: then all stacks are printed; 0: never
    on_hang: Literal["warn", "stop"] = "warn"  # stop: the process ends, torchrun may start again

    def __post_init__(self) -> None:
        at_least(self, "engine", log_every_steps=1, checkpoint_every_steps=1)
        at_least(self, "engine", collapse_patience=1, num_threads=0)
        at_least(self, "engine", keep_checkpoints=0, keep_every_steps=0)
        at_least(self, "engine", collapse_std=0, collapse_rank=0, watchdog_seconds=0)
        positive(self, "engine", "min_loss_scale")
        require(
            not (self.compile and self.activation_checkpointing),
            "engine.compile=true and engine.activation_checkpointing=true do not go together: a "
            "compiled graph decides itself what it keeps; set one to false",
        )


@dataclass(frozen=True)
class AdversarialConfig:
    """Adversarial training: view 1 is changed to raise the loss before each step. A study tool."""

    epsilon: float = 0.0  # largest change of a pixel value, in 1/255; 0: off
    num_steps: int = 1  # 1: FGSM; more: PGD
    step_size: float | None = None  # in 1/255; null: 1.25 epsilon; of PGD 2.5 epsilon / num_steps

    def __post_init__(self) -> None:
        at_least(self, "adversarial", epsilon=0, num_steps=1)
        positive(self, "adversarial", "step_size")


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
        at_least(self, "eval", knn_every_epochs=1, knn_k=1, num_pictures=0, image_size=0)
        positive(self, "eval", "knn_temperature", "online_probe_lr")
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


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what a run computes."""

    out: str | None = None
    seed: int = 0
    arch: Backbone = field(default_factory=ResNetBackbone)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)
    objective: Objective = field(default_factory=Byol)
    fa: FAConfig = field(default_factory=FAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(-(2**63) <= self.seed < 2**63, f"seed must be a 64-bit number, got {self.seed}")
        is_utf8 = not any("\ud800" <= character <= "\udfff" for character in self.out or "")
        require(is_utf8, f"out={self.out}: is no UTF-8, which TensorBoard needs; rename the folder")
        require(
            self.engine.precision != "fp16" or self.adversarial.epsilon == 0,
            "engine.precision=fp16: the gradient at a picture that adversarial.epsilon needs is "
            "lost in fp16; use bf16 or fp32",
        )
        num_small, reason = self.data.augmentation.small_crops.num, self.objective.two_views_only
        require(
            num_small == 0 or not reason,
            f"data.augmentation.small_crops.num={num_small}: objective.name={self.objective.name} "
            f"takes no small crops ({reason}); use num=0, or another objective",
        )
        refuse_without_gradient(self.objective, self.fa)
        least, size, stride = self.objective.min_positions, self.data.image_size, self.arch.stride
        side = math.ceil(size / stride)
        require(
            side**2 >= least,
            f"data.image_size={size}: the last map of the backbone has {side} x {side} positions, "
            f"and objective.name={self.objective.name} needs {least}; use data.image_size="
            f"{stride * math.isqrt(max(least - 1, 0)) + 1} or more",
        )
        if self.objective.needs_sample_ids:
            require(
                not self.data.streaming,
                f"objective.name={self.objective.name}: it keeps a feature of each sample, and "
                "data.streaming=true does not know which sample it reads; use an index",
            )
            require(
                self.optim.epochs >= 2,
                f"objective.name={self.objective.name}: the first epoch only collects features; "
                f"optim.epochs must be >= 2, got {self.optim.epochs}",
            )
        micro, batch = self.optim.micro_batch_size, self.data.batch_size
        if micro == 0:
            return
        require(
            batch % micro == 0,
            f"optim.micro_batch_size ({micro}) must divide data.batch_size ({batch})",
        )
        takes_partners = self.fa.partner == "batch" and any(
            isinstance(method, PartnerAugmentation) for method in self.fa.methods()
        )
        mixing = getattr(self.objective, "mixing", None)
        if self.optim.accumulation == "cached":
            needs_batch = takes_partners or (mixing is not None and mixing.is_on)
            require(
                self.adversarial.epsilon == 0 or not needs_batch,
                "adversarial.epsilon: each micro-batch is attacked by its own loss, and partners "
                "of the whole batch (fa.partner=batch) or objective.mixing are not there; use "
                "optim.micro_batch_size=0, or fa.partner=view or queue without mixing",
            )
            return
        # Plain accumulation adds up losses of micro-batches that know nothing of each other.
        require(
            self.objective.is_per_sample,
            f"optim.accumulation=plain: the loss of {self.objective.name} is one of the whole "
            "batch, not the mean over its micro-batches; use optim.accumulation=cached",
        )
        require(
            not takes_partners,
            "optim.accumulation=plain: fa.partner=batch takes partners from the whole batch; "
            "use optim.accumulation=cached, or fa.partner=view or queue",
        )


@dataclass(frozen=True)
class MethodSpec:
    """An objective with FA in an architecture, with everything that was left open decided.

    Attributes:
        architecture: basic, pre, post or parallel; all but basic have a predictor.
        side: Whose features A takes: those of the target or of the online branch.
        stops_target: Whether gradient stops at the target branch.
    """

    architecture: Literal["basic", "pre", "post", "parallel"]
    side: Literal["target", "online"]
    stops_target: bool


def resolve(objective: Objective, fa: FAConfig) -> MethodSpec:
    """Decide what the config leaves to the objective.

    Raises:
        UserError: For a combination that contradicts itself.
    """
    objective.check_fa(fa.method.strip(), fa.architecture, fa.views, fa.stop_gradient)
    architecture = objective.architecture if fa.architecture == "auto" else fa.architecture
    own_side = "online" if architecture in ("pre", "post") else "target"
    side = own_side if fa.side == "auto" else fa.side
    reason = (
        "FA and predictor would act on one view, which is architecture pre (FA first) or post"
        if architecture == "parallel"
        else "FA on the other view than the predictor is architecture parallel"
    )
    require(
        side == own_side or architecture == "basic",
        f"fa.side={side} with fa.architecture={architecture}: {reason}",
    )
    stops = objective.stop_gradient
    return MethodSpec(architecture, side, objective.stops_target if stops is None else stops)


def refuse_without_gradient(objective: Objective, fa: FAConfig) -> None:
    """Refuse a method in which backbone, projector or predictor get no gradient.

    FA that stops its gradient cuts off what lies before A. In ``post`` that is the predictor.
    Backbone and projector lie before A wherever A takes the online features; they still learn
    through the target branch, unless its gradient is stopped. With FA on one view only, the other
    direction trains everything.

    Raises:
        UserError: Naming the parts without gradient and what to change.
    """
    spec = resolve(objective, fa)
    starved = ["backbone", "projector"] if spec.stops_target else []
    starved += ["predictor"] if spec.architecture == "post" else []
    is_cut_off = fa.method != "none" and fa.stop_gradient and fa.views == "both"
    require(
        not (is_cut_off and spec.side == "online" and starved),
        f"objective.name={objective.name}, fa.method={fa.method}, fa.architecture="
        f"{spec.architecture}, fa.side={spec.side}, fa.stop_gradient=true cannot train: no "
        f"gradient reaches the {' and the '.join(starved)}. FA stops the gradient of the features "
        "it takes, and no other reaches what computes them: use fa.stop_gradient=false, or "
        "fa.architecture=parallel",
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a YAML file or a preset (`find_config`) and apply ``key=value`` overrides.

    Raises:
        UserError: File missing, unknown key, or a value that its dataclass refuses.
    """
    return read_settings(PretrainConfig, find_config(path, "pretrain"), overrides)
