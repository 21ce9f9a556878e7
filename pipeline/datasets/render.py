"""From the parts of a shape to an antialiased, textured and shaded sprite."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.datasets import materials
from pipeline.datasets.compose import Sprite
from pipeline.datasets.shapes import DARK, LIGHT, Part

_NEIGHBOURS = np.ones((3, 3), dtype=np.uint8)
_SHIFT = 4  # fractional bits of the coordinates handed to cv2.fillPoly


@dataclass(frozen=True)
class Light:
    """Where the light of a picture comes from.

    Attributes:
        x: Horizontal part of the direction towards the light, -1..1.
        y: Vertical part, -1..1, negative is above.
        strength: Contrast of the shading, 0..1.
    """

    x: float
    y: float
    strength: float


def pose(
    rng: np.random.Generator, parts: Sequence[Part], size: float, max_turn: float
) -> list[Part]:
    """Turn, mirror, shear and slightly foreshorten a shape, then scale it.

    Args:
        rng: Source of random numbers.
        parts: The shape in object units.
        size: Longer side of the result in pixels.
        max_turn: Largest rotation in degrees either way.
    Returns:
        The parts in pixels, the top left corner of their bounding box at 0, 0.
    """
    turn = np.deg2rad(rng.uniform(-max_turn, max_turn))
    mirror = 1.0 if rng.random() < 0.5 else -1.0
    shear, squeeze = rng.uniform(-0.15, 0.15), rng.uniform(0.85, 1.15)
    keystone = rng.uniform(-0.12, 0.12)
    linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = linear @ np.array([[mirror * squeeze, shear], [0, 1 / squeeze]])
    moved = []
    for part in parts:
        contours = []
        for points in part.contours:
            narrowed = points * (1 + keystone * points[:, 1:]) ** np.array([1, 0])
            contours.append(narrowed @ linear.T)
        moved.append(contours)
    everything = np.concatenate([points for contours in moved for points in contours])
    corner, extent = everything.min(axis=0), np.ptp(everything, axis=0).max()
    scale = size / max(extent, 1e-6)
    return [
        Part([(points - corner) * scale for points in contours], part.slot, part.relief)
        for contours, part in zip(moved, parts, strict=True)
    ]


class Wardrobe:
    """The materials of one object, made when a part first asks for its slot."""

    def __init__(
        self,
        rng: np.random.Generator,
        shape: tuple[int, int],
        held_out: bool,
        habit: materials.Habit,
    ) -> None:
        """Remember what to draw from; `shape` is the sprite's rows and columns."""
        self._rng, self._shape, self._held_out, self._habit = rng, shape, held_out, habit
        self._made: dict[int, np.ndarray] = {}

    def __getitem__(self, slot: int) -> np.ndarray:
        """Return the material of a slot, float32 of the sprite's shape."""
        if slot not in self._made:
            height, width = self._shape
            if slot in (DARK, LIGHT):
                level = (0.25, 0.1) if slot == DARK else (0.35, 0.55)
                tint = materials.colour(self._rng) * np.float32(level[0])
                plain = tint + np.float32(255 * level[1])
                self._made[slot] = np.broadcast_to(plain, (height, width, 3))
            else:
                unit = max(height, width)
                made = materials.surface(
                    self._rng, height, width, unit, self._held_out, self._habit
                )
                self._made[slot] = made
        return self._made[slot]


def _part_mask(part: Part, canvas: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """Return the mask (uint8) of a part on its own bounding box, and that box's corner x, y."""
    everything = np.concatenate(list(part.contours))
    left, top = np.maximum(np.floor(everything.min(axis=0)).astype(int) - 1, 0)
    right, bottom = np.ceil(everything.max(axis=0)).astype(int) + 2
    right, bottom = min(right, canvas[1]), min(bottom, canvas[0])
    mask = np.zeros((max(bottom - top, 1), max(right - left, 1)), dtype=np.uint8)
    scaled = [
        np.round((points - (left, top)) * (1 << _SHIFT)).astype(np.int32)
        for points in part.contours
    ]
    cv2.fillPoly(mask, scaled, 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    return mask, int(left), int(top)


def _relief(mask: np.ndarray, light: Light, amount: float) -> np.ndarray:
    """Return the brightness factor (h, w) of a part that bulges towards the viewer."""
    radius = max(1, round(0.12 * min(mask.shape)))
    padded = np.pad(mask, radius + 1)
    soft = cv2.blur(padded, (2 * radius + 1, 2 * radius + 1)).astype(np.float32)
    dx, dy = round(light.x * radius), round(light.y * radius)
    height, width = mask.shape
    base = radius + 1

    def window(x: int, y: int) -> np.ndarray:
        return soft[base + y : base + y + height, base + x : base + x + width]

    # Towards the light the blurred mask falls off: lit; away from it: in the shade.
    slope = window(-dx, -dy) - window(dx, dy)
    return 1 + np.float32(amount * light.strength / 255) * slope


def draw(
    rng: np.random.Generator,
    parts: Sequence[Part],
    light: Light,
    held_out: bool,
    habit: materials.Habit = materials.NO_HABIT,
) -> Sprite:
    """Draw posed parts as a sprite.

    Args:
        rng: Source of random numbers for the materials.
        parts: The shape in pixels, as `pose` returns it.
        light: The light of the picture.
        held_out: Whether to use the materials kept for the test.
        habit: What such things are typically made of.
    """
    far = np.concatenate([c for part in parts for c in part.contours]).max(axis=0)
    shape = (int(np.ceil(far[1])) + 3, int(np.ceil(far[0])) + 3)
    image = np.zeros((*shape, 3), dtype=np.float32)
    alpha = np.zeros(shape, dtype=np.float32)
    wardrobe = Wardrobe(rng, shape, held_out, habit)
    outline = rng.uniform(0.0, 0.35) if rng.random() < 0.6 else 0.0
    for part in parts:
        shifted = Part([points + 1 for points in part.contours], part.slot, part.relief)
        mask, x, y = _part_mask(shifted, shape)
        rows, columns = slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1])
        paint = wardrobe[part.slot][rows, columns]
        if part.relief > 0:
            paint = paint * _relief(mask, light, part.relief)[:, :, None]
        cover = mask.astype(np.float32) * np.float32(1 / 255)
        target = image[rows, columns]
        if outline:
            rim = cv2.dilate(cover, _NEIGHBOURS)
            target *= (1 - outline * rim)[:, :, None]
        target += cover[:, :, None] * (paint - target)
        below = alpha[rows, columns]
        below += cover * (1 - below)
    if light.strength > 0.3 and rng.random() < 0.4:
        _highlight(rng, image, alpha, light)
    return Sprite(_spread(image, alpha), alpha)


def _spread(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Undo the darkening of half covered edge pixels, whose colour was mixed with black."""
    return image / np.maximum(alpha, 0.05)[:, :, None]


def _highlight(
    rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray, light: Light
) -> None:
    """Add a soft gloss towards the light, in place."""
    height, width = alpha.shape
    x = (0.5 + 0.25 * light.x) * width
    y = (0.5 + 0.25 * light.y) * height
    radius = max(2.0, 0.2 * min(height, width))
    gloss_x = np.exp(-(((np.arange(width) - x) / radius) ** 2)).astype(np.float32)
    gloss_y = np.exp(-(((np.arange(height) - y) / radius) ** 2)).astype(np.float32)
    gloss = np.outer(gloss_y, gloss_x) * alpha * np.float32(rng.uniform(20, 90))
    image += gloss[:, :, None]
