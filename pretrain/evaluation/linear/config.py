"""What a linear evaluation does: one flat schema, YAML and ``key=value`` overrides."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import require
from pretrain.data.policy import Crop, Flip, ViewPolicy

_AT_LEAST = {
    "epochs": 1, "batch_size": 1, "num_lrs": 1, "shuffle_window": 1, "checkpoint_every_steps": 1,
    "passes": 0, "num_workers": 0, "init_std": 0, "weight_decay": 0, "momentum": 0,
}  # fmt: skip
_MAX_VALUES = 1000  # rates, values of k, temperatures


@dataclass(frozen=True)
class LinearConfig:
    """Everything that decides the figures, besides the weights and the shards."""

    protocol: Literal["cached", "full", "knn"] = "cached"
    seed: int = 0  # of the subset, the held-out part, the order, crops, and random weights
    image_size: int = 0  # side of a crop, pixels; 0: as in pretraining, 224 without a config
    # Which labels are used.
    fraction: float = 1.0  # share of the training labels, the same number in each class
    subset_list: str | None = None  # file with the names of the samples to train on, one a line
    holdout: float = 0.1  # share of each class of the training set that selects the rate
    # The classifiers, one for each rate, trained at once.
    lrs: list[float] | None = None  # base rates at batch 256; null: num_lrs between lr_min, lr_max
    num_lrs: int = 10
    lr_min: float = 0.001
    lr_max: float = 100.0
    epochs: int = 100
    batch_size: int = 256  # global: over all processes
    optimizer: Literal["sgd", "lars"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    lars_eta: float = 0.001
    schedule: Literal["cosine", "cosine_epochs", "step"] = "cosine"  # by step, or once an epoch
    milestones: list[int] | None = None  # epochs after which a step schedule multiplies by gamma
    gamma: float = 0.1
    init_std: float = 0.0  # of the weights at start; biases start at 0
    # cached and knn: features are computed once and kept in a file.
    refit: bool = True  # train once more at the chosen rate, with the held-out part
    passes: int = 0  # 0: central crops; N: N passes of random crops and flips
    # full, and passes > 0
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area, as a share of the picture's
    flip_probability: float = 0.5
    shuffle_window: int = 16384  # samples
    last_batch: Literal["drop", "pad"] = "drop"  # the remainder of an epoch below one batch
    checkpoint_every_steps: int = 200
    # kNN: every k with every temperature
    knn_k: list[int] | None = None  # null: 1, 5, 10, 20, 50, 100, 200, as far as there are samples
    knn_temperature: list[float] | None = None  # null: 0.03, 0.07, 0.1, 0.2, 1.0
    # How it is computed; the figures depend on rounding only.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "auto"] = "fp32"  # of the backbone
    num_workers: int = 2  # per process

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, rule: str) -> None:
            require(condition, f"{name}={getattr(self, name)}: must be {rule}")

        for name, least in _AT_LEAST.items():
            check(getattr(self, name) >= least, name, f"at least {least}")
        check(self.image_size == 0 or self.image_size >= 16, "image_size", "at least 16, or 0")
        check(0 < self.fraction <= 1, "fraction", "above 0, at most 1")
        check(0 <= self.holdout < 1, "holdout", "from 0 to below 1")
        check(0 < self.lr_min < math.inf, "lr_min", "above 0")
        check(self.lr_min <= self.lr_max < math.inf, "lr_max", f"at least lr_min={self.lr_min}")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "crop_scale", "0 < low <= high <= 1")
        check(0 <= self.flip_probability <= 1, "flip_probability", "from 0 to 1")
        require(self.subset_list is None or self.fraction == 1,
                "fraction and subset_list both choose the training samples: give one")  # fmt: skip
        require(not self.nesterov or (self.momentum > 0 and self.optimizer == "sgd"),
                "nesterov=true needs optimizer=sgd and momentum above 0")  # fmt: skip
        require((self.schedule == "step") == bool(self.milestones),
                "milestones go with schedule=step: give both or neither")  # fmt: skip
        for name in ("lrs", "knn_k", "knn_temperature"):
            values = getattr(self, name)
            is_plain = values is None or (
                0 < len(set(values)) == len(values) <= _MAX_VALUES
                and all(0 < x < math.inf for x in values)
            )
            check(is_plain, name, "some different numbers above 0")
        require(
            self.protocol == "knn" or len(self.rates()) == 1 or self.holdout > 0,
            f"holdout=0 leaves nothing to select one of {len(self.rates())} rates with (the "
            "validation set is never used for that): give holdout=0.1, or one rate in lrs",
        )

    @property
    def view_policy(self) -> ViewPolicy:
        """Random crops and flips."""
        return ViewPolicy(crop=Crop(self.crop_scale), flip=Flip(self.flip_probability))

    @property
    def random_crop(self) -> dict[str, Any]:
        """The same for the result and for the facts about features."""
        return {"random_resized_crop": list(self.crop_scale), "flip": self.flip_probability}

    def rates(self) -> list[float]:
        """Base learning rates at batch 256, ascending where they are made here."""
        if self.lrs is not None:
            return list(self.lrs)
        if self.num_lrs == 1:
            return [self.lr_min]
        ratio = self.lr_max / self.lr_min
        return [self.lr_min * ratio ** (i / (self.num_lrs - 1)) for i in range(self.num_lrs)]

    def peak_rates(self) -> list[float]:
        """The rates as the optimiser gets them: linear scaling, base x batch / 256."""
        return [rate * self.batch_size / 256 for rate in self.rates()]

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """Factor of the peak rate in step 0, 1, ..

        ``cosine`` goes to 0 step by step, taken at the middle of a step; ``cosine_epochs`` is
        constant within an epoch, as in SimSiam's code; ``step`` as in MoCo's and solo-learn's.
        """
        epoch = step // steps_per_epoch
        if self.schedule == "step":
            return self.gamma ** sum(epoch >= milestone for milestone in self.milestones or [])
        done = epoch / self.epochs
        if self.schedule == "cosine":
            done = (step + 0.5) / (steps_per_epoch * self.epochs)
        return 0.5 * (1 + math.cos(math.pi * done))
