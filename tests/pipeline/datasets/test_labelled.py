"""make_dataset.py import: boxes and lists of the source, upright pictures, counted faults."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from common.annotations.record import LabelledSet, ObjectRecord, SetChoice, read_set
from common.annotations.write import WRITERS
from pipeline.datasets.labelled import spread
from tests import layouts
from tests.layouts import BOXES, LABELS, LAYOUTS, NAMES
from tests.pipeline.datasets.package_fixture import run, tree

Rows = dict[str, dict[str, list]]


def rows_of(data: LabelledSet) -> Rows:
    """List -> stem of a picture -> classes and boxes."""
    return {
        split.name: {x.file.stem: [(y.class_name, y.box) for y in x.objects]
                     for x in split.pictures}
        for split in (*data.train, data.test, *data.others)
    }  # fmt: skip


def card_of(out: Path) -> dict:
    return json.loads((out / "dataset.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_import_of_every_layout(tmp_path: Path, name: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    LAYOUTS[name][1](source)
    before = tree(source)
    assert run("import", out, source, "--num-workers", 1) == 0
    made = read_set(out)
    safe = {x.replace(" ", "_"): [(LABELS[x], BOXES[x])] for x in NAMES}
    assert {stem: row for part in rows_of(made).values() for stem, row in part.items()} == safe
    direct = {part: {x.replace(" ", "_") for x in row} for part, row in
              rows_of(read_set(source)).items()}  # fmt: skip
    assert {part: set(row) for part, row in rows_of(made).items()} == direct, "the same lists"
    card = card_of(out)
    assert (card["classes"], sum(card["splits"].values())) == (["cat", "dog"], 6)
    assert "boxes rounded to whole pixels" not in card["repaired"]
    originals = sorted(path.read_bytes() for path in source.rglob("*.jpg"))
    assert sorted(path.read_bytes() for path in out.rglob("*.jpg")) == originals
    assert tree(source) == before


def test_a_list_may_end_as_another_does(tmp_path: Path) -> None:
    """old_train is no class-wise list of train if the set itself says so."""
    parts = {"train": NAMES[:2], "val": NAMES[2:4], "old_train": NAMES[4:]}
    layouts.coco_of("{part}/{name}.jpg", "annotations/instances_{part}.json", parts)(
        tmp_path / "source"
    )
    assert run("import", tmp_path / "out", tmp_path / "source", "--num-workers", 1) == 0
    data = read_set(tmp_path / "out", SetChoice(all_lists=True))
    assert list(rows_of(data)) == ["train", "val", "old_train"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    LAYOUTS["LabelImg"][1](tmp_path / "source")
    return tmp_path / "source"


def test_other_labels_or_options_are_told_and_replaced(source: Path, capsys) -> None:
    out = source.parent / "out"
    assert run("import", out, source) == run("import", out, source) == 0
    assert "kept" in capsys.readouterr().out
    assert run("import", out, source, "--seed", 1) == 2
    assert "seed: 0 there, 1 requested" in capsys.readouterr().err
    layouts.write(source / "photo 0.xml", layouts.xml("photo 1", "photo 0.jpg"))
    assert run("import", out, source) == 2
    assert "labels_sha256" in capsys.readouterr().err
    assert run("import", out, source, "--overwrite") == 0
    assert run("import", source / "out", source) == 2
    assert f"lies in {source}" in capsys.readouterr().err


def test_turned_pictures_are_upright_there(source: Path) -> None:
    """And names are safe and unique, whatever folders and capitals they have."""
    out = source.parent / "out"
    for i, name in enumerate(("photo 0", "PHOTO 0", "photo_0")):
        layouts.paint(source / f"{i}/{name}.jpg", NAMES[i], orientation=6)
        layouts.write(source / f"{i}/{name}.xml", layouts.xml(NAMES[i], ""))
    assert run("import", out, source, "--val-share", 0.3) == 0
    card = card_of(out)
    assert card["repaired"] == {"pictures turned upright, or of a rare format: encoded again": 3}
    pictures = [x for y in (*read_set(out).train, read_set(out).test) for x in y.pictures]
    assert len({x.file.stem.lower() for x in pictures}) == len(pictures) == 9
    for picture in pictures:
        with Image.open(picture.file) as image:
            assert (image.size, image.getexif().get(0x112, 1)) == (layouts.SIZE, 1)
            pixels = np.asarray(image, int)
        x0, y0, x1, y1 = map(int, picture.objects[0].box)
        inside = pixels[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3]
        assert (abs(inside[..., 0] - inside[..., 2]) > 150).all()


def test_faults_stop_the_import_or_are_left_out(source: Path, capsys) -> None:
    out, cut = source.parent / "out", source / "photo 1.jpg"
    cut.write_bytes(cut.read_bytes()[:-400])
    (source / "photo 3.jpg").unlink()
    assert run("import", out, source) == 2
    faults = capsys.readouterr().err
    assert "its picture photo 3 is not there; add it\n" in faults
    assert "photo 1.jpg: does not decode" in faults
    assert faults.endswith("(--max-left-out 2 leaves out all 2)\n")
    assert run("import", out, source, "--max-left-out", 1, "--check") == 2, "one more"
    assert "photo 1.jpg: does not decode" in capsys.readouterr().err
    assert not out.exists()
    assert run("import", out, source, "--max-left-out", 2) == 0
    assert "\nphoto 1.jpg: does not decode" in capsys.readouterr().out
    assert card_of(out)["left_out"] == {"pictures that are missing or unreadable": 2}
    assert sum(card_of(out)["splits"].values()) == 4


def test_classes_check_and_sheet(source: Path, capsys) -> None:
    out, sheet = source.parent / "out", source.parent / "sheets/a.jpg"
    words = ["import", out, source, "--classes", "dog"]
    assert run(*words, "--check", "--json") == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["dog"]
    assert not out.exists()
    assert run(*words, "--show", sheet) == 0
    said = capsys.readouterr().out
    assert "3 objects of other classes than --classes: left out" in said
    assert "classes: dog 3" in said
    pixels = np.asarray(Image.open(sheet), int)
    assert pixels.shape == (2 * 480, 4 * 480, 3)
    assert (pixels[480:, 2 * 480 :] > 250).all(), "six pictures, two places stay white"
    assert card_of(out)["classes"] == ["dog"]
    assert run("import", source.parent / "b", source, "--classes", "cow") == 2
    assert "none of its" in capsys.readouterr().err


def test_a_sheet_shows_rare_classes(source: Path) -> None:
    (picture, *_) = read_set(source).test.pictures
    rare = [ObjectRecord("rare", (0, 0, 9, 9))]
    many = [replace(picture, image_id=str(i), objects=tuple(rare * (i == 77))) for i in range(100)]
    chosen = spread(many, ["rare"])
    assert len(chosen) == 24
    assert "77" in [one.image_id for one in chosen]


# -- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_whole", [True, False])
def test_round_trip_through_all_formats(source: Path, is_whole: bool) -> None:
    """VOC -> COCO -> YOLO -> VOC, with boxes at random, at the borders too."""
    rng = Random(0)
    first = read_set(source)
    lists, expected = {}, {}
    for split in (*first.train, first.test):
        for picture in split.pictures:
            objects = [] if is_whole else [ObjectRecord("cat", (127.7, 95.6, 128.0, 96.0))]
            for _ in range(20):
                x0, x1 = sorted((rng.uniform(0, 128), rng.choice([0, 128, rng.uniform(0, 128)])))
                y0, y1 = sorted((rng.uniform(0, 96), rng.choice([0, 96, rng.uniform(0, 96)])))
                box = (x0, y0, min(x1 + 1, 128), min(y1 + 1, 96))
                box = tuple(map(round, box)) if is_whole else box
                if box[0] < box[2] and box[1] < box[3]:
                    objects.append(ObjectRecord(rng.choice(("dog", "cat")), box))
            lists.setdefault(split.name, []).append((picture, tuple(objects)))
            expected[picture.file.stem] = [(x.class_name, x.box) for x in objects]
    for step, kind in enumerate(("voc", "coco", "yolo", "voc")):
        root = source.parent / f"{step}"
        writer = WRITERS[kind](root, ["dog", "cat"])
        for name, pictures in lists.items():
            for picture, objects in pictures:
                writer.add(name, picture.file.name, picture.file.read_bytes(),
                           replace(picture, objects=objects))  # fmt: skip
        writer.finish()
        data = read_set(root, SetChoice(classes=("dog", "cat")))
        lists = {split.name: [(x, x.objects) for x in split.pictures]
                 for split in (*data.train, data.test)}  # fmt: skip
        found = {x.file.stem: [(y.class_name, y.box) for y in x.objects]
                 for rows in lists.values() for x, _ in rows}  # fmt: skip
        assert {name: len(rows) for name, rows in lists.items()} == {"train": 4, "val": 2}
        assert found.keys() == expected.keys()
        for name, rows in found.items():
            assert [x[0] for x in rows] == [x[0] for x in expected[name]]
            moved = np.abs(np.subtract([x[1] for x in rows], [x[1] for x in expected[name]])).max()
            assert moved <= (1e-3 if is_whole else 1), (kind, moved)
