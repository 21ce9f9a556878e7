"""Generated scenes: pure functions, honest boxes, classes told apart by shape and not by colour."""

import cv2
import numpy as np
import pytest

from pipeline.datasets import render, shapes
from pipeline.datasets import scene as composition
from pipeline.datasets.options import SetOptions
from pipeline.datasets.procedural import ProceduralSource
from pipeline.datasets.scene import Scene, generator
from pipeline.datasets.shapes import HELD_OUT_BANDS, ShapeDice

SMALL = SetOptions(short_side=64, long_side=80, clutter=0.5)


@pytest.fixture(scope="module")
def probes() -> dict[str, list[Scene]]:
    source = ProceduralSource(SMALL)
    return {
        "probe/train": [source.scene("probe/train", i) for i in range(300)],
        "probe/val": [source.scene("probe/val", i) for i in range(200)],
    }


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


def colours_of_crop(scene: Scene) -> np.ndarray:
    x0, y0, x1, y1 = scene.objects[0].box
    hsv = cv2.cvtColor(scene.image[y0:y1, x0:x1], cv2.COLOR_BGR2HSV).reshape(-1, 3)
    counts = [np.bincount(hsv[:, c] // 16, minlength=16) for c in range(3)]
    return np.concatenate(counts) / len(hsv)


def shape_of_object(scene: Scene) -> np.ndarray:
    x0, y0, x1, y1 = scene.objects[0].box
    mask = scene.masks[0][y0:y1, x0:x1].astype(np.float32)
    small = cv2.resize(mask, (12, 12), interpolation=cv2.INTER_AREA).ravel()
    return np.append(small, 3 * np.log((x1 - x0) / (y1 - y0)))


def test_colour_does_not_give_the_class_away_but_shape_does(probes):
    assert accuracy(probes, colours_of_object) < 0.2  # chance is 0.1
    assert accuracy(probes, colours_of_crop) < 0.2
    assert accuracy(probes, shape_of_object) > 0.6


def test_probe_pictures_show_one_object_and_all_classes_in_turn(probes):
    for scenes in probes.values():
        assert [s.objects[0].label for s in scenes[:20]] == [*range(10), *range(10)]
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
    for index in range(30):
        scene = source.scene(part, index)
        height, width = scene.image.shape[:2]
        assert sorted((height, width)) == [64, 80]
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
    light = render.Light(0.3, -0.9, 0.5)
    for index, size in enumerate([3, 10, 40, 150] * 3):
        rng = generator("shape", name, held_out, index)
        parts = render.pose(rng, shapes.CLASSES[name](ShapeDice(rng, held_out)), size, 25)
        sprite = render.draw(rng, parts, light, held_out)
        assert np.isfinite(sprite.image).all()
        assert abs(max(sprite.alpha.shape) - size) <= 4
        assert sprite.alpha.min() >= 0
        assert sprite.alpha.max() <= 1


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_classes_vary_within(name):
    drawn = [shapes.CLASSES[name](ShapeDice(generator(name, i))) for i in range(30)]
    extents = [np.ptp(np.concatenate([c for p in d for c in p.contours]), axis=0) for d in drawn]
    assert len({round(float(x / y), 2) for x, y in extents}) > 10


def test_held_out_shape_parameters_are_disjoint():
    seen = [ShapeDice(generator(i)).uniform(0, 1) for i in range(500)]
    kept = [ShapeDice(generator(i), held_out=True).uniform(0, 1) for i in range(500)]

    def inside(value: float) -> bool:
        return any(low < value < high for low, high in HELD_OUT_BANDS)

    assert all(inside(v) for v in kept)
    assert not any(inside(v) for v in seen)
    assert abs(np.mean(seen) - np.mean(kept)) < 0.05


def test_held_out_materials_are_disjoint():
    families = [
        {render.pick_family(generator(i), held_out) for i in range(300)}
        for held_out in (False, True)
    ]
    assert families[0] & families[1] == set(render.SHARED_FAMILIES)
    assert families[0] - families[1] == set(render.TRAIN_FAMILIES)
    assert families[1] - families[0] == set(render.TEST_FAMILIES)


def families_painted(monkeypatch, source: ProceduralSource, part: str) -> dict[int, list[str]]:
    """Texture families drawn for some pictures: by class number, -1 for all that is no object."""
    drawn: dict[int, list[str]] = {}
    pick, habit_of = render.pick_family, render.habit_of
    wearer: dict[int, int] = {}

    def noted_habit(label: int, strength: float) -> render.Habit:
        habit = habit_of(label, strength)
        wearer[id(habit)] = label
        kept.append(habit)
        return habit

    def noted_family(rng, held_out, habit=render.NO_HABIT) -> str:
        family = pick(rng, held_out, habit)
        drawn.setdefault(wearer.get(id(habit), -1), []).append(family)
        return family

    kept: list[render.Habit] = []  # alive, so that no two share an id
    monkeypatch.setattr(render, "habit_of", noted_habit)
    monkeypatch.setattr(render, "pick_family", noted_family)
    for index in range(24):
        source.scene(part, index)
    return drawn


def test_textures_of_objects_follow_the_habit_and_nothing_else_does(monkeypatch):
    source = ProceduralSource(SMALL, material_habit=1.0)
    drawn = families_painted(monkeypatch, source, "pool")
    background = drawn.pop(-1)
    assert len(drawn) > 5
    for label, families in drawn.items():
        assert set(families) <= set(render.habit_of(label, 1.0).families)
    assert set(background) <= {*render.SHARED_FAMILIES, *render.TRAIN_FAMILIES}


def test_a_habit_is_followed_as_often_as_its_strength_says():
    habit = render.habit_of(3, 0.8)
    picks = [render.pick_family(generator(i), False, habit) for i in range(2000)]
    typical = set(habit.families)
    plain = [render.pick_family(generator(i), False) for i in range(2000)]
    by_chance = sum(family in typical for family in plain) / 2000
    share = sum(family in typical for family in picks) / 2000
    assert abs(share - (0.8 + 0.2 * by_chance)) < 0.04


def test_every_class_has_two_families_and_shares_at_least_one_of_them():
    habits = [set(render.habit_of(label, 0.8).families) for label in range(10)]
    assert all(len(families) == 2 for families in habits)
    assert len({frozenset(families) for families in habits}) == 10
    for label, families in enumerate(habits):
        assert any(families & other for i, other in enumerate(habits) if i != label)


def test_colours_stay_independent_of_the_class_under_a_habit():
    source = ProceduralSource(SMALL, material_habit=0.8)
    scenes = {
        part: [source.scene(part, i) for i in range(count)]
        for part, count in (("probe/train", 200), ("probe/val", 100))
    }
    assert accuracy(scenes, colours_of_object) < 0.25  # chance is 0.1


@pytest.mark.parametrize("part", ["pool", "train", "test", "probe/val"])
def test_both_options_change_the_bytes_of_the_parts_that_they_name(part):
    def image(**options) -> bytes:
        return ProceduralSource(SMALL, **options).scene(part, 3).image.tobytes()

    assert image(material_habit=0.8) != image()
    assert (image(shifted_test=True) != image()) == (part in ("test", "probe/val"))


@pytest.mark.parametrize("part", ["test", "probe/val"])
def test_only_a_shifted_test_shows_families_of_its_own(monkeypatch, part):
    own = set(render.TEST_FAMILIES)
    usual = families_painted(monkeypatch, ProceduralSource(SMALL), part)
    assert own.isdisjoint(family for families in usual.values() for family in families)
    monkeypatch.undo()
    source = ProceduralSource(SMALL, shifted_test=True, material_habit=1.0)
    shifted = families_painted(monkeypatch, source, part)
    used = {family for families in shifted.values() for family in families}
    assert used == own | set(render.SHARED_FAMILIES)  # habits are off in a shifted world


@pytest.mark.parametrize("family", render._PATTERNS)
def test_patterns_stay_between_their_two_colours(family):
    for index in range(5):
        share = render._PATTERNS[family](generator(family, index), 33, 21, 7.0)
        assert share.shape == (33, 21)
        assert share.min() >= -1e-6
        assert share.max() <= 1 + 1e-6
