"""What all generated sets can be asked for."""

from dataclasses import asdict, dataclass, fields

import numpy as np

from common.errors import UserError


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
        """Refuse values that cannot be meant.

        Raises:
            UserError: Naming the option, its value and the remedy.
        """
        for name, least in (("num_train", 1), ("num_test", 1), ("min_objects", 1)):
            _at_least(self, name, least)
        for name in ("num_pool", "num_probe_train", "num_probe_val", "seed", "clutter"):
            _at_least(self, name, 0)
        _at_least(self, "short_side", 32)
        _at_least(self, "quality", 1)
        _at_most(self, "quality", 100)
        _at_most(self, "long_side", 8192)
        for low, high in (
            ("short_side", "long_side"),
            ("min_object", "max_object"),
            ("min_objects", "max_objects"),
            ("pool_min_object", "pool_max_object"),
            ("pool_min_objects", "pool_max_objects"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise UserError(
                    f"{flag(low)} is {getattr(self, low)}, more than {flag(high)} "
                    f"{getattr(self, high)}: give a range from small to large"
                )
        for name in ("min_object", "pool_min_object"):
            _at_least(self, name, 0.05)
        for name in ("max_object", "pool_max_object"):
            _at_most(self, name, 2.0)
        for name in ("max_objects", "pool_max_objects"):
            _at_most(self, name, 20)

    def total(self) -> int:
        """Return the number of pictures."""
        return sum(self.counts().values())

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


_FLAGS = {
    "short_side": "--image-size",
    "long_side": "--image-size (long side)",
    "min_objects": "--min-objects-per-image",
    "max_objects": "--max-objects-per-image",
    "pool_min_objects": "--pool-min-objects-per-image",
    "pool_max_objects": "--pool-max-objects-per-image",
}


def flag(name: str) -> str:
    """Return the command line option that sets a field."""
    assert name in {field.name for field in fields(SetOptions)} or name
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _at_least(options: SetOptions, name: str, least: float) -> None:
    value = getattr(options, name)
    if not value >= least:
        raise UserError(f"{flag(name)} is {value}: give {least} or more")


def _at_most(options: SetOptions, name: str, most: float) -> None:
    value = getattr(options, name)
    if not value <= most:
        raise UserError(f"{flag(name)} is {value}: give {most} or less")


def draw_shape(rng: np.random.Generator, options: SetOptions) -> tuple[int, int]:
    """Return rows and columns of a picture: lying or upright with equal chance."""
    short, long = options.short_side, options.long_side
    return (short, long) if rng.random() < 0.5 else (long, short)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform between two bounds."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def object_statistics(
    rng: np.random.Generator, options: SetOptions, part: str
) -> tuple[tuple[float, float], int]:
    """Return the range of object sizes (shares of the short side) and a number of objects."""
    if part in ("train", "test"):
        sizes = (options.min_object, options.max_object)
        return sizes, int(rng.integers(options.min_objects, options.max_objects + 1))
    sizes = (options.pool_min_object, options.pool_max_object)
    if part == "pool":
        return sizes, int(rng.integers(options.pool_min_objects, options.pool_max_objects + 1))
    return sizes, 1


def is_held_out(part: str) -> bool:
    """Tell whether a part shows objects, materials and scenes kept from training."""
    return part in ("test", "probe/val")


def finish(rng: np.random.Generator, image: np.ndarray, cast: float = 0.1) -> np.ndarray:
    """Apply the camera: colour cast, exposure, a little blur and noise.

    Args:
        rng: Source of random numbers.
        image: float32 (h, w, 3), about 0..255; changed in place.
        cast: Largest relative change of one channel against the others.
    Returns:
        uint8 of the same shape.
    """
    import cv2  # not needed to parse a command line

    image *= (rng.uniform(0.85, 1.2) * rng.uniform(1 - cast, 1 + cast, 3)).astype(np.float32)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    sigma = np.float32(rng.uniform(0, 6))
    image += sigma * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)
