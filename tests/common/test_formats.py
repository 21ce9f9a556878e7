"""Sets as annotation tools write them: recognised, and read to the same boxes; seeded splits."""

import json
import os
import shutil
from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.annotations import lists
from common.annotations.formats import yolo as yolo_format
from common.annotations.lists import seeded_split
from common.annotations.record import FORMATS, LabelledSet, SetChoice, read_set
from common.errors import UserError
from common.files import sha256_of
from tests import layouts
from tests.layouts import BOXES, LABELS, LAYOUTS, NAMES, PARTS, write


def objects_of(data: LabelledSet) -> dict[str, Any]:
    """Stem of each picture -> its objects' classes and boxes, to a hundredth of a pixel."""
    splits = (*data.train, data.test, *data.others)
    return {
        picture.file.stem: [
            (item.class_name, tuple(round(value, 2) for value in item.box))
            for item in picture.objects
        ]
        for split in splits
        for picture in split.pictures
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_tools(tmp_path: Path, name: str) -> None:
    kind, make, has_lists = LAYOUTS[name]
    make(tmp_path)
    assert [x for x in FORMATS.names() if FORMATS[x].recognises(tmp_path)] == [kind]
    data = read_set(tmp_path)
    assert data.classes == ("cat", "dog")
    assert objects_of(data) == {x: [(LABELS[x], BOXES[x])] for x in NAMES}
    assert (data.num_train, len(data.test.pictures)) == (4, 2)
    if has_lists:
        assert {picture.file.stem for picture in data.test.pictures} == set(PARTS["valid"])
    for split in (*data.train, data.test):
        assert {x.objects[0].class_name for x in split.pictures} == {"cat", "dog"}
    assert read_set(tmp_path).digest() == data.digest()
    alone = read_set(tmp_path, SetChoice(classes=("dog", "cat"), test_only=True))
    assert len(alone.test.pictures) == (2 if has_lists else 6), "without lists all are evaluated"
    dogs = read_set(tmp_path, SetChoice(classes=("dog",)))
    assert dogs.classes == ("dog",)
    assert dogs.left_out["objects of other classes than --classes: left out"] == 3
    with pytest.raises(UserError, match=r"only in the set: cat|unknown class"):
        read_set(tmp_path, SetChoice(classes=("dog", "cow"), test_only=True))


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    LAYOUTS["Ultralytics"][1](tmp_path)
    return tmp_path


def label_file(name: str = NAMES[0], part: str = "train") -> str:
    return f"labels/{part}/{name}.txt"


def test_classes_that_differ_by_capitals_are_said(tmp_path: Path) -> None:
    LAYOUTS["LabelImg"][1](tmp_path)
    first = next(tmp_path.rglob("photo 0.xml"))
    assert read_set(tmp_path).notes == ()
    first.write_text(first.read_text().replace("<name>cat<", "<name>Cat<"))
    data = read_set(tmp_path)
    assert data.classes == ("Cat", "cat", "dog")
    assert data.notes == (
        "2 classes that differ by capitals alone (Cat, cat): kept apart; rename one if they are "
        "the same",
    )


@pytest.mark.parametrize(
    ("text", "box", "note"),
    [
        ("0 0.1 0.2 0.5 0.2 0.5 0.75 0.3 0.75", (12.8, 19.2, 64, 72), "polygons: their boxes"),
        ("0 0.25 0.5 0.25 0.5 0.93\n", (16, 24, 48, 72), "boxes with a score"),
        ("\ufeff0.0 0.25\t0.5  0.25 0.5\r\n\r\n", (16, 24, 48, 72), None),
        ("0 0.9 0.5 0.5 0.5", (83.2, 24, 128, 72), "boxes that reach further outside"),
        ("0 0.500001 0.5 1.000002 1", (0, 0, 128, 96), None),
    ],
)
def test_lines_of_yolo(yolo: Path, text: str, box: tuple, note: str | None) -> None:
    write(yolo / label_file(), text)
    data = read_set(yolo)
    assert objects_of(data)[NAMES[0]] == [("cat", box)]
    assert [line[2 : 2 + len(note or "")] for line in data.notes] == [note] * bool(note)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2: there are 2 names, from 0 on"),
        ("-1 0.5 0.5 0.1 0.1", "class -1: there are 2 names"),
        ("0 0.5 0.5 0.1", "3 numbers behind the class; give 4"),
        ("0 0.5 0.5 0 0.1", "the box is empty"),
        ("0 nan 0.5 0.1 0.1", "give a class number and shares"),
        ("cat 0.5 0.5 0.1 0.1", "give a class number and shares"),
        ("0.5 0.5 0.5 0.1 0.1", "give a class number and shares"),
        ("0 64 48 20 20", "lies outside the picture of 128 x 96"),
        ("0 1.5 0.5 0.1 0.1", "lies outside the picture"),
        ("0 0.5 0.5 0.4 0.4 0.45 0.45 2 0.5 0.5 1", "2 is no share; key points need kpt_shape"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "7 numbers; give a box, or pairs of a polygon"),
    ],
)
def test_faulty_lines_stop_the_set_or_are_left_out(yolo: Path, text: str, message: str) -> None:
    write(yolo / label_file(), f"{text}\n{layouts.line(NAMES[0])}")
    with pytest.raises(UserError, match=rf"photo 0.txt, line 1.*{message}.*--max-left-out 1"):
        read_set(yolo)
    data = read_set(yolo, SetChoice(max_left_out=1))
    assert objects_of(data)[NAMES[0]] == [("cat", BOXES[NAMES[0]])]
    assert sum(data.left_out.values()) == 1


def test_yolo_pictures_without_objects_and_turned_ones(yolo: Path) -> None:
    write(yolo / label_file(), "")
    (yolo / label_file(NAMES[1])).unlink()
    layouts.paint(yolo / f"images/train/{NAMES[2]}.jpg", NAMES[2], orientation=6)
    data = read_set(yolo)
    assert objects_of(data)[NAMES[0]] == objects_of(data)[NAMES[1]] == []
    assert objects_of(data)[NAMES[2]] == [("cat", BOXES[NAMES[2]])], "shares of the upright one"
    assert list(data.repaired.values()) == [1, 1]
    stored = read_set(yolo, SetChoice(exif="stored"))
    x0, y0, x1, y1 = (
        value / side for value, side in zip(BOXES[NAMES[2]], (128, 96) * 2, strict=True)
    )
    ((_, box),) = objects_of(stored)[NAMES[2]]
    turned = (128 * (1 - y1), 96 * x0, 128 * (1 - y0), 96 * x1)
    assert box == pytest.approx(turned, abs=0.01)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"images/train/{NAMES[0]}.jpg", None),
        (f"images/train/{NAMES[0]}.jpg", f"images/train/{NAMES[0]}.HEIC"),
        (label_file(), label_file("Photo 0")),
    ],
)
def test_text_files_without_their_picture(yolo: Path, old: str, new: str | None) -> None:
    """Other text files, and a second path to a folder of them, are no fault."""
    for i, text in enumerate(("", "Read me 1 2 3 4", "0 .5 .5 .1", "images/a.jpg\nimages/b.jpg")):
        write(yolo / f"labels/train/note {i}.txt", text)
    (yolo / "labels").rename(yolo / "annotations")
    (yolo / "labels").symlink_to("annotations")
    assert read_set(yolo).notes == ()
    (yolo / old).rename(yolo / new) if new else (yolo / old).unlink()
    with pytest.raises(UserError, match=r"hoto 0.txt: its picture is not there.*--max-left-out 1"):
        read_set(yolo)
    data = read_set(yolo, SetChoice(max_left_out=1))
    assert data.left_out == {"pictures that are missing or unreadable": 1}


def test_a_folder_of_older_labels_is_counted(yolo: Path) -> None:
    shutil.copytree(yolo / "labels/train", yolo / "labels_old")
    number = len([*(yolo / "labels_old").iterdir()])
    assert read_set(yolo).notes == (
        f"{number} text files in folders of which no picture has one: not used",
    )


def test_a_yolo_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LAYOUTS["LabelImg YOLO"][1](tmp_path)
    listed: list[Path] = []
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top, **more: listed.append(top) or walk(top, **more))
    yolo_format.read(tmp_path, SetChoice())
    assert listed == [tmp_path]


def test_lists_of_classes_that_differ(tmp_path: Path) -> None:
    """LabelImg writes one in each folder, in the order of that session."""
    LAYOUTS["LabelImg YOLO"][1](tmp_path / "day 1")
    write(tmp_path / "predefined_classes.txt", "dog\ncat\ncow\n")  # LabelImg starts with it
    write(tmp_path / "day 2/classes.txt", " cat\r\ndog")
    assert read_set(tmp_path).classes == ("cat", "dog")
    write(tmp_path / "day 2/classes.txt", "dog\ncat\n")
    with pytest.raises(
        UserError, match=r"day 1/classes.txt and .*day 2/classes.txt have different"
    ):
        read_set(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [no, yes]\n", "names holds False, as YAML reads .*in quotes"),
        ("names: {0: cat, 1: ~}\n", "names holds None, as YAML reads"),
        ("names: [cat, cat]\n", "holds one twice"),
        ("names: {1: cat, 2: dog}\n", "count them from 0"),
        ("names: 2\n", "names must be a list"),
        ("names: [cat, dog]\ntrain: images/no\nval: images/valid\n", "no such folder or file"),
        ("names: [cat, dog]\ntrain: 7\n", "train holds 7; give a folder"),
        ("names: [cat, dog]\ntrain: ../../../etc\nval: /etc/passwd\n", "no such folder or file"),
        ("names: !!python/object:os.x {}\n", "holds no labelled set|could not|constructor"),
    ],
)
def test_faults_of_data_yaml(yolo: Path, content: str, message: str) -> None:
    write(yolo / "pets.yaml", content)
    with pytest.raises(UserError, match=message):
        read_set(yolo)


def make_labelimg(root: Path) -> None:
    LAYOUTS["LabelImg"][1](root)


def cut(picture: Path) -> None:
    """The header stays."""
    picture.write_bytes(picture.read_bytes()[:-400])


@pytest.mark.parametrize(
    ("harm", "message", "is_bounded"),
    [
        (lambda x: (x / "photo 0.jpg").unlink(), "its picture photo 0 is not there", True),
        (lambda x: (x / "photo 0.jpg").write_bytes(b"x"), "does not decode", True),
        (lambda x: cut(x / "photo 0.jpg"), r"photo 0.jpg: does not decode.*left-out 1", True),
        (lambda x: (x / "photo 0.xml").write_text("<a"), "not readable as XML", True),
        (lambda x: layouts.paint(x / "photo 0.png", NAMES[0]), None, False),
        (lambda x: (x / "photo 0.xml").unlink(), None, False),
    ],
)
def test_pictures_that_are_left_out(tmp_path, harm, message, is_bounded):
    make_labelimg(tmp_path)
    harm(tmp_path)
    if message:
        with pytest.raises(UserError, match=message):
            read_set(tmp_path, SetChoice(decodes=True))
    data = read_set(tmp_path, SetChoice(max_left_out=int(is_bounded)))
    expected = NAMES if (tmp_path / "photo 0.png").exists() else NAMES[1:]
    assert objects_of(data).keys() == set(expected)
    assert sum(data.left_out.values()) >= 1
    assert data.notes[-1].startswith("photo 0.") == is_bounded, "a line says what is wrong"


def test_nearest_picture_and_doubt(tmp_path: Path) -> None:
    """The same names in two lists; the same name twice in one folder."""
    for part in ("train", "valid"):
        for name in NAMES[:2]:
            layouts.paint(tmp_path / part / "images" / f"{name}.jpg", name)
            write(tmp_path / part / "Annotations" / f"{name}.xml", layouts.xml(name, "none"))
    data = read_set(tmp_path)
    assert (data.num_train, len(data.test.pictures)) == (2, 2)
    layouts.paint(tmp_path / "train/images/photo 0.png", NAMES[0])
    with pytest.raises(UserError, match=r"may be of each of .*photo 0.jpg, .*photo 0.png"):
        read_set(tmp_path)


def test_an_annotation_is_not_of_another_folder_with_pictures(tmp_path: Path) -> None:
    """Names begin anew on each day; photo 0 of the second one was deleted, that of the first one
    is not labelled.
    """
    for day in ("day 1", "day 2"):
        for name in NAMES:
            layouts.paint(tmp_path / day / f"{name}.jpg", name)
            write(tmp_path / day / f"{name}.xml", layouts.of_xml(name))
    (tmp_path / "day 1/photo 0.xml").unlink()
    (tmp_path / "day 2/photo 0.jpg").unlink()
    with pytest.raises(UserError, match=r"day 2/photo 0.xml: its picture photo 0 is not there"):
        read_set(tmp_path)
    layouts.paint(tmp_path / "day 2/renamed.jpg", NAMES[0])
    write(tmp_path / "day 2/photo 0.xml", layouts.xml(NAMES[0], "renamed.jpg"))
    data = read_set(tmp_path)
    assert data.left_out == {"pictures without an annotation: left out": 1}
    assert objects_of(data)["renamed"] == [("cat", BOXES[NAMES[0]])]


def test_a_category_above_others_is_none(tmp_path: Path) -> None:
    LAYOUTS["Roboflow COCO"][1](tmp_path)
    assert [*read_set(tmp_path).left_out.values()] == [1]
    path = tmp_path / "valid/_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    content["categories"][1]["supercategory"] = ["pets"]
    write(path, json.dumps(content))
    assert read_set(tmp_path).classes == ("pets", "cat", "dog"), "one list uses it, so it is one"


@pytest.mark.parametrize(
    ("tool", "second"),
    [("CVAT COCO", "annotations/default.json"), ("Roboflow COCO", "train/part 2.json")],
)
def test_two_coco_files_of_one_list_are_refused(tmp_path: Path, tool: str, second: str) -> None:
    LAYOUTS[tool][1](tmp_path)
    write(tmp_path / second, json.dumps(layouts.coco(NAMES[:1])))
    with pytest.raises(
        UserError, match=r"json and .*json are both of a list '(default|train)'; jo"
    ):
        read_set(tmp_path)


def test_polygons_other_tasks_and_hidden_files(tmp_path: Path) -> None:
    """In the only folder of an archive."""
    LAYOUTS["CVAT COCO"][1](tmp_path / "a/export")
    path = tmp_path / "a/export/annotations/instances_default.json"
    content = json.loads(path.read_text())
    for row in content["annotations"]:
        x, y, w, h = row.pop("bbox")
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h], [x, y + h, x, y, x + 1, y + 1]]
    write(path, json.dumps(content))
    for name in ("annotations/captions_default.json", "annotations/._instances_default.json"):
        write(path.parents[1] / name, "{}")
    write(tmp_path / "__MACOSX/a.json", path.read_text())
    data = read_set(tmp_path)
    assert objects_of(data) == {x: [(LABELS[x], BOXES[x])] for x in NAMES}
    assert data.notes == ("6 polygons: their boxes taken",)


def test_a_folder_of_two_formats_is_refused(tmp_path: Path) -> None:
    make_labelimg(tmp_path)
    LAYOUTS["LabelImg YOLO"][1](tmp_path)
    with pytest.raises(UserError, match="looks like xml_folder and yolo; choose one with --format"):
        read_set(tmp_path)
    for kind in ("xml_folder", "yolo"):
        assert len(objects_of(read_set(tmp_path, SetChoice(format=kind)))) == 6


def on_both_sides(classes_of: dict[str, Collection[str]], val: Collection[str]) -> bool:
    names = {x for row in classes_of.values() for x in row}
    sides = {x: [name in val for name, row in classes_of.items() if x in row] for x in names}
    return all(len(set(own)) == 2 for own in sides.values() if len(own) > 1)


@settings(deadline=None)  # on a busy machine any example may be slow
@given(st.lists(st.frozensets(st.sampled_from("abcd"), max_size=3), min_size=2, max_size=7),
       st.floats(0.1, 0.5), st.integers(0, 3))  # fmt: skip
def test_every_class_is_on_both_sides_where_possible(rows, share, seed):
    classes_of = {f"p{i}": row for i, row in enumerate(rows)}
    val = seeded_split(classes_of, share, seed)
    assert 0 < len(val) < len(rows)
    assert seeded_split(dict(reversed(classes_of.items())), share, seed) == val
    choices = [{f"p{i}" for i, is_val in enumerate(x) if is_val}
               for x in product((False, True), repeat=len(rows))]  # fmt: skip
    possible = any(on_both_sides(classes_of, x) for x in choices if 0 < len(x) < len(rows))
    assert on_both_sides(classes_of, val) == possible


def test_a_yolo_export_without_its_parts(tmp_path: Path) -> None:
    """Roboflow names three folders in every data.yaml; an export may have the first only."""
    lines = (
        "names: [cat, dog]\ntrain: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    )
    for number in range(5):
        layouts.paint(tmp_path / f"train/images/{number}.jpg", NAMES[number])
        write(tmp_path / f"train/labels/{number}.txt", "0 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "data.yaml", lines)
    data = read_set(tmp_path)
    assert (data.num_train, len(data.test.pictures)) == (4, 1)
    assert data.repaired["lists of data.yaml that are not there: left out"] == 2
    # Other pictures in a folder of the same last name are not taken for those of the list.
    (tmp_path / "train/images").rename(tmp_path / "images")
    with pytest.raises(UserError, match=r"train: \.\./train/images: no such folder"):
        read_set(tmp_path)


def test_copies_of_a_picture_are_on_one_side(tmp_path: Path) -> None:
    """Roboflow's and files of the same bytes; names that begin alike are no copies."""
    for name, number, folder in product(NAMES[:5], range(3), ("rf", "same", "plain")):
        stem = f"{name}_jpg.rf.{number}{'ab' * 8}" if folder == "rf" else f"{name} {number}"
        picture = tmp_path / folder / f"{stem}.jpg"
        layouts.paint(picture, name)
        picture.write_bytes(picture.read_bytes() + bytes(number * (folder != "same")))
        write(picture.with_suffix(".xml"), layouts.of_xml(name))
    again = tmp_path / "rf/photo 0 again.jpg"  # belongs to one of three copies, so to all
    layouts.paint(again, NAMES[0])
    write(again.with_suffix(".xml"), layouts.of_xml(NAMES[0]))
    for folder, number in (("rf", 16), ("same", 15)):
        data = read_set(tmp_path / folder)
        parts = [{x.file.name[:7] for x in part.pictures} for part in (data.train[0], data.test)]
        assert parts[0].isdisjoint(parts[1])
        assert [len(part) for part in parts] == [3, 2]
        copies = "copies of a picture (NAME.rf.HASH, or the same bytes): all on one side of the"
        assert data.notes == (f"{number} {copies} split",)
    assert read_set(tmp_path / "plain").notes == ()


@pytest.mark.parametrize(("folder", "test"), [(".", "val"), ("VOC2007", "test")])
def test_pictures_in_both_lists_are_refused_or_counted(
    tmp_path: Path, folder: str, test: str
) -> None:
    """Counted where the user, or a file of the set, says which lists are which."""
    layouts.cvat_voc(tmp_path / folder)
    lists = tmp_path / folder / "ImageSets/Main"
    (lists / "default.txt").rename(lists / "trainval.txt")
    write(lists / f"{test}.txt", "photo 4\nphoto 5\n")
    message = rf"2 pictures are in both lists, trainval and {test}, as .*photo 4.jpg; take"
    with pytest.raises(UserError, match=message):
        read_set(tmp_path)
    with pytest.raises(UserError, match=message):
        read_set(tmp_path, SetChoice(train_split="trainval"))
    counted = ("2 pictures in both lists: AP counts pictures trained on",)
    assert read_set(tmp_path, SetChoice(train_split="trainval", test_split=test)).notes == counted
    own = {"classes": ["cat", "dog"], "train_split": "trainval", "test_split": test}
    write(tmp_path / "dataset.json", json.dumps(own))
    assert read_set(tmp_path).notes == counted


def test_copies_in_both_lists_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of the same bytes under two names; others are read only if one has their size."""
    read: list[Path] = []
    monkeypatch.setattr(lists, "sha256_of", lambda file: read.append(file) or sha256_of(file))
    layouts.parted("{part}/{name}.jpg", "{part}/{name}.xml", layouts.of_xml)(tmp_path)
    pictures = {file.stem: file for file in tmp_path.glob("*/*.jpg")}
    for number, name in enumerate(NAMES):
        pictures[name].write_bytes(pictures[name].read_bytes() + bytes(100 * number))
    assert read_set(tmp_path).notes == ()
    assert read == []
    shutil.copy(pictures["photo 1"], pictures["photo 4"])
    pictures["photo 5"].write_bytes(pictures["photo 2"].read_bytes()[:-1] + b"1")
    note = "1 pictures to evaluate with the bytes of one that is trained on: AP counts them"
    assert read_set(tmp_path).notes == (f"{note}, as valid/photo 4.jpg of train/photo 1.jpg",)
    assert {file.stem for file in read} == {"photo 1", "photo 2", "photo 4", "photo 5"}


def test_a_data_yaml_may_name_a_folder_twice(tmp_path: Path) -> None:
    LAYOUTS["Label Studio YOLO"][1](tmp_path)
    write(tmp_path / "data.yaml", "train: images\nval: images\nnames: [cat, dog]\n")
    assert read_set(tmp_path).notes == ("6 pictures in both lists: AP counts pictures trained on",)


@pytest.mark.parametrize(
    ("suffix", "text", "more"),
    [("xml", layouts.of_xml, {}), ("txt", layouts.line, {"classes.txt": "cat\ndog\n"})],
)
def test_a_picture_outside_the_lists_folders_is_counted(tmp_path, suffix, text, more) -> None:
    make = layouts.parted("{part}/{name}.jpg", f"{{part}}/{{name}}.{suffix}", text)
    layouts.also(make, more)(tmp_path)
    layouts.paint(tmp_path / "new/overview.jpg", NAMES[0])
    write(tmp_path / f"new/overview.{suffix}", text(NAMES[0]))
    data = read_set(tmp_path)
    assert {picture.file.stem for picture in data.test.pictures} == set(PARTS["valid"])
    assert (data.num_train, data.notes) == (4, ("1 pictures in no list's folder: left out",))
    (tmp_path / "valid").rename(tmp_path / "more")
    data = read_set(tmp_path)
    assert data.num_train + len(data.test.pictures) == 7, "no lists for both: all are split"


@pytest.mark.parametrize("name", ["train", "val", "valid", "test", "mine"])
def test_the_split_of_one_list_is_found_again_by_its_names(tmp_path: Path, name: str) -> None:
    layouts.parted(f"{name}/{{name}}.jpg", f"{name}/{{name}}.xml", layouts.of_xml)(tmp_path)
    named = SetChoice(train_split="train", test_split="val")
    assert read_set(tmp_path, named).digest() == read_set(tmp_path).digest()


def test_the_share_holds_in_every_class() -> None:
    rows = {f"{i}.jpg": ["abc"[(i % 10) // 4]] + ["d"] * (i % 50 == 0) for i in range(1000)}
    val = seeded_split(rows, 0.2, 0)
    count = {x: sum(x in rows[name] for name in val) for x in "abcd"}
    assert count == {"a": 80, "b": 80, "c": 40, "d": 4}
    assert len(val & seeded_split(rows, 0.2, 1)) < 100
    for share, number in ((0.0, 5), (1.0, 5), (0.2, 1)):
        with pytest.raises(UserError, match=r"val-share|one labelled picture"):
            seeded_split({str(i): ["a"] for i in range(number)}, share, 0)
