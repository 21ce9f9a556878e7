"""Generated scenes: ten classes told apart by structure, in random materials, light and clutter."""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import cv2
import numpy as np

from pipeline.datasets import render, scene, shapes
from pipeline.datasets.scene import Placed, Range, Scene, SceneSource, Sprite, log_uniform

VERSION = 4  # raise it whenever the pictures of given options change
_MAX_TURN = 25.0  # degrees; one object in twelve may be turned by any angle


@dataclass(frozen=True)
class ProceduralSource(SceneSource):
    """Makes the pictures of a generated set.

    Attributes:
        options: Sizes and statistics.
        class_names: Which classes occur, in label order.
        shifted_test: Whether test and probe/val also have materials and backdrops of their
            own; their objects' shapes are unseen in any case.
        material_habit: How strongly textures follow the class, 0 (not at all) to 1; a shifted test
            world has no habits.
    """

    kind: ClassVar[str] = "procedural"
    class_names: tuple[str, ...] = tuple(shapes.CLASSES)
    shifted_test: bool = False
    material_habit: float = 0.0

    def _attempt(self, rng: np.random.Generator, part: str, index: int) -> Scene:
        shifted = self.shifted_test and scene.is_held_out(part)
        shape = scene.draw_shape(rng, self.options)
        angle = rng.uniform(np.pi * 1.05, np.pi * 1.95)  # light comes from above
        strength = rng.uniform(0.15, 0.8)
        light = render.Light(float(np.cos(angle)), float(np.sin(angle)), strength)
        background = _background(rng, shape, shifted)

        def draw(label: int, sizes: Range) -> Sprite:
            size = min(shape) * log_uniform(rng, *sizes)
            dice = shapes.ShapeDice(rng, scene.is_held_out(part))
            parts = shapes.CLASSES[self.class_names[label]](dice)
            turn = 180.0 if rng.random() < 1 / 12 else _MAX_TURN
            habit = render.habit_of(label, 0.0 if shifted else self.material_habit)
            return render.draw(rng, render.pose(rng, parts, size, turn), light, shifted, habit)

        def clutter(mean: float, largest: float) -> list[Placed]:
            items = []
            for _ in range(min(int(rng.poisson(self.options.clutter * mean)), 12)):
                size = min(shape) * log_uniform(rng, 0.08, largest)
                parts = shapes.distractor(shapes.ShapeDice(rng, shifted))
                sprite = render.draw(rng, render.pose(rng, parts, size, 180), light, shifted)
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


def _background(rng: np.random.Generator, shape: tuple[int, int], shifted: bool) -> np.ndarray:
    """Paint a cluttered backdrop, float32 (h, w, 3); test pictures have layouts of their own."""
    height, width = shape
    unit = 0.8 * max(shape)
    canvas = render.surface(rng, height, width, unit, shifted).copy()
    layouts = (_shelves, _mosaic) if shifted else (_room, _cuttings, _bokeh)
    pick = int(rng.integers(len(layouts) + 1))
    if pick < len(layouts):
        layouts[pick](rng, canvas, shifted)
    shade = rng.uniform(0.75, 1.25, (2, 2)).astype(np.float32)
    lit = cv2.resize(shade, (width, height), interpolation=cv2.INTER_LINEAR)
    canvas *= lit[:, :, None]
    return canvas


def _fill(rng: np.random.Generator, canvas: np.ndarray, corners: np.ndarray, shifted: bool) -> None:
    """Fill a polygon (pixels) of the canvas with a new material, in place."""
    height, width = canvas.shape[:2]
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, (width - 1, height - 1))
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 1, (width, height))
    if right <= left or bottom <= top:
        return
    mask = scene.filled((bottom - top, right - left), [corners - (left, top)])
    share = mask[:, :, None] * np.float32(1 / 255)
    unit = 0.8 * max(canvas.shape[:2])
    paint = render.surface(rng, bottom - top, right - left, unit, shifted)
    target = canvas[top:bottom, left:right]
    target += share * (paint - target)


def _room(rng: np.random.Generator, canvas: np.ndarray, shifted: bool) -> None:
    """A floor below a tilted line, sometimes a second wall."""
    height, width = canvas.shape[:2]
    left, right = rng.uniform(0.35, 0.85, 2) * height
    floor = shapes.polygon((0, left), (width, right), (width, height), (0, height))
    _fill(rng, canvas, floor, shifted)
    if rng.random() < 0.5:
        edge = rng.uniform(0.2, 0.8) * width
        wall = shapes.polygon((0, 0), (edge, 0), (edge, (left + right) / 2), (0, left))
        _fill(rng, canvas, wall, shifted)


def _cuttings(rng: np.random.Generator, canvas: np.ndarray, shifted: bool) -> None:
    """Large smooth patches over each other."""
    height, width = canvas.shape[:2]
    for _ in range(int(rng.integers(2, 6))):
        size = rng.uniform(0.15, 0.6) * max(height, width)
        patch = shapes.blob(rng, int(rng.integers(4, 9)), 0.6) * size
        _fill(rng, canvas, patch + rng.random(2) * (width, height), shifted)


def _bokeh(rng: np.random.Generator, canvas: np.ndarray, shifted: bool) -> None:
    """An out-of-focus backdrop."""
    _cuttings(rng, canvas, shifted)
    radius = round(rng.uniform(0.02, 0.08) * min(canvas.shape[:2]))
    canvas[:] = cv2.blur(canvas, (2 * radius + 1, 2 * radius + 1))


def _shelves(rng: np.random.Generator, canvas: np.ndarray, shifted: bool) -> None:
    """Horizontal or upright boards at random distances."""
    height, width = canvas.shape[:2]
    upright = rng.random() < 0.3
    room, length = (width, height) if upright else (height, width)
    for spot in rng.random(int(rng.integers(2, 5))) * room:
        thick, tilt = rng.uniform(0.03, 0.2) * room, rng.uniform(-0.1, 0.1) * room
        end = spot + tilt
        board = shapes.polygon((0, spot), (length, end), (length, end + thick), (0, spot + thick))
        _fill(rng, canvas, board[:, ::-1] if upright else board, shifted)


def _mosaic(rng: np.random.Generator, canvas: np.ndarray, shifted: bool) -> None:
    """A grid of cells, some in another material."""
    height, width = canvas.shape[:2]
    rows, columns = rng.integers(2, 4, 2)
    for row, column in product(range(rows), range(columns)):
        if rng.random() < 0.5:
            x0, x1 = np.array([column, column + 1]) * width / columns
            y0, y1 = np.array([row, row + 1]) * height / rows
            jitter = rng.uniform(-0.08, 0.08, (4, 2)) * (width, height)
            _fill(rng, canvas, shapes.rectangle(x0, y0, x1, y1) + jitter, shifted)
