"""Our own metrics equal Detectron2's and pycocotools' on random sets, which hold the hard cases."""

import pytest

from tests.detection.evaluation.reference_metrics import (
    COCO,
    VOC_2007,
    VOC_2012,
    DetectionSet,
    FoundBox,
    TrueObject,
    average_precisions,
    coco_differences,
    random_set,
    voc_differences,
)


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 100), marks=pytest.mark.slow)])
@pytest.mark.parity
def test_both_metrics_equal_the_libraries_on_random_sets(tmp_path, seeds):
    voc, coco = [], []
    for seed in seeds:
        data = random_set(seed)
        voc += voc_differences(data, tmp_path / str(seed))
        coco += coco_differences(data)
    assert max(voc + coco) <= 1e-14
    assert len(voc) > 400 < len(coco)


def test_random_sets_hold_the_hard_cases():
    sets = [random_set(seed) for seed in range(60)]
    pairs = {(i, item.image, item.box) for i, data in enumerate(sets) for item in data.truth}
    assert len(pairs) < sum(len(data.truth) for data in sets), "objects in the same place"
    assert any(not data.found for data in sets), "no detections"
    assert any(item.difficult for data in sets for item in data.truth)
    assert any({item.label for item in data.truth} < set(range(data.num_classes)) for data in sets)
    assert any(len({f.score for f in data.found}) < len(data.found) / 4 for data in sets), "ties"
    assert any(len(data.found) > 150 and data.num_images == 1 for data in sets)


def test_rules_on_pictures_drawn_by_hand():
    def figures(objects, boxes, rules):
        truth = [TrueObject(0, 0, box, difficult) for box, difficult in objects]
        found = [FoundBox(0, 0, 0.9 - 0.1 * i, box) for i, box in enumerate(boxes)]
        return average_precisions(DetectionSet(1, 1, tuple(truth), tuple(found)), 0, (0.5,), rules)

    # Both detections overlap the first of two objects most; VOC counts the second as wrong.
    objects = [((1, 1, 100, 100), False), ((41, 1, 140, 100), False)]
    boxes = [(0.0, 0.0, 100.0, 100.0), (16.0, 0.0, 116.0, 100.0)]  # IoU with 1: 1, .72; with 2: .60
    assert figures(objects, boxes, VOC_2012) == pytest.approx([0.5])
    assert figures(objects, boxes, COCO) == [1.0]
    # Difficult objects neither help nor harm.
    objects = [((1, 1, 50, 50), False), ((101, 1, 150, 50), True)]
    boxes = [(0.0, 0.0, 50.0, 50.0), (100.0, 0.0, 150.0, 50.0)]
    for rules in (VOC_2012, COCO):
        assert figures(objects, boxes, rules) == figures(objects[:1], boxes, rules) == [1.0]
        assert figures(objects[1:], boxes, rules) is None
    # The second of two detections finds one of two objects: precision 1/2 up to recall 1/2.
    objects = [((1 + x, 1, 50 + x, 50), False) for x in (0, 100)]
    boxes = [(60.0, 60.0, 80.0, 80.0), (0.0, 0.0, 50.0, 50.0)]
    expected = {VOC_2012: 0.25, VOC_2007: 6 * 0.5 / 11, COCO: 51 * 0.5 / 101}
    for rules, value in expected.items():
        assert figures(objects, boxes, rules) == pytest.approx([value])
