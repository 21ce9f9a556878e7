"""Random numbers that depend on nothing but a name: the same picture for any number of workers."""

import hashlib
from dataclasses import dataclass

import numpy as np

# Shape parameters are drawn on [0, 1]. Training objects never take a value in these bands, test and
# probe/val objects take nothing else: unseen objects with the same spread as the seen ones.
HELD_OUT_BANDS = ((0.15, 0.35), (0.65, 0.85))
_SEEN_BANDS = ((0.0, 0.15), (0.35, 0.65), (0.85, 1.0))


def generator(*name: object) -> np.random.Generator:
    """Make the generator that belongs to a name.

    Args:
        name: Anything whose `str` is stable, e.g. (seed, split, index).
    Returns:
        A counter-based generator keyed by blake2b of the name.
    """
    text = "/".join(str(part) for part in name).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class ShapeDice:
    """Draws the parameters of one object's shape, either from the seen or from the held-out bands.

    Attributes:
        rng: Source of random numbers; advanced by every draw.
        held_out: True for objects of the test and probe/val parts.
    """

    rng: np.random.Generator
    held_out: bool = False

    def uniform(self, low: float, high: float) -> float:
        """Draw a length, ratio or angle in [low, high] from the bands of this part."""
        bands = HELD_OUT_BANDS if self.held_out else _SEEN_BANDS
        widths = [stop - start for start, stop in bands]
        place = self.rng.random() * sum(widths)
        for (start, _), width in zip(bands, widths, strict=True):
            if place <= width:
                return low + (high - low) * (start + place)
            place -= width
        return low + (high - low) * bands[-1][1]

    def integer(self, low: int, high: int) -> int:
        """Draw an integer in low..high, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return bool(self.rng.random() < probability)
