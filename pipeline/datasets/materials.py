"""Surfaces: colours know nothing of their wearer, textures what it tends to be made of."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

Image = np.ndarray

SHARED_FAMILIES = ("plain", "gradient")
TRAIN_FAMILIES = ("stripes", "checks", "wood", "clouds", "speckle")
TEST_FAMILIES = ("dots", "zigzag", "bricks", "patches", "weave")


def colour(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour (BGR, 0..255, float32) whose hue, saturation and value are independent."""
    hue = rng.integers(0, 180)
    saturation = round(15 + 215 * rng.random() ** 1.6)  # more muted than loud ones
    value = rng.integers(70, 255)
    pixel = np.array([[[hue, saturation, value]]], dtype=np.uint8)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def noise(rng: np.random.Generator, height: int, width: int, grain: float, octaves: int) -> Image:
    """Return smooth noise in about 0..1.

    Args:
        rng: Source of random numbers.
        height: Rows.
        width: Columns.
        grain: Size of the coarsest features in pixels.
        octaves: How many times finer features are added at half the strength.
    """
    total = np.zeros((height, width), dtype=np.float32)
    strength, weight = 1.0, 0.0
    for _ in range(octaves):
        rows = min(height, max(2, round(height / grain))) + 1
        columns = min(width, max(2, round(width / grain))) + 1
        grid = rng.random((rows, columns), dtype=np.float32)
        layer = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
        total += strength * layer
        weight += strength
        strength, grain = strength / 2, max(1.0, grain / 2)
    return total / weight


def _axes(rng: np.random.Generator, height: int, width: int, period: float) -> tuple[Image, Image]:
    """Return two perpendicular coordinates in periods, turned by a random angle."""
    angle = rng.uniform(0, np.pi)
    along, across = np.cos(angle) / period, np.sin(angle) / period
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    shift = rng.random(2)
    u = x * np.float32(along) + y * np.float32(across) + np.float32(shift[0])
    v = x * np.float32(-across) + y * np.float32(along) + np.float32(shift[1])
    return u, v


def _wave(u: Image, sharpness: float) -> Image:
    """Return a wave of period 1 in 0..1; a sharp one has flat tops."""
    return np.clip(0.5 + sharpness * np.sin(np.float32(2 * np.pi) * u), 0, 1)


def _triangle(v: Image) -> Image:
    return np.abs(v - np.floor(v) - 0.5)


def _stripes(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    return _wave(_axes(rng, h, w, period)[0], rng.uniform(0.5, 3))


def _checks(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    u, v = _axes(rng, h, w, period)
    return np.clip(0.5 + 4 * np.sin(np.pi * 2 * u) * np.sin(np.pi * 2 * v), 0, 1)


def _wood(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    u, _ = _axes(rng, h, w, period)
    return _wave(u + 1.5 * noise(rng, h, w, 3 * period, 2), 0.45)


def _clouds(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    return np.clip(2 * noise(rng, h, w, 2 * period, 3) - 0.5, 0, 1)


def _speckle(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    grain = noise(rng, h, w, max(1.5, period / 4), 1)
    return np.clip(6 * (grain - rng.uniform(0.55, 0.75)), 0, 1)


def _dots(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    u, v = _axes(rng, h, w, period)
    height = np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v)
    return np.clip(3 * (height - rng.uniform(0.3, 1.0)), 0, 1)


def _zigzag(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    u, v = _axes(rng, h, w, period)
    return _wave(u + rng.uniform(0.6, 1.4) * _triangle(v), 2)


def _bricks(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    u, v = _axes(rng, h, w, period)
    row = np.floor(v)
    column = u / 2 + 0.5 * (row - 2 * np.floor(row / 2))
    joint = np.minimum(0.5 - _triangle(v), 1.5 * (0.5 - _triangle(column)))
    return np.clip(12 * (joint - 0.05), 0, 1)


def _patches(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    field = noise(rng, h, w, 2 * period, 2)
    return np.floor(np.clip(6 * (field - 0.25), 0, 2.99)) / 2


def _weave(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    u, v = _axes(rng, h, w, period)
    return np.maximum(_wave(u, 0.5), _wave(v, 0.5))


_PATTERNS: dict[str, Callable[[np.random.Generator, int, int, float], Image]] = {
    "stripes": _stripes,
    "checks": _checks,
    "wood": _wood,
    "clouds": _clouds,
    "speckle": _speckle,
    "dots": _dots,
    "zigzag": _zigzag,
    "bricks": _bricks,
    "patches": _patches,
    "weave": _weave,
}


@dataclass(frozen=True)
class Habit:
    """What a class of things tends to be made of, as wood is typical of chairs.

    Attributes:
        families: Its typical texture families.
        strength: Probability that a material comes from them, 0..1.
    """

    families: tuple[str, ...] = ()
    strength: float = 0.0


def habit_of(label: int, strength: float) -> Habit:
    """Return the habit of a class: two neighbouring families of all; classes share families."""
    families = tuple(_PATTERNS)
    first = 2 * label + label // (len(families) // 2)  # the sixth class overlaps two others
    return Habit(tuple(families[(first + i) % len(families)] for i in range(2)), strength)


NO_HABIT = Habit()


def pick_family(rng: np.random.Generator, held_out: bool, habit: Habit = NO_HABIT) -> str:
    """Draw a texture family: a typical one, else 40 % plain or shaded and 60 % the part's own."""
    if habit.strength and rng.random() < habit.strength:
        return habit.families[int(rng.integers(len(habit.families)))]
    own = TEST_FAMILIES if held_out else TRAIN_FAMILIES
    families = SHARED_FAMILIES if rng.random() < 0.4 else own
    return families[int(rng.integers(len(families)))]


def surface(
    rng: np.random.Generator,
    h: int,
    w: int,
    unit: float,
    held_out: bool,
    habit: Habit = NO_HABIT,
) -> Image:
    """Paint a rectangle with a random material.

    Args:
        rng: Source of random numbers.
        h: Rows.
        w: Columns.
        unit: Size in pixels of what wears the material; patterns scale with it.
        held_out: Whether to use the families kept for the test.
        habit: What the wearer is typically made of.
    Returns:
        float32 (h, w, 3), BGR in 0..255.
    """
    family = pick_family(rng, held_out, habit)
    first, second = colour(rng), colour(rng)
    if family == "plain":
        return np.broadcast_to(first, (h, w, 3)).astype(np.float32)
    if family == "gradient":
        share = np.clip(_axes(rng, h, w, max(h, w) * 1.2)[0], 0, 1)
        second = first * np.float32(0.5) + second * np.float32(0.5)
    else:
        period = max(3.0, unit * float(np.exp(rng.uniform(np.log(0.06), np.log(0.4)))))
        share = _PATTERNS[family](rng, h, w, period)
        second = first + (second - first) * np.float32(rng.uniform(0.3, 1))
    return first + share.astype(np.float32)[:, :, None] * (second - first)
