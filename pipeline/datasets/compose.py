"""Composition shared by all sets: sprites on a background, shadows, visible masks and boxes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

CLUTTER = -1
MIN_VISIBLE = 0.25  # objects of which less is seen are taken out of the picture
DIFFICULT_VISIBLE = 0.5  # below this an object counts as difficult
DIFFICULT_SIDE_PX = 8  # and so does one whose longer side is shorter than this
_SOLID = 0.35  # opacity from which a pixel belongs to the object's mask


@dataclass
class Sprite:
    """A cut-out on its own small canvas.

    Attributes:
        image: float32 (h, w, 3), BGR, 0..255.
        alpha: float32 (h, w), opacity 0..1.
    """

    image: np.ndarray
    alpha: np.ndarray


@dataclass
class Placed:
    """A sprite at a place; its corner may lie outside the picture.

    Attributes:
        sprite: What is painted.
        x: Column of its left edge.
        y: Row of its top edge.
        label: Class number, or CLUTTER.
        name: Which cut-out it shows, for the records.
    """

    sprite: Sprite
    x: int
    y: int
    label: int = CLUTTER
    name: str = ""


@dataclass(frozen=True)
class Annotation:
    """One labelled object.

    Attributes:
        label: Class number.
        box: x0, y0, x1, y1 in pixels, 0-based, the last two exclusive.
        truncated: Whether the border cuts it.
        difficult: Whether less than half of it is seen or it is tiny.
        visible: Visible share of its mask, 0..1.
    """

    label: int
    box: tuple[int, int, int, int]
    truncated: bool
    difficult: bool
    visible: float


@dataclass
class Scene:
    """A finished picture, uint8 (h, w, 3) BGR, with its labelled objects and their masks."""

    image: np.ndarray
    objects: list[Annotation] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)


def _overlap(item: Placed, shape: tuple[int, int]) -> tuple[slice, slice, slice, slice]:
    """Return rows and columns in the picture, then rows and columns in the sprite."""
    height, width = item.sprite.alpha.shape
    top, left = max(item.y, 0), max(item.x, 0)
    bottom = max(top, min(item.y + height, shape[0]))
    right = max(left, min(item.x + width, shape[1]))
    rows, columns = slice(top, bottom), slice(left, right)
    inner_rows = slice(top - item.y, bottom - item.y)
    return rows, columns, inner_rows, slice(left - item.x, right - item.x)


def visible_masks(items: Sequence[Placed], shape: tuple[int, int]) -> dict[int, np.ndarray]:
    """Return where each labelled item is seen, in picture coordinates, keyed by its position.

    Args:
        items: In painting order; later ones cover earlier ones.
        shape: Rows and columns of the picture.
    """
    free = np.ones(shape, dtype=np.float32)
    masks = {}
    for index in range(len(items) - 1, -1, -1):
        rows, columns, inner_rows, inner_columns = _overlap(items[index], shape)
        alpha = items[index].sprite.alpha[inner_rows, inner_columns]
        if items[index].label != CLUTTER:
            mask = np.zeros(shape, dtype=bool)
            mask[rows, columns] = alpha * free[rows, columns] > _SOLID
            masks[index] = mask
        free[rows, columns] *= 1 - alpha
    return masks


def settle(
    items: Sequence[Placed], shape: tuple[int, int]
) -> tuple[list[Placed], list[Annotation], list[np.ndarray]]:
    """Take out objects that are hardly seen, then measure the others.

    Returns:
        The items that stay, and for the labelled ones their annotations and visible masks.
    """
    stay = list(items)
    while True:
        masks = visible_masks(stay, shape)
        seen = {i: int(masks[i].sum()) for i in masks}
        whole = {i: int((stay[i].sprite.alpha > _SOLID).sum()) for i in masks}
        hidden = [i for i in masks if seen[i] < max(MIN_VISIBLE * whole[i], 4)]
        if not hidden:
            break
        del stay[max(hidden, key=lambda i: 1 - seen[i] / max(whole[i], 1))]
    order = sorted(masks)
    annotations = [_annotate(stay[i], masks[i], seen[i] / whole[i]) for i in order]
    return stay, annotations, [masks[i] for i in order]


def _annotate(item: Placed, mask: np.ndarray, visible: float) -> Annotation:
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    solid = item.sprite.alpha > _SOLID
    inner_rows, inner_columns = _overlap(item, mask.shape)[2:]
    truncated = int(solid[inner_rows, inner_columns].sum()) < int(solid.sum())
    tiny = max(box[2] - box[0], box[3] - box[1]) < DIFFICULT_SIDE_PX
    difficult = visible < DIFFICULT_VISIBLE or tiny
    return Annotation(item.label, box, truncated, difficult, visible)


def paint(
    background: np.ndarray,
    items: Sequence[Placed],
    shadow: tuple[float, float, float] = (0, 0, 0),
) -> np.ndarray:
    """Paint the items one after another over a copy of the background.

    Args:
        background: float32 (h, w, 3).
        items: In painting order.
        shadow: Drop shadow: shift right and down, both as a share of the sprite's size, and
            darkness 0..1.
    Returns:
        float32 (h, w, 3), not yet clipped.
    """
    canvas = background.astype(np.float32, copy=True)
    shape = canvas.shape[:2]
    for item in items:
        if shadow[2] > 0:
            _cast_shadow(canvas, item, shadow)
        rows, columns, inner_rows, inner_columns = _overlap(item, shape)
        alpha = item.sprite.alpha[inner_rows, inner_columns, None]
        patch = canvas[rows, columns]
        patch += alpha * (item.sprite.image[inner_rows, inner_columns] - patch)
    return canvas


def _cast_shadow(canvas: np.ndarray, item: Placed, shadow: tuple[float, float, float]) -> None:
    """Darken the canvas beside an item, in place."""
    size = max(item.sprite.alpha.shape)
    radius = max(1, round(size * 0.05))
    padded = np.pad(item.sprite.alpha, radius)
    dark = cv2.blur(padded, (2 * radius + 1, 2 * radius + 1))
    x = item.x - radius + round(shadow[0] * size)
    y = item.y - radius + round(shadow[1] * size)
    ghost = Placed(Sprite(dark, dark), x, y)
    rows, columns, inner_rows, inner_columns = _overlap(ghost, canvas.shape[:2])
    canvas[rows, columns] *= 1 - shadow[2] * dark[inner_rows, inner_columns, None]


def draw_place(
    rng: np.random.Generator,
    size: tuple[int, int],
    shape: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
    cut_chance: float = 0.25,
) -> tuple[int, int]:
    """Draw a corner for a sprite, with few overlaps and sometimes across the border.

    Args:
        rng: Source of random numbers.
        size: Rows and columns of the sprite.
        shape: Rows and columns of the picture.
        taken: Boxes (x, y, height, width) of earlier sprites; the new one is added.
        cut_chance: How often up to 45 % of a side may lie outside.
    Returns:
        x, y of the sprite's corner.
    """
    slack = [0.45 * s if rng.random() < cut_chance else 0.0 for s in size]
    best, best_cover = (0, 0), np.inf
    for _ in range(6):
        spot = []
        for length, room, over in zip(size, shape, slack, strict=True):
            low, high = -over, room - length + over
            spot.append(round(rng.uniform(min(low, high), max(low, high))))
        cover = max((_cover(spot, size, other) for other in taken), default=0.0)
        if cover < best_cover:
            best, best_cover = (spot[1], spot[0]), cover
        if cover < 0.2:
            break
    taken.append((best[0], best[1], *size))
    return best


def _cover(spot: list[int], size: tuple[int, int], other: tuple[int, int, int, int]) -> float:
    """Return the overlap of two boxes as a share of the smaller one."""
    x, y, height, width = other
    rows = min(spot[0] + size[0], y + height) - max(spot[0], y)
    columns = min(spot[1] + size[1], x + width) - max(spot[1], x)
    smaller = max(1, min(size[0] * size[1], height * width))
    return max(rows, 0) * max(columns, 0) / smaller
