"""Generated scenes: six classes told apart by structure, in random materials, light and clutter.

Colours know nothing of what wears them; textures may follow what it tends to be made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np

from pipeline.datasets import scene, shapes
from pipeline.datasets.scene import Placed, Range, Scene, SceneSource, Sprite
from pipeline.datasets.shapes import DARK, LIGHT, Part

VERSION = 4  # raise it whenever the pictures of given options change
_MAX_TURN = 25.0  # degrees; one object in twelve may be turned by any angle

# -- materials ------------------------------------------------------------------------------------

Image = np.ndarray


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


def stripes(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Parallel stripes, soft or sharp."""
    return _wave(_axes(rng, h, w, period)[0], rng.uniform(0.5, 3))


def checks(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Squares in turn."""
    u, v = _axes(rng, h, w, period)
    return np.clip(0.5 + 4 * np.sin(np.pi * 2 * u) * np.sin(np.pi * 2 * v), 0, 1)


def wood(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Stripes bent by noise."""
    u, _ = _axes(rng, h, w, period)
    return _wave(u + 1.5 * noise(rng, h, w, 3 * period, 2), 0.45)


def clouds(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Smooth noise."""
    return np.clip(2 * noise(rng, h, w, 2 * period, 3) - 0.5, 0, 1)


def speckle(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Small grains."""
    grain = noise(rng, h, w, max(1.5, period / 4), 1)
    return np.clip(6 * (grain - rng.uniform(0.55, 0.75)), 0, 1)


def dots(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Round dots on a grid."""
    u, v = _axes(rng, h, w, period)
    height = np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v)
    return np.clip(3 * (height - rng.uniform(0.3, 1.0)), 0, 1)


def zigzag(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Stripes bent to and fro."""
    u, v = _axes(rng, h, w, period)
    return _wave(u + rng.uniform(0.6, 1.4) * _triangle(v), 2)


def bricks(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Bricks in rows that are shifted by half a brick; the joints are 0."""
    u, v = _axes(rng, h, w, period)
    row = np.floor(v)
    column = u / 2 + 0.5 * (row - 2 * np.floor(row / 2))
    joint = np.minimum(0.5 - _triangle(v), 1.5 * (0.5 - _triangle(column)))
    return np.clip(12 * (joint - 0.05), 0, 1)


def patches(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Three levels of smooth noise."""
    field = noise(rng, h, w, 2 * period, 2)
    return np.floor(np.clip(6 * (field - 0.25), 0, 2.99)) / 2


def weave(rng: np.random.Generator, h: int, w: int, period: float) -> Image:
    """Two crossing waves."""
    u, v = _axes(rng, h, w, period)
    return np.maximum(_wave(u, 0.5), _wave(v, 0.5))


PLAIN_FAMILIES = ("plain", "gradient")
PATTERNS: dict[str, Callable[[np.random.Generator, int, int, float], Image]] = {
    make.__name__: make
    for make in (stripes, checks, wood, clouds, speckle, dots, zigzag, bricks, patches, weave)
}
FAMILIES = tuple(PATTERNS)
USUAL_FAMILIES = FAMILIES[:5]  # the others are worn by habit only


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
    """Return the habit of a class: two neighbouring families of all."""
    first = 2 * label + label // (len(FAMILIES) // 2)  # the sixth overlaps two others
    return Habit(tuple(FAMILIES[(first + i) % len(FAMILIES)] for i in range(2)), strength)


def pick_family(rng: np.random.Generator, habit: Habit) -> str:
    """Draw a texture family: a typical one, else 40 % plain or shaded and 60 % patterned."""
    families = habit.families
    if not habit.strength or rng.random() >= habit.strength:
        families = PLAIN_FAMILIES if rng.random() < 0.4 else USUAL_FAMILIES
    return families[int(rng.integers(len(families)))]


def surface(rng: np.random.Generator, h: int, w: int, unit: float, habit: Habit = Habit()) -> Image:
    """Paint a rectangle with a random material.

    Args:
        rng: Source of random numbers.
        h: Rows.
        w: Columns.
        unit: Size in pixels of what wears the material; patterns scale with it.
        habit: What the wearer is typically made of.
    Returns:
        float32 (h, w, 3), BGR in 0..255.
    """
    family = pick_family(rng, habit)
    first, second = colour(rng), colour(rng)
    if family == "plain":
        return np.broadcast_to(first, (h, w, 3)).astype(np.float32)
    if family == "gradient":
        share = np.clip(_axes(rng, h, w, max(h, w) * 1.2)[0], 0, 1)
        second = first * np.float32(0.5) + second * np.float32(0.5)
    else:
        period = max(3.0, unit * scene.log_uniform(rng, 0.06, 0.4))
        share = PATTERNS[family](rng, h, w, period)
        second = first + (second - first) * np.float32(rng.uniform(0.3, 1))
    return first + share.astype(np.float32)[:, :, None] * (second - first)


# -- sprites --------------------------------------------------------------------------------------

_NEIGHBOURS = np.ones((3, 3), dtype=np.uint8)


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
    linear = scene.rotation(turn) @ np.array([[mirror * squeeze, shear], [0, 1 / squeeze]])
    moved = [
        [
            points * (1 + keystone * points[:, 1:]) ** np.array([1, 0]) @ linear.T
            for points in part.contours
        ]
        for part in parts
    ]
    everything = np.concatenate([points for contours in moved for points in contours])
    corner, extent = everything.min(axis=0), np.ptp(everything, axis=0).max()
    scale = size / max(extent, 1e-6)
    return [
        Part([(points - corner) * scale for points in contours], part.slot, part.relief)
        for contours, part in zip(moved, parts, strict=True)
    ]


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


def draw_sprite(
    rng: np.random.Generator, parts: Sequence[Part], light: Light, habit: Habit = Habit()
) -> Sprite:
    """Draw posed parts as a sprite.

    Args:
        rng: Source of random numbers for the materials.
        parts: The shape in pixels, as `pose` returns it.
        light: The light of the picture.
        habit: What such things are typically made of.
    """
    far = np.concatenate([c for part in parts for c in part.contours]).max(axis=0)
    shape = (int(np.ceil(far[1])) + 3, int(np.ceil(far[0])) + 3)
    image = np.zeros((*shape, 3), dtype=np.float32)
    alpha = np.zeros(shape, dtype=np.float32)
    worn: dict[int, np.ndarray] = {}  # the materials, made when a part first wears them
    outline = rng.uniform(0.0, 0.35) if rng.random() < 0.6 else 0.0
    for part in parts:
        if part.slot in (DARK, LIGHT) and part.slot not in worn:
            share, grey = (0.25, 0.1) if part.slot == DARK else (0.35, 0.55)
            plain = colour(rng) * np.float32(share) + np.float32(255 * grey)
            worn[part.slot] = np.broadcast_to(plain, (*shape, 3))
        elif part.slot not in worn:
            worn[part.slot] = surface(rng, *shape, max(shape), habit)
        # The part's mask on its own bounding box.
        contours = [points + 1 for points in part.contours]
        corners = np.concatenate(contours)
        x, y = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 1, 0)
        right, bottom = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 2, shape[::-1])
        rows, columns = slice(y, max(bottom, y + 1)), slice(x, max(right, x + 1))
        size = (rows.stop - y, columns.stop - x)
        mask = scene.filled(size, [points - (x, y) for points in contours])
        paint = worn[part.slot][rows, columns]
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
        # A soft gloss towards the light.
        centre = (0.5 + 0.25 * light.y) * shape[0], (0.5 + 0.25 * light.x) * shape[1]
        radius = max(2.0, 0.2 * min(shape))
        gloss = [
            np.exp(-(((np.arange(side) - middle) / radius) ** 2)).astype(np.float32)
            for side, middle in zip(shape, centre, strict=True)
        ]
        gloss = np.outer(*gloss) * alpha * np.float32(rng.uniform(20, 90))
        image += gloss[:, :, None]
    # The colour of half covered edge pixels was mixed with black.
    return Sprite(image / np.maximum(alpha, 0.05)[:, :, None], alpha)


# -- scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProceduralSource(SceneSource):
    """Makes the pictures of a generated set.

    Attributes:
        options: Sizes and statistics.
        class_names: Which classes occur, in label order.
        material_habit: How strongly textures follow the class, 0 (not at all) to 1.
    """

    kind: ClassVar[str] = "procedural"
    class_names: tuple[str, ...] = tuple(shapes.CLASSES)
    material_habit: float = 0.0

    def _attempt(self, rng: np.random.Generator, part: str, index: int) -> Scene:
        shape = scene.draw_shape(rng, self.options)
        angle = rng.uniform(np.pi * 1.05, np.pi * 1.95)  # light comes from above
        strength = rng.uniform(0.15, 0.8)
        light = Light(float(np.cos(angle)), float(np.sin(angle)), strength)
        background = _background(rng, shape)

        def draw(label: int, sizes: Range) -> Sprite:
            size = min(shape) * scene.log_uniform(rng, *sizes)
            return self._object(rng, part, label, size, light)

        def clutter(mean: float, largest: float) -> list[Placed]:
            items = []
            for _ in range(min(int(rng.poisson(self.options.clutter * mean)), 12)):
                size = min(shape) * scene.log_uniform(rng, 0.08, largest)
                parts = shapes.distractor(shapes.ShapeDice(rng))
                sprite = draw_sprite(rng, pose(rng, parts, size, 180), light)
                x, y = scene.draw_place(rng, sprite.alpha.shape, shape, [], 0.5)
                items.append(Placed(sprite, x, y))
            return items

        # Behind the objects and in front of them.
        items = clutter(3.0, 0.55)
        items += self.place_objects(rng, shape, part, index, draw)
        items += clutter(0.4, 0.3)
        items, objects, masks = scene.settle(items, shape)
        darkness = rng.uniform(0.15, 0.6) if rng.random() < 0.75 else 0.0
        image = scene.paint(background, items, (-0.1 * light.x, -0.1 * light.y, darkness))
        return Scene(scene.finish(rng, image), objects, masks)

    def _object(
        self, rng: np.random.Generator, part: str, label: int, size: float, light: Light
    ) -> Sprite:
        """Draw an object of a class, its longer side `size` pixels."""
        dice = shapes.ShapeDice(rng, scene.is_held_out(part))
        parts = shapes.CLASSES[self.class_names[label]](dice)
        turn = 180.0 if rng.random() < 1 / 12 else _MAX_TURN
        habit = habit_of(label, self.material_habit)
        return draw_sprite(rng, pose(rng, parts, size, turn), light, habit)


def _background(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Paint a cluttered backdrop, float32 (h, w, 3)."""
    height, width = shape
    unit = 0.8 * max(shape)
    canvas = surface(rng, height, width, unit).copy()
    layouts = (_room, _cuttings, _bokeh)
    pick = int(rng.integers(len(layouts) + 1))
    if pick < len(layouts):
        layouts[pick](rng, canvas)
    shade = rng.uniform(0.75, 1.25, (2, 2)).astype(np.float32)
    lit = cv2.resize(shade, (width, height), interpolation=cv2.INTER_LINEAR)
    canvas *= lit[:, :, None]
    return canvas


def _fill(rng: np.random.Generator, canvas: np.ndarray, corners: np.ndarray) -> None:
    """Fill a polygon (pixels) of the canvas with a new material, in place."""
    height, width = canvas.shape[:2]
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, (width - 1, height - 1))
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 1, (width, height))
    if right <= left or bottom <= top:
        return
    mask = scene.filled((bottom - top, right - left), [corners - (left, top)])
    share = mask[:, :, None] * np.float32(1 / 255)
    unit = 0.8 * max(canvas.shape[:2])
    paint = surface(rng, bottom - top, right - left, unit)
    target = canvas[top:bottom, left:right]
    target += share * (paint - target)


def _room(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """A floor below a tilted line, sometimes a second wall."""
    height, width = canvas.shape[:2]
    left, right = rng.uniform(0.35, 0.85, 2) * height
    floor = shapes.polygon((0, left), (width, right), (width, height), (0, height))
    _fill(rng, canvas, floor)
    if rng.random() < 0.5:
        edge = rng.uniform(0.2, 0.8) * width
        wall = shapes.polygon((0, 0), (edge, 0), (edge, (left + right) / 2), (0, left))
        _fill(rng, canvas, wall)


def _cuttings(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Large smooth patches over each other."""
    height, width = canvas.shape[:2]
    for _ in range(int(rng.integers(2, 6))):
        size = rng.uniform(0.15, 0.6) * max(height, width)
        patch = shapes.blob(rng, int(rng.integers(4, 9)), 0.6) * size
        _fill(rng, canvas, patch + rng.random(2) * (width, height))


def _bokeh(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """An out-of-focus backdrop."""
    _cuttings(rng, canvas)
    radius = round(rng.uniform(0.02, 0.08) * min(canvas.shape[:2]))
    canvas[:] = cv2.blur(canvas, (2 * radius + 1, 2 * radius + 1))
