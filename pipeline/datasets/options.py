"""Options of all generated sets: one table with their limits and help."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from common.errors import require


def _option(
    default: float, text: str, least: float = 0, most: float = math.inf, flag: str = ""
) -> Any:
    """A field with the help text, the limits and, where it has another name, its option."""
    more = {"help": text, "least": least, "most": most, "flag": flag}
    return field(default=default, metadata=more)


@dataclass(frozen=True)
class SetOptions:
    """Sizes and statistics of a set; every value changes the pictures.

    Sizes of objects are shares of a picture's shorter side, drawn log-uniformly. A probe picture
    always shows one object. Half of the pictures stand upright.
    """

    num_pool: int = _option(4000, "unlabelled pictures for pretraining")
    num_train: int = _option(300, "labelled pictures for fine-tuning", 1)
    num_test: int = _option(300, "labelled pictures for the evaluation", 1)
    num_probe_train: int = _option(500, "single-object pictures, kNN reference")
    num_probe_val: int = _option(250, "single-object pictures, kNN queries")
    short_side: int = _option(160, "", 32, flag="--image-size")
    long_side: int = _option(200, "", 0, 8192, "--image-size (long side)")
    seed: int = _option(0, "seed of everything random")
    min_object: float = _option(0.25, "smallest object, share of the short side", 0.05)
    max_object: float = _option(0.8, "largest object, share of the short side", 0, 2.0)
    min_objects: int = _option(1, "fewest in a labelled picture", 1, flag="--min-objects-per-image")
    max_objects: int = _option(3, "most in a labelled picture", 0, 20, "--max-objects-per-image")
    pool_min_object: float = _option(0.5, "as --min-object, for pool and probe", 0.05)
    pool_max_object: float = _option(0.95, "as --max-object, for pool and probe", 0, 2.0)
    pool_min_objects: int = _option(1, "fewest in the pool", flag="--pool-min-objects-per-image")
    pool_max_objects: int = _option(2, "most in the pool", 0, 20, "--pool-max-objects-per-image")
    clutter: float = _option(1.0, "amount of distractors, 0 is none")
    quality: int = _option(92, "of the JPEGs, 1..100", 1, 100)

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: Naming the option, its value and the remedy.
        """
        flags = {option.name: flag(option) for option in fields(self)}
        for option in fields(self):
            value, name, limits = getattr(self, option.name), flags[option.name], option.metadata
            least, most = limits["least"], limits["most"]
            require(value >= least, f"{name} is {value}: give {least} or more")
            require(value <= most, f"{name} is {value}: give {most} or less")
        for low in ("short_side", *(name for name in flags if "min_" in name)):
            high = low.replace("short", "long").replace("min_", "max_")
            smallest, largest = getattr(self, low), getattr(self, high)
            require(
                smallest <= largest,
                f"{flags[low]} is {smallest}, more than {flags[high]} {largest}: "
                "give a range from small to large",
            )

    def counts(self) -> dict[str, int]:
        """Return the number of pictures of each part of the set."""
        parts = ("pool", "train", "test", "probe/train", "probe/val")
        return {part: getattr(self, f"num_{part.replace('/', '_')}") for part in parts}


def flag(option: Any) -> str:
    """The command line option of a field of `SetOptions`."""
    return option.metadata["flag"] or "--" + option.name.replace("_", "-")
