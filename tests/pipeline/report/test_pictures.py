"""Pictures of the page: which ones, their boxes, and labels that cover no other."""

import base64
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import results
from pipeline.report import pictures, report
from pipeline.report.pictures import Album
from tests.pipeline.report.run_fixture import CLASSES, change, dump, make_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def arms(run_folder) -> dict[str, list[Path]]:
    return report.seed_folders(run_folder, results.assemble(run_folder)["detection"])


def test_first_pictures_with_the_boxes_of_the_fine_tuned_arms(run_folder, arms):
    found = pictures.detection_pictures(arms, run_folder / "data", Album())
    assert [row["name"] for row in found] == [f"{i:06d}.jpg" for i in range(6)]
    assert [[arm["title"] for arm in row["arms"]] for row in found] == [
        ["Random", "Pretrained"]
    ] * 6
    looks = [[box["look"] for box in arm["found"]] for arm in found[0]["arms"]]
    assert looks == [["bad"] * 3, ["good", "bad", "bad"]]
    assert found[0]["arms"][1]["told"] == (
        "Labelled: bird, mammal. Best: bird 0.91 correct, bird 0.42 confusion."
    )
    frozen = {arm: folders for arm, folders in arms.items() if arm.endswith("_frozen")}
    (first, *_) = pictures.detection_pictures(frozen, run_folder / "data", Album())
    assert [arm["title"] for arm in first["arms"]] == [results.arm_title(arm) for arm in frozen]
    assert pictures.detection_pictures({}, run_folder / "data", Album()) == []
    assert pictures.usual_score(found) == 0.42, "the second best, of two objects"
    assert pictures.usual_score([]) == 0.5


def test_difficult_objects_and_detections_on_them_do_not_count(run_folder, tmp_path):
    truth = [{"class": "cat", "box": [0, 0, 10, 10]}]
    truth.append({"class": "dog", "box": [50, 0, 60, 10], "difficult": True})
    boxes = [
        {"class": "cat", "score": 0.7, "box": [0, 0, 10, 9], "kind": "duplicate"},
        {"class": "dog", "score": 0.9, "box": [50, 0, 60, 10], "kind": "ignored"},
        {"class": "cat", "score": 0.8, "box": [0, 0, 10, 10], "kind": "correct"},
    ]
    entry = {"file_name": "VOC2007/JPEGImages/000000.jpg", "width": 60, "height": 20}
    dump(tmp_path / "detections.json", [{**entry, "ground_truth": truth, "detections": boxes}])
    found = pictures.detection_pictures({"random": [tmp_path]}, run_folder / "data", Album())
    assert found[0]["objects"] == ["cat"]
    assert [box["score"] for box in found[0]["arms"][0]["found"]] == [0.8, 0.7]
    assert pictures.usual_score(found) == 0.8


@pytest.mark.parametrize(
    "name", ["cat", "a class with a very, very long name", "\u732b\u3068\u72ac"]
)
@pytest.mark.parametrize("size", [(500, 375), (60, 400)])
def test_labels_lie_in_the_picture_and_cover_no_other(name, size):
    """All boxes above any score, and of any class, are some of these."""
    random = np.random.default_rng(0)
    boxes = []
    for rank in range(pictures.MOST_BOXES):
        x0, y0 = random.uniform(0, 0.7, 2) * size
        box = [x0, y0, *np.minimum(np.array([x0, y0]) + random.uniform(5, 200), size)]
        boxes.append({"class": name, "score": 1 - rank / 50, "box": box, "kind": "correct"})
    found = pictures.marks(boxes, size, letters=0.1)
    for kind, least in (("small", 2), ("large", 8)):
        plates = [label[2:6] for box in found for label in box["labels"] if label[0] == kind]
        assert len(plates) >= least
        for x, y, w, h in plates:
            assert (x >= 0, y >= 0, x + w <= size[0] + 0.01, y + h <= size[1]) == (True,) * 4
        for a, b in itertools.combinations(plates, 2):
            is_beside = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0]
            assert is_beside or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
    assert found[0]["labels"], "the best one has its label"
    assert found[0]["labels"][0][1].endswith(" 1.00")


def test_pictures_outside_the_data_set_are_never_read(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    entry = {"file_name": "../secret.png", "width": 20, "height": 20, "ground_truth": []}
    lists = {"format": "fa-labels-1", "lists": [], "repaired": []}
    seeds = {"random": [tmp_path / "seed-0"]}
    (tmp_path / "data").mkdir()
    for name, expected in (("../secret.png", 0), ("secret.png", 1)):
        dump(tmp_path / "seed-0/detections.json", [entry | {"file_name": name, "detections": []}])
        dump(tmp_path / "seed-0/labels.json", lists | {"samples": [entry | {"file_name": name}]})
        data = tmp_path if expected else tmp_path / "data"
        assert len(pictures.detection_pictures(seeds, data, Album())) == expected
        assert len(pictures.labelled_set(seeds, data, Album())["samples"]) == expected


def test_large_pictures_are_made_smaller_damaged_and_too_many_ones_left_out(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn: boxes are drawn on the upright picture
    Image.new("RGB", (200, 300)).save(tmp_path / "big.png", exif=exif)
    album = Album(room=2000)
    uri = album.add(tmp_path / "big.png", 60)
    (tmp_path / "small.jpg").write_bytes(base64.b64decode(uri.partition(",")[2]))
    with Image.open(tmp_path / "small.jpg") as small:
        assert small.size == (60, 40)
    more = [album.add(tmp_path / "big.png", 60) for _ in range(5)]
    assert 0 < album.num_left_out == more.count(None)
    assert sum(map(len, [uri, *filter(None, more)])) <= 2000
    (tmp_path / "big.png").write_bytes(b"no picture")
    assert Album().add(tmp_path / "big.png", 600) is None


def test_the_labelled_set_is_that_of_the_first_seed_that_tells(run_folder, arms, tmp_path):
    told = pictures.labelled_set({"x": [tmp_path], **arms}, run_folder / "data", Album())
    assert told["names"] == sorted(CLASSES)
    assert [box["look"] for box in told["samples"][0]["arms"][0]["found"]] == ["label"] * 2
    assert pictures.labelled_set({"x": [tmp_path]}, run_folder / "data", Album()) is None
    assert "box" in str(report.size_chart(told))
    change(run_folder / "detection/random/seed-0/labels.json", lists=[{"use": 1}])
    told = pictures.labelled_set({"x": arms["random"][:1]}, run_folder / "data", Album())
    assert told is None, "of another form"
