"""Options of all generated sets."""

import math
from dataclasses import asdict, dataclass

from common.errors import require


@dataclass(frozen=True)
class SetOptions:
    """Sizes and statistics of a set; every value changes the pictures.

    Attributes:
        num_pool: Unlabelled pictures for pretraining.
        num_train: Labelled pictures for fine-tuning.
        num_test: Labelled pictures for the evaluation.
        num_probe_train: Single-object pictures the kNN probe compares with.
        num_probe_val: Single-object pictures it classifies.
        short_side: Shorter side of every picture, pixels.
        long_side: Longer side, pixels; half of the pictures stand upright.
        seed: Everything random follows from it.
        min_object: Longer side of the smallest object, share of the shorter picture side.
        max_object: The same of the largest; sizes between are log-uniform.
        min_objects: Fewest objects in a labelled picture.
        max_objects: Most objects in a labelled picture.
        pool_min_object: As min_object, in the pool and the probe.
        pool_max_object: As max_object, in the pool and the probe.
        pool_min_objects: As min_objects, in the pool (the probe always shows one).
        pool_max_objects: As max_objects, in the pool.
        clutter: Amount of distractors, 0 none, 1 normal.
        quality: JPEG quality, 1..100.
    """

    num_pool: int = 4000
    num_train: int = 300
    num_test: int = 300
    num_probe_train: int = 500
    num_probe_val: int = 250
    short_side: int = 160
    long_side: int = 200
    seed: int = 0
    min_object: float = 0.25
    max_object: float = 0.8
    min_objects: int = 1
    max_objects: int = 3
    pool_min_object: float = 0.5
    pool_max_object: float = 0.95
    pool_min_objects: int = 1
    pool_max_objects: int = 2
    clutter: float = 1.0
    quality: int = 92

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: Naming the option, its value and the remedy.
        """
        for name, (least, most) in _LIMITS.items():
            value, option = getattr(self, name), flag(name)
            require(value >= least, f"{option} is {value}: give {least} or more")
            require(value <= most, f"{option} is {value}: give {most} or less")
        for low, high in _RANGES:
            smallest, largest = getattr(self, low), getattr(self, high)
            require(
                smallest <= largest,
                f"{flag(low)} is {smallest}, more than {flag(high)} {largest}: "
                "give a range from small to large",
            )

    def counts(self) -> dict[str, int]:
        """Return the number of pictures of each part of the set."""
        return {
            "pool": self.num_pool,
            "train": self.num_train,
            "test": self.num_test,
            "probe/train": self.num_probe_train,
            "probe/val": self.num_probe_val,
        }

    def as_dict(self) -> dict[str, object]:
        """Return all values, for dataset.json."""
        return asdict(self)


_LIMITS = {
    "num_train": (1, math.inf),
    "num_test": (1, math.inf),
    "min_objects": (1, math.inf),
    "num_pool": (0, math.inf),
    "num_probe_train": (0, math.inf),
    "num_probe_val": (0, math.inf),
    "seed": (0, math.inf),
    "clutter": (0, math.inf),
    "short_side": (32, math.inf),
    "long_side": (0, 8192),
    "quality": (1, 100),
    "min_object": (0.05, math.inf),
    "pool_min_object": (0.05, math.inf),
    "max_object": (0, 2.0),
    "pool_max_object": (0, 2.0),
    "max_objects": (0, 20),
    "pool_max_objects": (0, 20),
}
_RANGES = (
    ("short_side", "long_side"),
    ("min_object", "max_object"),
    ("min_objects", "max_objects"),
    ("pool_min_object", "pool_max_object"),
    ("pool_min_objects", "pool_max_objects"),
)
_FLAGS = {
    "short_side": "--image-size",
    "long_side": "--image-size (long side)",
    "min_objects": "--min-objects-per-image",
    "max_objects": "--max-objects-per-image",
    "pool_min_objects": "--pool-min-objects-per-image",
    "pool_max_objects": "--pool-max-objects-per-image",
}


def flag(name: str) -> str:
    """The command line option that sets a field."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))
