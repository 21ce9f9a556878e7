"""The part of the schema that says what is computed: heads, base method, feature augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.errors import require

ObjectiveName = Literal["simclr", "infonce", "moco", "byol", "simsiam", "swav"]
FA_PARTNER_LINKS = ("mixup", "cutmix", "extrapolate")
FA_LINKS = ("none", "identity", "nn", "mask", "noise", *FA_PARTNER_LINKS)


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
        for name in (
            "projector_layers",
            "projector_hidden_dim",
            "predictor_hidden_dim",
            "output_dim",
        ):
            value = getattr(self, name)
            require(value >= 1, f"heads.{name} must be >= 1, got {value}")
        require(0 <= self.dropout < 1, f"heads.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective: a loss and its target branch (pretrain/objectives/method_spec.py)."""

    name: ObjectiveName = "byol"
    temperature: float = 0.2  # all but byol, simsiam
    ema_tau: float = 0.99  # byol, moco: tau_0 of the schedule that ends at ema_tau_end
    ema_tau_end: float = 1.0  # MoCo v2+ of solo-learn ends at 0.999
    stop_gradient: bool | None = None  # on the target; null: as the base method has it
    num_negatives: int = 65536  # moco: entries of each of the two queues of keys
    num_prototypes: int = 3000  # swav
    sinkhorn_epsilon: float = 0.05  # swav
    sinkhorn_iterations: int = 3  # swav
    frozen_prototype_steps: int = 313  # swav: the prototypes stand still for so many steps

    def __post_init__(self) -> None:
        for name in ("temperature", "sinkhorn_epsilon"):
            value = getattr(self, name)
            require(value > 0, f"objective.{name} must be > 0, got {value}")
        for name in ("ema_tau", "ema_tau_end"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"objective.{name} must be in [0, 1], got {value}")
        for name in ("num_negatives", "num_prototypes", "sinkhorn_iterations"):
            value = getattr(self, name)
            require(value >= 1, f"objective.{name} must be >= 1, got {value}")
        require(
            self.frozen_prototype_steps >= 0,
            f"objective.frozen_prototype_steps: {self.frozen_prototype_steps} is < 0",
        )
        require(
            self.stop_gradient is not False or self.name not in ("byol", "moco", "swav"),
            f"objective.stop_gradient=false: the target of {self.name} has no gradient to let "
            "through (an EMA network's projection, or assigned codes); leave it out",
        )


@dataclass(frozen=True)
class FAConfig:
    """Feature augmentation A: what it does, where it acts, and which gradient it lets through."""

    method: str = "nn"  # "nn", "nn+noise" (one after another), "mask|mixup" (a random one per row)
    architecture: Literal["auto", "basic", "pre", "post", "parallel"] = "auto"
    side: Literal["auto", "target", "online"] = "auto"  # auto: as the architecture draws it
    views: Literal["both", "first", "second"] = "both"  # whose features A takes
    stop_gradient: bool = True  # on the features that A takes; 'none' applies neither
    num_features: int = 1  # N augmented features per sample
    feature_loss: Literal["mean", "free"] = "mean"  # free: the sum over the N terms
    partner: Literal["batch", "view", "queue"] = "batch"  # mixup, cutmix, extrapolate: z_j
    strength: float = 1.0  # scales every method; 0 is the identity
    strength_start: float | None = None  # at the first step, if the strength shall move
    strength_curve: Literal["linear", "cosine"] = "linear"  # from strength_start to strength
    queue_size: int = 65536  # entries of the support queue
    queue_dtype: Literal["fp32", "fp16"] = "fp32"
    min_fill: int = 1024  # A's links that read the queue are the identity until it holds so many
    top_k: int = 1  # nn: how many nearest to choose from
    nn_choice: Literal["random", "consensus"] = "random"  # nn: of the top_k; N > 1: the N nearest
    nn_distance: Literal["cosine", "truncated"] = "cosine"  # truncated: resists outlier dimensions
    mask_ratio: float = 0.2  # mask: share of dimensions set to zero
    noise_sigma: float = 0.2  # noise: relative to the norm of the feature
    mixup_alpha: float = 1.0  # mixup: l ~ Beta(alpha, alpha), lambda = max(l, 1 - l)
    cutmix_ratio: float = 0.2  # cutmix: share of dimensions taken from the partner
    extrapolate_scale: float = 0.5  # extrapolate: lambda = scale * Beta(2, 2)
    extrapolate_per_dimension: bool = False  # a lambda for each dimension, or one for each row

    def __post_init__(self) -> None:
        links = {name for chain in self.chains() for name in chain}
        require(self.num_features >= 1, f"fa.num_features must be >= 1, got {self.num_features}")
        for name in ("mask_ratio", "cutmix_ratio"):
            value = getattr(self, name)
            require(0 <= value < 1, f"fa.{name} must be in [0, 1), got {value}")
        for name in ("noise_sigma", "extrapolate_scale"):
            value = getattr(self, name)
            require(value >= 0, f"fa.{name} must be >= 0, got {value}")
        require(self.mixup_alpha > 0, f"fa.mixup_alpha must be > 0, got {self.mixup_alpha}")
        for name in ("strength", "strength_start"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"fa.{name} must be in [0, 1], got {value}")
        if links <= {"none", "identity"}:
            require(
                self.num_features == 1,
                f"fa.num_features={self.num_features} needs a method that draws; {self.method!r} "
                "gives the same feature each time",
            )
        if "nn" in links:
            self._check_nn()
        if self.uses_queue():
            require(
                1 <= self.min_fill <= self.queue_size,
                f"fa: 1 <= min_fill ({self.min_fill}) <= queue_size ({self.queue_size}) must hold",
            )

    def chains(self) -> tuple[tuple[str, ...], ...]:
        """The method as its alternatives, each a chain of links: "a+b|c" -> ((a, b), (c,)).

        Raises:
            UserError: An unknown link, or `none` or `identity` beside others.
        """
        chains = tuple(
            tuple(name.strip() for name in chain.split("+")) for chain in self.method.split("|")
        )
        for name in (name for chain in chains for name in chain):
            require(
                name in FA_LINKS,
                f"fa.method={self.method!r}: {name!r} is none of {', '.join(FA_LINKS)}; join them "
                "with + (one after another) and | (one at random)",
            )
            require(
                name not in ("none", "identity") or chains == ((name,),),
                f"fa.method={self.method!r}: {name!r} stands alone",
            )
        return chains

    def uses_queue(self) -> bool:
        """Whether a support queue is kept: for neighbours, or for partners."""
        links = {name for chain in self.chains() for name in chain}
        return "nn" in links or (self.partner == "queue" and bool(links & set(FA_PARTNER_LINKS)))

    def _check_nn(self) -> None:
        require(
            1 <= self.top_k <= self.min_fill,
            f"fa: 1 <= top_k ({self.top_k}) <= min_fill ({self.min_fill}) must hold",
        )
        require(
            self.num_features == 1 or self.top_k >= self.num_features,
            f"fa: nn with num_features={self.num_features} takes the N nearest and needs "
            f"top_k >= N, got top_k={self.top_k}",
        )
        require(
            self.num_features == 1 or self.nn_choice == "random",
            f"fa: nn_choice=consensus makes one feature of the top_k, so num_features must be 1, "
            f"got {self.num_features}",
        )
