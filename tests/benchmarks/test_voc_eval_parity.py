"""Our own metrics equal Detectron2's and pycocotools' on random sets, which show every rule."""

import json
from dataclasses import replace

import pytest

from benchmarks import voc_eval_parity
from benchmarks.reference_metrics import (
    COCO,
    ELEVEN_POINTS,
    POINTS_101,
    VOC_2012,
    DetectionSet,
    FoundBox,
    TrueObject,
    average_precisions,
    random_set,
    real_set,
)

NUM_SETS = 30


@pytest.mark.parity
def test_both_metrics_equal_the_libraries_on_random_sets(tmp_path):
    result = voc_eval_parity.compare(NUM_SETS, 0, tmp_path)
    assert result["max_difference_voc"] <= 1e-6
    assert result["max_difference_coco"] <= 1e-6
    assert result["num_compared_voc"] > 1000 < result["num_compared_coco"]


def test_random_sets_hold_the_hard_cases():
    sets = [random_set(seed) for seed in range(100)]
    pairs = {(i, item.image, item.box) for i, data in enumerate(sets) for item in data.truth}
    assert len(pairs) < sum(len(data.truth) for data in sets), "objects in the same place"
    assert any(not data.found for data in sets), "no detections"
    assert any(item.difficult for data in sets for item in data.truth)
    assert any(
        {item.label for item in data.truth} < set(range(data.num_classes)) for data in sets
    ), "classes without an object"
    assert any(len({f.score for f in data.found}) < len(data.found) / 4 for data in sets), "ties"
    assert any(len(data.found) > 150 and data.num_images == 1 for data in sets), (
        "more than COCO looks at"
    )


@pytest.mark.parametrize(("name", "change"), voc_eval_parity.PATH)
def test_comparison_would_see_a_wrong_rule(name: str, change: dict[str, object]):
    """Each rule changes an AP of some random set by more than the tolerance, but for one."""
    rules, after = VOC_2012, replace(VOC_2012, **change)
    largest = 0.0
    for seed in range(120):
        data = random_set(seed)
        for label in range(data.num_classes):
            pair = [average_precisions(data, label, (0.5, 0.75), one) for one in (rules, after)]
            if pair[0] is not None and pair[1] is not None:
                largest = max(largest, *(abs(a - b) for a, b in zip(*pair, strict=True)))
        if largest > 1e-4:
            break
    if name.startswith("lengths from 0"):  # the same lengths in other words
        assert largest < 1e-12
    else:
        assert largest > 1e-4, name


def one_picture(truth: list[TrueObject], found: list[FoundBox]) -> DetectionSet:
    return DetectionSet(1, 1, tuple(truth), tuple(found))


def test_matching_rules_on_a_picture_drawn_by_hand():
    """Both detections overlap the first of two objects most; VOC counts the second as wrong."""
    objects = [
        TrueObject(0, 0, (1, 1, 100, 100), False),
        TrueObject(0, 0, (41, 1, 140, 100), False),
    ]
    boxes = [(0.0, 0.0, 100.0, 100.0), (16.0, 0.0, 116.0, 100.0)]  # IoU with 1: 1, .72; with 2: .60
    found = [FoundBox(0, 0, 0.9, boxes[0]), FoundBox(0, 0, 0.8, boxes[1])]
    data = one_picture(objects, found)
    assert average_precisions(data, 0, (0.5,), VOC_2012) == pytest.approx([0.5])
    assert average_precisions(data, 0, (0.5,), replace(VOC_2012, matching="free")) == [1.0]


def test_difficult_objects_neither_help_nor_harm():
    easy, hard = (TrueObject(0, 0, (1 + x, 1, 50 + x, 50), x > 0) for x in (0, 100))
    hit, on_hard = (FoundBox(0, 0, 0.9 - x / 1e3, (x, 0.0, x + 50.0, 50.0)) for x in (0.0, 100.0))
    for rules in (VOC_2012, COCO):
        full = average_precisions(one_picture([easy, hard], [hit, on_hard]), 0, (0.5,), rules)
        assert full == average_precisions(one_picture([easy], [hit]), 0, (0.5,), rules) == [1.0]
        assert average_precisions(one_picture([hard], [on_hard]), 0, (0.5,), rules) is None


def test_interpolations_by_hand():
    """The second of two detections finds one of two objects: precision 1/2 up to recall 1/2."""
    objects = [TrueObject(0, 0, (1 + x, 1, 50 + x, 50), False) for x in (0, 100)]
    found = [
        FoundBox(0, 0, 0.9, (60.0, 60.0, 80.0, 80.0)),
        FoundBox(0, 0, 0.8, (0.0, 0.0, 50.0, 50.0)),
    ]
    data = one_picture(objects, found)
    assert average_precisions(data, 0, (0.5,), VOC_2012) == pytest.approx([0.25])
    eleven = replace(VOC_2012, recall_points=ELEVEN_POINTS)
    assert average_precisions(data, 0, (0.5,), eleven) == pytest.approx([6 * 0.5 / 11])
    hundred = replace(VOC_2012, recall_points=POINTS_101)
    assert average_precisions(data, 0, (0.5,), hundred) == pytest.approx([51 * 0.5 / 101])


def test_command_writes_the_contract_and_reads_real_detections(tmp_path):
    rows = [{
        "file_name": "a.jpg", "width": 100, "height": 100,
        "ground_truth": [{"class": "box", "box": [0, 0, 50, 50], "difficult": False}],
        "detections": [{"class": "box", "score": 0.9, "box": [0.0, 0.0, 50.0, 49.0]},
                       {"class": "disc", "score": 0.8, "box": [0.0, 0.0, 9.0, 9.0]}],
    }]  # fmt: skip
    real = tmp_path / "detections.json"
    real.write_text(json.dumps(rows))
    data, names = real_set(real)
    assert names == ["box", "disc"]
    assert data.truth == (TrueObject(0, 0, (1, 1, 50, 50), False),)
    out = tmp_path / "parity.json"
    arguments = ["--sets", "3", "--json", str(out), "--detections", str(real)]
    assert voc_eval_parity.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["sets"] == 3
    assert 0 <= result["max_difference"] <= 1e-6
    assert result["separation"]["path"][-2]["rule"].startswith("all of them")
    assert result["separation_real"]["alone"][0]["AP"]["max_size"] < 100
