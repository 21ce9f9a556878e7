"""The painted pieces that shapes are made of.

A shape is a list of parts, painted in order. Which material a part wears is drawn by the renderer;
a shape only says which parts share one (its `slot`). y points downwards, an object spans about
-1..1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BODY, SECOND, THIRD, DARK, LIGHT = range(5)


@dataclass(frozen=True)
class Part:
    """One painted piece: outlines filled by the even-odd rule, so that inner outlines are holes.

    Attributes:
        contours: Outlines in object units.
        slot: Which material it wears; DARK and LIGHT are shades for windows, tyres and openings.
        relief: Strength of the rounded shading, 0 is flat.
    """

    contours: Sequence[np.ndarray]
    slot: int = BODY
    relief: float = 1.0


def part(*contours: np.ndarray, slot: int = BODY, relief: float = 1.0) -> Part:
    """Make a part from its outlines."""
    return Part(contours, slot, relief)
