"""The devkit layout, read back by a parser of the test's own."""

from pathlib import Path

import numpy as np
import pytest

from common.annotations.formats.voc import read_picture
from common.annotations.record import ObjectRecord, make_folders
from pipeline.datasets import scene
from pipeline.datasets.scene import Annotation, Placed, Scene, Sprite, write_scene

CLASSES = ("cup", "bottle")


def square(height: int, width: int, opacity: float = 1.0) -> Sprite:
    return Sprite(
        np.full((height, width, 3), 200, np.float32), np.full((height, width), opacity, np.float32)
    )


def test_a_scene_becomes_a_picture_and_an_annotation(tmp_path: Path):
    image = np.zeros((40, 60, 3), np.uint8)
    whole = Annotation(1, (0, 0, 60, 40), True, False, 0.9)
    pixel = Annotation(0, (5, 7, 6, 8), False, True, 1.0)
    make_folders(tmp_path / "VOC2007")
    write_scene(tmp_path, "a", Scene(image, [whole, pixel]), CLASSES, 90)
    record = read_picture(tmp_path / "VOC2007", "a", CLASSES)
    assert (record.width, record.height) == (60, 40)
    assert record.objects == (
        ObjectRecord("bottle", (0, 0, 60, 40), truncated=True),
        ObjectRecord("cup", (5, 7, 6, 8), difficult=True),
    )


def test_boxes_follow_what_is_seen():
    back = Placed(square(10, 20), x=5, y=5, label=0)
    front = Placed(square(10, 8), x=5, y=5, label=1)
    stay, objects, masks = scene.settle([back, front], (40, 60))
    assert len(stay) == 2
    assert objects[0].box == (13, 5, 25, 15)
    assert objects[0].visible == pytest.approx(12 / 20)
    assert not objects[0].truncated
    assert not objects[0].difficult
    assert objects[1].box == (5, 5, 13, 15)
    assert not (masks[0] & masks[1]).any()


def test_less_than_half_is_difficult_and_less_than_a_quarter_is_taken_out():
    def covered(share: float) -> tuple[int, list[Annotation]]:
        back = Placed(square(20, 20), 0, 0, label=0)
        stay, objects, _ = scene.settle([back, Placed(square(20, int(20 * share)), 0, 0)], (40, 60))
        return len(stay), objects

    assert covered(0.4)[1][0].difficult is False
    assert covered(0.6)[1][0].difficult is True
    assert covered(0.8) == (1, [])


def test_an_object_that_only_hides_others_goes_first_if_it_is_hidden_itself():
    bottom = Placed(square(20, 20), 0, 0, label=0)
    middle = Placed(square(20, 18), 0, 0, label=0)
    top = Placed(square(20, 18), 0, 0)  # clutter over the middle one
    stay, objects, _ = scene.settle([bottom, middle, top], (20, 20))
    assert stay == [top]
    assert objects == []


def test_truncated_means_cut_by_the_border_and_tiny_is_difficult():
    side = scene.DIFFICULT_SIDE_PX
    cases = [
        # height, width, x: box, truncated, difficult
        ((10, 10, 0), (0, 0, 10, 10), False, False),
        ((10, 12, -4), (0, 0, 8, 10), True, False),
        ((side - 1, side - 1, 2), (2, 0, side + 1, side - 1), False, True),
        ((side, 3, 2), (2, 0, 5, side), False, False),
    ]
    for (height, width, x), box, truncated, difficult in cases:
        found = scene.settle([Placed(square(height, width), x, 0, 0)], (20, 20))[1][0]
        assert (found.box, found.truncated, found.difficult) == (box, truncated, difficult)


def test_painting_changes_the_boxed_pixels_only():
    background = np.full((30, 40, 3), 50, np.float32)
    item = Placed(square(8, 6), 10, 12, 0)
    painted = scene.paint(background, [item])
    changed = np.abs(painted - background).max(axis=2) > 0
    rows, columns = np.nonzero(changed)
    box = scene.settle([item], (30, 40))[1][0].box
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box
    assert (background == 50).all()


def test_a_sprite_fully_outside_is_harmless():
    away = Placed(square(5, 5), 100, -50, 0)
    assert scene.settle([away], (20, 20))[1] == []
    background = np.zeros((20, 20, 3), np.float32)
    assert (scene.paint(background, [away], (0.1, 0.1, 0.5)) == 0).all()
