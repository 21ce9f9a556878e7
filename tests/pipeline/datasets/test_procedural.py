"""Generated scenes: pure functions, honest boxes, classes told apart by shape and not by colour."""

import cv2
import numpy as np
import pytest

from pipeline.datasets import procedural, shapes
from pipeline.datasets import scene as composition
from pipeline.datasets.procedural import ProceduralSource
from pipeline.datasets.scene import Scene, generator
from pipeline.datasets.sets import SetOptions
from pipeline.datasets.shapes import HELD_OUT_BANDS, ShapeDice

SMALL = SetOptions(short_side=64, long_side=64, clutter=0.5)


NUM_CLASSES = len(shapes.CLASSES)


@pytest.fixture(scope="module")
def probes() -> dict[str, list[Scene]]:
    source = ProceduralSource(SMALL, material_habit=0.8)
    counts = {"probe/train": 100, "probe/val": 80}
    return {part: [source.scene(part, i) for i in range(n)] for part, n in counts.items()}


def nearest(train: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Classify by the nearest centroid."""
    centroids = np.stack([train[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    distances = ((queries[:, None] - centroids) ** 2).sum(axis=2)
    return distances.argmin(axis=1)


def accuracy(probes: dict[str, list[Scene]], feature) -> float:
    data = {part: np.stack([feature(s) for s in scenes]) for part, scenes in probes.items()}
    labels = {p: np.array([s.objects[0].label for s in scenes]) for p, scenes in probes.items()}
    found = nearest(data["probe/train"], labels["probe/train"], data["probe/val"])
    return float((found == labels["probe/val"]).mean())


def colours_of_object(scene: Scene) -> np.ndarray:
    pixels = scene.image[scene.masks[0]]
    bins = (pixels // 64) @ [16, 4, 1]
    return np.bincount(bins, minlength=64) / len(pixels)


def shape_of_object(scene: Scene) -> np.ndarray:
    x0, y0, x1, y1 = scene.objects[0].box
    mask = scene.masks[0][y0:y1, x0:x1].astype(np.float32)
    small = cv2.resize(mask, (12, 12), interpolation=cv2.INTER_AREA).ravel()
    return np.append(small, 3 * np.log((x1 - x0) / (y1 - y0)))


@pytest.mark.slow
def test_colour_does_not_give_the_class_away_but_shape_does(probes):
    assert accuracy(probes, colours_of_object) < 2.2 / NUM_CLASSES  # chance is half of it
    assert accuracy(probes, shape_of_object) > 0.6


def test_probe_pictures_show_one_object_and_all_classes_in_turn(probes):
    for scenes in probes.values():
        labels = [s.objects[0].label for s in scenes]
        assert labels == [i % NUM_CLASSES for i in range(len(scenes))]
        assert all(len(s.objects) == 1 for s in scenes)


def test_a_picture_is_a_function_of_seed_part_and_index():
    def image(seed: int, part: str, index: int) -> bytes:
        options = SetOptions(short_side=64, long_side=80, seed=seed)
        return ProceduralSource(options).scene(part, index).image.tobytes()

    assert image(1, "train", 5) == image(1, "train", 5)
    different = {image(1, "train", 5), image(2, "train", 5), image(1, "train", 6)}
    assert len(different | {image(1, "test", 5), image(1, "pool", 5)}) == 5


@pytest.mark.parametrize("part", ["train", "test", "pool"])
def test_boxes_fit_their_masks_and_pictures(part):
    source = ProceduralSource(SMALL)
    for index in range(15):
        scene = source.scene(part, index)
        height, width = scene.image.shape[:2]
        assert sorted((height, width)) == [64, 64]
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.objects) <= 3
        for item, mask in zip(scene.objects, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert item.box == box
            assert item.visible >= composition.MIN_VISIBLE
            assert item.difficult or item.visible >= composition.DIFFICULT_VISIBLE


def test_sizes_and_counts_follow_the_options():
    options = SetOptions(short_side=100, long_side=120, min_object=0.3, max_object=0.5,
                         min_objects=2, max_objects=2, clutter=0)  # fmt: skip
    source = ProceduralSource(options)
    scenes = [source.scene("train", i) for i in range(30)]
    whole = [o for s in scenes for o in s.objects if o.visible > 0.99]
    sides = [max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for o in whole]
    assert len(whole) > 20
    assert min(sides) >= 27
    assert max(sides) <= 53
    assert np.mean([len(s.objects) for s in scenes]) > 1.8


@pytest.mark.parametrize("name", shapes.CLASSES)
@pytest.mark.parametrize("held_out", [False, True])
def test_every_shape_draws_at_every_size(name, held_out):
    light = procedural.Light(0.3, -0.9, 0.5)
    for index, size in enumerate([3, 10, 40, 150]):
        rng = generator("shape", name, held_out, index)
        parts = procedural.pose(rng, shapes.CLASSES[name](ShapeDice(rng, held_out)), size, 25)
        sprite = procedural.draw_sprite(rng, parts, light)
        assert np.isfinite(sprite.image).all()
        assert abs(max(sprite.alpha.shape) - size) <= 4
        assert sprite.alpha.min() >= 0
        assert sprite.alpha.max() <= 1


def test_held_out_shape_parameters_are_disjoint():
    seen = [ShapeDice(generator(i)).uniform(0, 1) for i in range(500)]
    kept = [ShapeDice(generator(i), held_out=True).uniform(0, 1) for i in range(500)]

    def inside(value: float) -> bool:
        return any(low < value < high for low, high in HELD_OUT_BANDS)

    assert all(inside(v) for v in kept)
    assert not any(inside(v) for v in seen)
    assert abs(np.mean(seen) - np.mean(kept)) < 0.05


def test_textures_of_objects_follow_the_habit_and_nothing_else_does(monkeypatch):
    drawn: list[tuple[procedural.Habit, str]] = []
    pick = procedural.pick_family

    def noted(rng: np.random.Generator, habit: procedural.Habit) -> str:
        drawn.append((habit, pick(rng, habit)))
        return drawn[-1][1]

    monkeypatch.setattr(procedural, "pick_family", noted)
    source = ProceduralSource(SMALL, material_habit=1.0)
    for index in range(24):
        source.scene("pool", index)
    usual = (*procedural.PLAIN_FAMILIES, *procedural.USUAL_FAMILIES)
    assert all(family in (h.families if h.strength else usual) for h, family in drawn)
    habits = {procedural.habit_of(label, 1.0) for label in range(NUM_CLASSES)}
    assert len({habit for habit, _ in drawn} & habits) > 4


def test_a_habit_is_followed_as_often_as_its_strength_says():
    habit = procedural.habit_of(3, 0.8)
    picks = [procedural.pick_family(generator(i), habit) for i in range(2000)]
    plain = [procedural.pick_family(generator(i), procedural.Habit()) for i in range(2000)]
    by_chance, share = (
        sum(family in habit.families for family in families) / 2000 for families in (plain, picks)
    )
    assert abs(share - (0.8 + 0.2 * by_chance)) < 0.04


@pytest.mark.parametrize("family", procedural.PATTERNS)
def test_patterns_stay_between_their_two_colours(family):
    for index in range(5):
        share = procedural.PATTERNS[family](generator(family, index), 33, 21, 7.0)
        assert share.shape == (33, 21)
        assert share.min() >= -1e-6
        assert share.max() <= 1 + 1e-6
