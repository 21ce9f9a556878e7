"""What all generated pictures share: options, random numbers, composition, boxes, camera.

A picture is a function of a set's options, its part of the set and its index: the same for any
number of workers.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from tqdm import tqdm

from common.annotations import record
from common.annotations.record import ObjectRecord
from common.parent_death import exit_with_parent
from pipeline.datasets.sets import Card, SetOptions, make_set

CLUTTER = -1
MIN_VISIBLE = 0.25  # objects of which less is seen are taken out of the picture
DIFFICULT_VISIBLE = 0.5  # below this an object counts as difficult
DIFFICULT_SIDE_PX = 8  # and so does one whose longer side is shorter than this
_CHUNK = 32  # pictures per task
_SOLID = 0.35  # opacity from which a pixel belongs to the object's mask

# -- pictures -------------------------------------------------------------------------------------


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
    """

    sprite: Sprite
    x: int
    y: int
    label: int = CLUTTER


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


Range = tuple[float, float]


@dataclass(frozen=True)
class SceneSource(ABC):
    """Makes the pictures of a set.

    Attributes:
        options: Sizes and statistics.
        class_names: Classes in label order.
    """

    kind: ClassVar[str]  # names the source's random numbers, and the set in dataset.json
    options: SetOptions
    class_names: tuple[str, ...]

    def scene(self, part: str, index: int) -> Scene:
        """Make picture `index` of "train", "test", "pool", "probe/train" or "probe/val".

        Every picture shows at least one object: one whose objects are all hidden is made anew.
        """
        for attempt in range(100):
            rng = generator(self.options.seed, self.kind, part, index, attempt)
            scene = self._attempt(rng, part, index)
            if scene.objects:
                return scene
        raise RuntimeError(f"{part} picture {index}: no object stays visible; lower --clutter")

    @abstractmethod
    def _attempt(self, rng: np.random.Generator, part: str, index: int) -> Scene:
        """Make one picture; it may show nothing."""

    def place_objects(
        self, rng: np.random.Generator, shape: tuple[int, int], part: str, index: int,
        draw: Callable[[int, Range], Sprite],
    ) -> list[Placed]:  # fmt: skip
        """Draw and place as many objects as the options say for a part.

        Args:
            rng: Source of random numbers.
            shape: Rows and columns of the picture.
            part: Part of the set.
            index: Number of the picture.
            draw: Makes an object from its label and the range of sizes (shares of the short side).
        """
        options, is_probe = self.options, part.startswith("probe/")
        sizes = (options.pool_min_object, options.pool_max_object)
        counts = (options.pool_min_objects, options.pool_max_objects)
        if part in ("train", "test"):
            sizes = (options.min_object, options.max_object)
            counts = (options.min_objects, options.max_objects)
        items: list[Placed] = []
        taken: list[tuple[int, int, int, int]] = []
        for _ in range(1 if is_probe else int(rng.integers(counts[0], counts[1] + 1))):
            label = index % len(self.class_names)  # probe pictures show all classes in turn
            if not is_probe:
                label = int(rng.integers(len(self.class_names)))
            sprite = draw(label, sizes)
            x, y = draw_place(rng, sprite.alpha.shape, shape, taken, 0.1 if is_probe else 0.25)
            items.append(Placed(sprite, x, y, label))
        return items


def is_held_out(part: str) -> bool:
    """Tell whether a part shows objects, materials and scenes kept from training."""
    return part in ("test", "probe/val")


# -- random numbers -------------------------------------------------------------------------------


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


def draw_shape(rng: np.random.Generator, options: SetOptions) -> tuple[int, int]:
    """Return rows and columns of a picture: lying or upright with equal chance."""
    short, long = options.short_side, options.long_side
    return (short, long) if rng.random() < 0.5 else (long, short)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform between two bounds."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def rotation(angle: float) -> np.ndarray:
    """Return the matrix (2, 2) that turns a column (x, y) by an angle in radians."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def warped(image: np.ndarray, matrix: np.ndarray, interpolation: int) -> np.ndarray:
    """Return a picture under a linear map (2, 2), centred on a canvas that holds all of it."""
    height, width = image.shape[:2]
    columns, rows = (int(side) + 2 for side in np.ceil(np.abs(matrix) @ (width, height)))
    shift = np.array([columns, rows]) / 2 - matrix @ (width / 2, height / 2)
    warp = np.concatenate([matrix, shift[:, None]], axis=1)
    return cv2.warpAffine(image, warp, (columns, rows), flags=interpolation)


# -- composition ----------------------------------------------------------------------------------


Window = tuple[slice, slice]
"""Rows and columns."""


def _overlap(item: Placed, shape: tuple[int, int]) -> tuple[Window, Window]:
    """Return where an item lies in the picture, and which part of its sprite that is."""
    height, width = item.sprite.alpha.shape
    top, left = max(item.y, 0), max(item.x, 0)
    bottom = max(top, min(item.y + height, shape[0]))
    right = max(left, min(item.x + width, shape[1]))
    inner = slice(top - item.y, bottom - item.y), slice(left - item.x, right - item.x)
    return (slice(top, bottom), slice(left, right)), inner


def settle(
    items: Sequence[Placed], shape: tuple[int, int]
) -> tuple[list[Placed], list[Annotation], list[np.ndarray]]:
    """Take out objects that are hardly seen, then measure the others.

    Args:
        items: In painting order; later ones cover earlier ones.
        shape: Rows and columns of the picture.
    Returns:
        The items that stay, and for the labelled ones their annotations and visible masks.
    """
    stay = list(items)
    while True:
        # Where each labelled item is seen, from the front to the back.
        free = np.ones(shape, dtype=np.float32)
        masks: dict[int, np.ndarray] = {}
        for i in range(len(stay) - 1, -1, -1):
            outer, inner = _overlap(stay[i], shape)
            alpha = stay[i].sprite.alpha[inner]
            if stay[i].label != CLUTTER:
                masks[i] = np.zeros(shape, dtype=bool)
                masks[i][outer] = alpha * free[outer] > _SOLID
            free[outer] *= 1 - alpha
        seen = {i: int(masks[i].sum()) for i in masks}
        whole = {i: int((stay[i].sprite.alpha > _SOLID).sum()) for i in masks}
        hidden = [i for i in masks if seen[i] < max(MIN_VISIBLE * whole[i], 4)]
        if not hidden:
            break
        del stay[max(hidden, key=lambda i: 1 - seen[i] / max(whole[i], 1))]
    annotations = []
    for i in sorted(masks):
        columns, rows = (np.flatnonzero(masks[i].any(axis=axis)) for axis in (0, 1))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        inside = stay[i].sprite.alpha[_overlap(stay[i], shape)[1]] > _SOLID
        truncated, visible = int(inside.sum()) < whole[i], seen[i] / whole[i]
        tiny = max(box[2] - box[0], box[3] - box[1]) < DIFFICULT_SIDE_PX
        difficult = visible < DIFFICULT_VISIBLE or tiny
        annotations.append(Annotation(stay[i].label, box, truncated, difficult, visible))
    return stay, annotations, [masks[i] for i in sorted(masks)]


def filled(shape: tuple[int, int], contours: Sequence[np.ndarray]) -> np.ndarray:
    """Return a mask, uint8 of `shape`: outlines filled by the even-odd rule, antialiased."""
    mask = np.zeros(shape, dtype=np.uint8)
    points = [np.round(contour * 16).astype(np.int32) for contour in contours]
    cv2.fillPoly(mask, points, 255, lineType=cv2.LINE_AA, shift=4)
    return mask


def paint(
    background: np.ndarray, items: Sequence[Placed], shadow: tuple[float, float, float] = (0, 0, 0)
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
            size = max(item.sprite.alpha.shape)
            radius = max(1, round(size * 0.05))
            dark = cv2.blur(np.pad(item.sprite.alpha, radius), (2 * radius + 1, 2 * radius + 1))
            x = item.x - radius + round(shadow[0] * size)
            y = item.y - radius + round(shadow[1] * size)
            outer, inner = _overlap(Placed(Sprite(dark, dark), x, y), shape)
            canvas[outer] *= 1 - shadow[2] * dark[inner][..., None]
        outer, inner = _overlap(item, shape)
        patch = canvas[outer]
        patch += item.sprite.alpha[inner][..., None] * (item.sprite.image[inner] - patch)
    return canvas


def draw_place(
    rng: np.random.Generator, size: tuple[int, int], shape: tuple[int, int],
    taken: list[tuple[int, int, int, int]], cut_chance: float = 0.25,
) -> tuple[int, int]:  # fmt: skip
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
        spans = [(-o, room - side + o) for side, room, o in zip(size, shape, slack, strict=True)]
        spot = [round(rng.uniform(min(span), max(span))) for span in spans]
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


def finish(rng: np.random.Generator, image: np.ndarray, cast: float = 0.1) -> np.ndarray:
    """Apply the camera: colour cast, exposure, a little blur and noise.

    Args:
        rng: Source of random numbers.
        image: float32 (h, w, 3), about 0..255; changed in place.
        cast: Largest relative change of one channel against the others.
    Returns:
        uint8 of the same shape.
    """
    image *= (rng.uniform(0.85, 1.2) * rng.uniform(1 - cast, 1 + cast, 3)).astype(np.float32)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    sigma = np.float32(rng.uniform(0, 6))
    image += sigma * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


# -- sets -----------------------------------------------------------------------------------------


def build(source: SceneSource, card: Card, out: Path, num_workers: int, overwrite: bool) -> bool:
    """Write a generated set to `out`.

    Args:
        source: Makes the pictures.
        card: Goes into dataset.json.
        out: Folder to make.
        num_workers: Processes; 1 works in this one.
        overwrite: Whether a set made with other options is replaced.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: If `out` holds something else.
        OSError: If the disk is full.
        RuntimeError: If a worker was killed.
    """

    def fill(root: Path) -> None:
        record.make_folders(root / record.YEAR_FOLDER)
        (root / "pool").mkdir()
        for split, name in product(("train", "val"), source.class_names):
            (root / "probe" / split / name).mkdir(parents=True)
        _render_all(source, root, num_workers)
        counts = source.options.counts()
        splits = {split: counts[split] for split in ("train", "test")}
        for split, count in splits.items():
            names = [f"{split}_{index:06d}" for index in range(count)]
            record.write_list(root / record.YEAR_FOLDER, split, names)
        card.write(
            root,
            classes=source.class_names,
            metric_year=2012,  # area under the precision-recall curve, not VOC2007's 11 points
            splits=splits,
            pool=counts["pool"],
            probe={split: counts[f"probe/{split}"] for split in ("train", "val")},
        )

    return make_set(card, out, overwrite, fill)


def _render_all(source: SceneSource, root: Path, num_workers: int) -> None:
    counts = source.options.counts()
    tasks = [
        (part, range(start, min(start + _CHUNK, count)))
        for part, count in counts.items()
        for start in range(0, count, _CHUNK)
    ]
    render = partial(_render_chunk, source, root)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # ends OpenCV's threads: a forked worker would wait for them for ever
    try:
        with (
            tqdm(total=sum(counts.values()), unit="img", desc=root.stem) as bar,
            ProcessPoolExecutor(num_workers, initializer=exit_with_parent) as pool,
        ):
            run = map if num_workers == 1 else pool.map
            for num_done in run(render, *zip(*tasks, strict=True)):
                bar.update(num_done)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed (out of memory?): run again, with a smaller --num-workers"
        ) from error
    finally:
        cv2.setNumThreads(threads)


def _render_chunk(source: SceneSource, root: Path, part: str, indices: range) -> int:
    """Make pictures and write each where its part belongs; return how many."""
    classes, quality = source.class_names, source.options.quality
    for index in indices:
        scene = source.scene(part, index)
        if part in ("train", "test"):
            write_scene(root, f"{part}_{index:06d}", scene, classes, quality)
        elif part == "pool":
            write_picture(root / part / f"{index:07d}.jpg", scene.image, quality)
        else:
            name = classes[index % len(classes)]
            write_picture(root / part / name / f"{index:06d}.jpg", scene.image, quality)
    return len(indices)


def write_scene(root: Path, name: str, scene: Scene, classes: Sequence[str], quality: int) -> None:
    """Write one labelled picture below a devkit's root.

    Args:
        root: Folder that holds VOC2007.
        name: Picture name without ending.
        scene: Picture and objects.
        classes: Class names in label order.
        quality: JPEG quality, 1..100.
    Raises:
        OSError: If the disk does not take it.
    """
    folder = root / record.YEAR_FOLDER
    write_picture(folder / "JPEGImages" / f"{name}.jpg", scene.image, quality)
    height, width = scene.image.shape[:2]
    objects = []
    for item in scene.objects:
        marks = {"difficult": item.difficult, "truncated": item.truncated}
        objects.append(ObjectRecord(classes[item.label], item.box, **marks))
    xml = record.annotation_xml(f"{name}.jpg", width, height, objects)
    record.annotation_file(folder, name).write_bytes(xml)


def write_picture(path: Path, image: np.ndarray, quality: int = 100) -> None:
    """Write a picture, uint8 [h, w, 3] BGR or [h, w], in the format that its name ends in."""
    done, data = cv2.imencode(path.suffix, image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, path
    path.write_bytes(data.tobytes())
