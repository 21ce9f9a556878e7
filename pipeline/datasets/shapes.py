"""The ten object classes of the generated world, and the things that belong to none."""

from collections.abc import Callable

import numpy as np

from pipeline.datasets import household, outdoors
from pipeline.datasets import outlines as o
from pipeline.datasets.parts import Part, part
from pipeline.datasets.randomness import ShapeDice

CLASSES: dict[str, Callable[[ShapeDice], list[Part]]] = {
    "cup": household.cup,
    "bottle": household.bottle,
    "chair": household.chair,
    "car": outdoors.car,
    "fish": outdoors.fish,
    "tree": outdoors.tree,
    "lamp": household.lamp,
    "key": household.key,
    "house": outdoors.house,
    "umbrella": household.umbrella,
}


def distractor(dice: ShapeDice) -> list[Part]:
    """One to three joined primitives that belong to no class."""
    parts: list[Part] = []
    for _ in range(dice.integer(1, 3)):
        size = np.array([dice.uniform(0.15, 0.8), dice.uniform(0.15, 0.8)])
        spot = np.array([dice.uniform(-0.5, 0.5), dice.uniform(-0.5, 0.5)])
        kind = dice.integer(0, 6)
        if kind == 0:
            contours = [o.blob(dice.rng, dice.integer(5, 9), 0.6)]
        elif kind == 1:
            contours = [o.rectangle(-1, -1, 1, 1)]
        elif kind == 2:
            contours = [o.ellipse(0, 0, 1, 1)]
        elif kind == 3:
            inner = dice.uniform(0.4, 0.8)
            contours = [o.ellipse(0, 0, 1, 1), o.ellipse(0, 0, inner, inner)]
        elif kind == 4:
            angles = np.linspace(0, 2 * np.pi, dice.integer(3, 7) * 2, endpoint=False)
            radii = np.where(np.arange(len(angles)) % 2, dice.uniform(0.3, 0.9), 1.0)
            contours = [np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)]
        elif kind == 5:
            contours = [o.stroke(o.curve((-1, 0), dice.rng.uniform(-1, 1, 2), (1, 0)), 0.25)]
        else:
            a = dice.uniform(0.15, 0.4)
            contours = [o.rectangle(-1, -a, 1, a), o.rectangle(-a, a, a, 1)]
        turn = dice.rng.uniform(0, 2 * np.pi)
        matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        placed = [(c * size) @ matrix + spot for c in contours]
        parts.append(part(*placed, slot=dice.integer(0, 4), relief=dice.uniform(0, 1.2)))
    return parts
