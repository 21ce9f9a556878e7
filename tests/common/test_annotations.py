"""Annotations as tools write them, sets of every format: records, or one error that says why."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from PIL import Image

from common.annotations.checks import Findings
from common.annotations.formats import voc as voc_format
from common.annotations.formats.coco import read_instances
from common.annotations.formats.voc import VOC_CLASSES, official_name, read_list, read_picture
from common.annotations.record import (
    FORMATS,
    ObjectRecord,
    SetChoice,
    annotation_xml,
    coco_content,
    read_class_names,
    read_set,
)
from common.errors import UserError
from tests.detection.tiny_detection import CLASSES, annotation, make_coco, make_official, make_voc
from tests.layouts import voc_xml

FLAGS = "<pose>Left</pose><truncated>0</truncated><difficult>1</difficult>"


def xml(name="dog", box=(1, 1, 40, 30), flags=FLAGS, size=(40, 30)):
    return voc_xml(name, box, size, flags)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(path)


@pytest.fixture
def voc(tmp_path):
    """VOC2007 with one picture, a."""
    folder = tmp_path / "VOC2007"
    picture(folder / "JPEGImages/a.jpg")
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    write(folder, xml())
    return folder


def write(folder: Path, text: str, encoding="utf-8", name="a") -> None:
    (folder / f"Annotations/{name}.xml").write_bytes(text.encode(encoding))


# -- VOC: annotations -----------------------------------------------------------------------------


def test_a_picture_and_its_object(voc):
    write(voc, xml(box=(2, 3.5, 40, 30)))
    record = read_picture(voc, "a", ["dog"])
    assert (record.image_id, record.width, record.height) == ("a", 40, 30)
    (item,) = record.objects
    assert item == ObjectRecord("dog", (1, 2.5, 40, 30), difficult=True)
    assert item.voc_box == (2, 3.5, 40, 30)


@pytest.mark.parametrize(
    ("head", "encoding", "message"),
    [
        *((f'<?xml version="1.0" encoding="{name}"?>', "utf-8", f"encoding '{name}', unknown; save")
          for name in ("klingon", "rot13", "zlib", "idna", "unicode_escape")),
        ('<?xml version="1.0" encoding="utf-8"?>', "gbk", "is no UTF-8 text .*; save it as UTF-8"),
        ("", "gbk", "is no UTF-8 text .*; save it as UTF-8"),
        ('<!DOCTYPE a [<!ENTITY b "bbbb">]>', "utf-8", "defines a document type or entities"),
        ('<!DOCTYPE annotation SYSTEM "voc.dtd">', "utf-8", "defines a document type or entities"),
        ('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a>', "utf-16", "defines a document ty"),
    ],
)  # fmt: skip
def test_an_encoding_that_cannot_be_read_is_one_clear_error(voc, head, encoding, message):
    write(voc, head + xml("鸟"), encoding)
    with pytest.raises(UserError, match=rf"a\.xml: .*({message})"):
        read_picture(voc, "a", None)


@pytest.mark.parametrize(
    ("flags", "is_difficult"),
    [
        ("", False),
        ("<difficult/><truncated> </truncated>", False),
        ("<difficult>Unspecified</difficult>", False),
        ("<difficult> 1\n</difficult>", True),
        ("<difficult>True</difficult><occluded>maybe</occluded>", True),
    ],
)
def test_flags_may_be_missing_and_names_have_white_space_round_them(voc, flags, is_difficult):
    write(voc, xml(" \n traffic light\t", flags=flags))
    (item,) = read_picture(voc, "a", ["traffic light"]).objects
    assert item == ObjectRecord("traffic light", (0, 0, 40, 30), difficult=is_difficult)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (xml("unicorn"), r"object 1 \(unicorn\): unknown class 'unicorn'; known are dog"),
        (xml(""), "object 1: class name"),
        (xml("x" * 101), "object 1: class name .* 1 to 100 characters"),
        (xml(box=(41, 1, 60, 9)), r"box \(41, 1, 60, 9\) lies outside the picture of 40 x 30"),
        (xml(box=(-99, 1, 9, 30)), "lies outside the picture of 40 x 30 pixels; clip it"),
        (xml(box=(0, 1, 0, 9)), "lies outside"),
        (xml(box=(1, 1, 1e308, 9)), "lies outside"),
        (xml(box=(9, 1, 3, 9)), r"box \(9, 1, 3, 9\) is empty or turned round; exchange"),
        *((xml(box=(x, 1, 5, 9)), f"<bndbox/xmin> holds '{x}'; write a number")
          for x in ("nan", "-inf", "1e999", "2,5", "1_0", "")),
        (xml(flags="<difficult>maybe</difficult>"), "<difficult> holds 'maybe'; write 0 or 1"),
        (xml(size=(50, 30)), "its size is 50 x 30 pixels, but a.jpg has 40 x 30; correct"),
        (xml(size=(0, 30)), "its size is 0 x 30 pixels"),
        (xml(size=(-40, "nan")), "<size/height> holds 'nan'; write a number"),
        (xml().replace("bndbox", "robndbox"), r"\(dog\): has 0 <bndbox>; give it one"),
        (xml(flags="<bndbox/>"), r"\(dog\): has 2 <bndbox>; give it one"),
        (xml().replace("<object>", "<objects><object>").replace("</object>", "</object></objects>"),
         "has a <bndbox> that is in no <object>"),
        ("<annotation>", "not readable as XML"),
        (f"<set>{xml()}</set>", "holds <set>, not VOC's <annotation>; export it"),
    ],
)  # fmt: skip
def test_each_fault_of_an_annotation_is_named(voc, text, message):
    write(voc, text)
    with pytest.raises(UserError, match=rf"a\.xml: .*{message}.*;|a\.xml: .*{message}"):
        read_picture(voc, "a", ["dog"])


def test_missing_and_damaged_files_are_named(voc):
    with pytest.raises(UserError, match=r"b\.xml: no such annotation, but a list names it"):
        read_picture(voc, "b", None)
    (voc / "JPEGImages/a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.jpg: does not decode, no picture .*; replace"):
        read_picture(voc, "a", None)
    (voc / "JPEGImages/a.jpg").unlink()
    with pytest.raises(UserError, match=r"a\.jpg: no such picture, but a list names it; add"):
        read_picture(voc, "a", None)
    with open(voc / "Annotations/a.xml", "r+b") as file:
        file.truncate((4 << 20) + 1)
    with pytest.raises(UserError, match="has 4,194,305 bytes, at most 4,194,304 are read"):
        read_picture(voc, "a", None)


def test_one_pixel_beyond_is_clipped_but_in_the_official_sets(voc):
    digests = {read_picture(voc, "a", None).content_digest}
    write(voc, xml(box=(0, 1, 41, 30.5)))
    records = [read_picture(voc, "a", None, is_official=flag) for flag in (True, False)]
    assert [x.objects[0].box for x in records] == [(-1, 0, 41, 30.5), (0, 0, 40, 30)]
    assert len(digests | {record.content_digest for record in records}) == 3


def test_doubled_objects_are_said(voc):
    write(voc, xml().replace("</annotation>", xml()[xml().index("<object>") :]))
    found = Findings()
    assert len(read_picture(voc, "a", None, findings=found).objects) == 2
    ((note, count),) = found.repairs.items()
    assert f"{count} {note}".startswith(
        "1 objects marked twice, same class and box: VOC's metric finds one"
    )


def test_two_pictures_of_one_name_are_refused(voc):
    picture(voc / "JPEGImages/a.PNG")
    with pytest.raises(UserError, match=r"'a' may be each of a\.PNG, a\.jpg; keep one of them"):
        read_picture(voc, "a", None)


# -- VOC: lists -----------------------------------------------------------------------------------


def test_names_with_spaces_and_class_wise_lists(voc):
    for name in ("a 1", "b 1", "photo (1)"):
        picture(voc / f"JPEGImages/{name}.jpg")
    lists = voc / "ImageSets/Main"
    (lists / "spaces.txt").write_text("a 1\nb 1\n")
    (lists / "mixed.txt").write_text("photo (1)\na\n")
    (lists / "dog_train.txt").write_text("a  1\nc -1\nd  0\n")
    (lists / "action_train.txt").write_text(
        "photo (1)  1  1\nb 4 -1\nphoto (1) 3 1\nd 1 -1\nc 1 0\n"
    )
    assert read_list(voc, "action_train", class_wise=True) == ["photo (1)", "c"]
    with pytest.raises(
        UserError, match=r"action_train\.txt: line 'photo .*' must hold one picture"
    ):
        read_list(voc, "action_train")
    picture(voc / "JPEGImages/a.png.jpg")
    (lists / "suffix.txt").write_text("a.jpg\nb 1.JPG\na.png\nno.jpg\n")
    assert read_list(voc, "suffix") == ["a", "b 1", "a.png", "no"]
    (lists / "cat_train.txt").write_text("a.jpg 1\nb 1.jpg -1\n")
    assert read_list(voc, "cat_train", class_wise=True) == ["a"]
    assert read_list(voc, "spaces") == ["a 1", "b 1"]
    assert read_list(voc, "mixed") == ["photo (1)", "a"]
    assert read_list(voc, "dog_train", class_wise=True) == ["a", "d"]
    with pytest.raises(UserError, match=r"dog_train\.txt: line 'a  1' must hold one picture name"):
        read_list(voc, "dog_train")


def test_faults_of_a_list_are_named(voc):
    lists = voc / "ImageSets/Main"
    (lists / "train.txt").write_text("\n")
    with pytest.raises(UserError, match=r"train\.txt: the list is empty"):
        read_list(voc, "train")
    with pytest.raises(UserError, match=r"val\.txt: no such list; lists there: train"):
        read_list(voc, "val")
    (lists / "train.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match=r"train\.txt: 'a' is listed 2 times"):
        read_list(voc, "train")
    for name in ("../a", "/a", "x/../../a", ".", "a\0b"):
        (lists / "train.txt").write_text(f"{250 * 'b'}\n{name}\n")
        with pytest.raises(UserError, match=r"train\.txt: .* leads out of .*JPEGImages; give a"):
            read_list(voc, "train")


def test_class_names_of_an_option_or_a_file(tmp_path):
    (tmp_path / "names.txt").write_bytes("cat\r\n traffic light \r\n".encode("utf-16"))
    assert read_class_names(str(tmp_path / "names.txt")) == ["cat", "traffic light"]
    assert read_class_names("cat, e\u0301toile") == ["cat", "\u00e9toile"]
    for text in (" , ", "cat,cat"):
        with pytest.raises(UserError, match="give different names"):
            read_class_names(text)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: cannot be read"):
        read_class_names(str(tmp_path / "pipe"))


# -- COCO -----------------------------------------------------------------------------------------


def coco(folder, **changes):
    picture(folder / "train/1.jpg")
    content = {
        "images": [{"id": 7, "file_name": "1.jpg", "width": 40, "height": 30}],
        "categories": [{"id": 9, "name": " dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1.25, 2, 3.5, 4], "area": 9.5},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_coco_keeps_floats_areas_and_crowds(tmp_path):
    classes, (record,) = read_instances(coco(tmp_path), tmp_path / "train")
    assert [*classes] == ["cat", "dog"]
    assert record.objects == (
        ObjectRecord("dog", (1.25, 2, 4.75, 6), area=9.5),
        ObjectRecord("cat", (0, 0, 9, 9), crowd=True),
    )
    assert (record.image_id, record.file.name) == ("7", "1.jpg")
    images = [{"id": 7, "file_name": "train/1.jpg", "width": 40, "height": 30}]
    _, (named_with_folder,) = read_instances(coco(tmp_path, images=images), tmp_path / "train")
    assert named_with_folder.file == record.file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"id": 1, "image_id": 8, "category_id": 9, "bbox": [0, 0, 1, 1]}]},
         "annotation 1 is of a picture that it does not list, image_id 8; add"),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [0, 0, 1, 1]}]},
         "annotation 1: category_id 5 is none of the categories"),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 9, "bbox": [0, 0, -1, 1]}]},
         r"annotation 1: bbox \[0, 0, -1, 1\]"),
        *(({"annotations": [{"id": 1, "image_id": 7, "category_id": 9, "bbox": box}]},
           rf"annotation 1: bbox .*{message}")
          for box, message in [([0, 0, 1], "give x, y, width"), (None, "give x, y"),
                               (["0", 0, 1, 1], "give x, y"), ([float("nan"), 0, 1, 1], "give x"),
                               ([0, 0, float("inf"), 1], "give x"), ([0, 0, 10**400, 1], "give x"),
                               ([40.5, 0, 9, 9], "lies outside the picture of 40 x 30"),
                               ([-9, 0, 9, 9], "lies outside"), ([1e308] * 4, "lies outside"),
                               ([3, 3, 0, 9], "is empty; remove")]),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 9,
                           "segmentation": {"size": [30, 40], "counts": [0, 9, 1191]}}]},
         r"annotation 1: bbox None: give .*; boxes of run-length masks: pycocotools"),
        *(({"annotations": [{"id": 1, "image_id": image, "category_id": category,
                             "bbox": [0, 0, 1, 1], **more}]}, message)
          for image, category, more, message in [
              ("7", 9, {}, "does not list, image_id '7'"), ([7], 9, {}, "image_id"),
              (None, 9, {}, "image_id None"), (7, None, {}, "category_id None is none"),
              (7, "9", {}, "category_id '9' is none"), (7, 9, {"area": -1}, "area -1: give"),
              (7, 9, {"area": float("nan")}, "area nan: give"), (7, 9, {"area": 1e11}, "area 1"),
              (7, 9, {"iscrowd": 2}, "iscrowd 2: give 0 or 1")]),
        ({"annotations": [{"id": 1}, {"id": 1}]}, "has 2 annotations of the id 1; give each"),
        ({"images": [{"id": 7}, {"id": 7}]}, "has 2 images of the id 7; give each its own"),
        ({"images": [{"id": 7}, {"id": "8"}]}, "images have the ids (7, '8'|'8', 7): give whole"),
        ({"images": [{"file_name": "1.jpg"}]}, "images have the ids None: give whole numbers"),
        ({"images": [{"id": 1.5}]}, "images have the ids 1.5"),
        ({"images": [{"id": True}]}, "images have the ids True"),
        ({"images": None}, "is no COCO annotation of instances: 'images' must be a list"),
        ({"annotations": [1]}, "'annotations' must be a list of objects; export it again"),
        ({"images": [{"id": i, "file_name": "1.jpg"} for i in (7, 8)]},
         r"picture 8: names 1\.jpg, as 7 does; keep one"),
        *(({"images": [{"id": 7, "file_name": name}]}, f"picture 7: {message}")
          for name, message in [("../train/2.jpg", "file_name .* leads out of"), (7, "file_name 7"),
                                ("/etc/passwd", "file_name .* leads out"), ("", "file_name ''"),
                                ("2.jpg", "no such picture, '2.jpg' in .*; add it"),
                                ("x" * 300, "no such picture")]),
        ({"images": [{"id": 7, "file_name": "1.jpg", "width": 41, "height": 30}]},
         r"picture 7: its size is 41 x 30 pixels, but 1\.jpg has 40 x 30; correct"),
        ({"images": [{"id": 7, "file_name": "1.jpg", "width": "40", "height": 30}]},
         "picture 7: its size is nan x 30"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "categories of the id"),
        ({"categories": [{"id": 1}]}, "category 1: class name None"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a "}]}, "category twice"),
    ],
)  # fmt: skip
def test_faults_of_coco_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_instances(coco(tmp_path, **changes), tmp_path / "train")


def test_coco_boxes_as_shares_are_refused(tmp_path):
    row = {"id": 1, "image_id": 7, "category_id": 9}
    path = coco(tmp_path, annotations=[row | {"bbox": [0.25, 0.5, 0.75, 0.25]}])
    with pytest.raises(UserError, match=r"all boxes are within 0 to 1, as shares .* in pixels"):
        read_instances(path, tmp_path / "train", findings=Findings(max_left_out=9))
    rows = [row | {"bbox": [0, 0, 1, 1]}, row | {"id": 2, "bbox": [0, 0, 1, 1.5]}]
    _, (record,) = read_instances(coco(tmp_path, annotations=rows), tmp_path / "train")
    assert len(record.objects) == 2


def test_up_to_ten_faults_of_coco_are_named_together(tmp_path):
    rows = [{"id": i, "image_id": 7, "category_id": 9, "bbox": [0, 0, -1, 1]} for i in range(12)]
    with pytest.raises(UserError) as caught:
        read_instances(coco(tmp_path, annotations=rows), tmp_path / "train")
    lines = str(caught.value).split("\n")
    assert len(lines) == 11
    assert lines[-1] == "and 2 more (--max-left-out 12 leaves out all 12)"


def test_empty_boxes_are_left_out_where_they_are_few(tmp_path):
    """COCO's own lists hold some."""
    rows = [{"id": i, "image_id": 7, "category_id": 9, "bbox": [0, 0, i, 9]} for i in range(2)]
    rows += [{"image_id": 7, "category_id": 9, "bbox": [0, 0, 9, 9]}] * 998
    path = coco(tmp_path, annotations=rows)
    _, (record,) = read_instances(path, tmp_path / "train", findings=(found := Findings()))
    assert len(record.objects) == 999
    assert found.all_left_out() == {"objects with an empty box: left out": 1}


# -- what we write --------------------------------------------------------------------------------


def test_an_annotation_that_is_written_comes_back(voc):
    write(voc, xml("鳥", box=(1.4, 2, 39.6, 30)))
    before = read_picture(voc, "a", None)
    content = annotation_xml("a.jpg", 40, 30, before.objects)
    assert content.isascii()
    (voc / "Annotations/a.xml").write_bytes(content)
    expected = (ObjectRecord("鳥", (0, 1, 40, 30), difficult=True),)
    assert read_picture(voc, "a", None).objects == expected


def test_an_object_that_an_evaluation_ignores_is_difficult_there_and_a_crowd_here(tmp_path):
    _, records = read_instances(coco(tmp_path), tmp_path / "train")
    text = annotation_xml("1.jpg", 40, 30, records[0].objects).decode()
    assert text.count("<difficult>1</difficult>") == 1
    content = coco_content(records, ["cat", "dog"])
    assert [(row["bbox"], row["area"], row["iscrowd"]) for row in content["annotations"]] == [
        ([1.25, 2, 3.5, 4], 9.5, 0),
        ([0, 0, 9, 9], 81, 1),
    ]
    assert [row["category_id"] for row in content["annotations"]] == [2, 1]


# -- sets ------------------------------------------------------------------------------------------


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    return make_voc(tmp_path / "data")


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def test_each_format_recognises_its_own_folders_only(voc_root: Path, coco_root: Path) -> None:
    for root, name in ((voc_root, "voc"), (voc_root / "VOC2007", "voc"), (coco_root, "coco")):
        assert [x for x in FORMATS.names() if FORMATS[x].recognises(root)] == [name]
    shutil.copytree(coco_root, voc_root, dirs_exist_ok=True)
    with pytest.raises(UserError, match="looks like coco and voc; choose one with --format"):
        read_set(voc_root)
    for name, year in (("voc", 2012), ("coco", None)):  # a test list for a detector's classes
        chosen = SetChoice(format=name, classes=("bar", "box", "disc"), test_only=True)
        data = read_set(voc_root, chosen)
        assert (data.classes, data.train, data.metric_year) == (chosen.classes, (), year)
        with pytest.raises(UserError, match="only in the set: disc; missing in the set: ball"):
            read_set(voc_root, replace(chosen, classes=("bar", "box", "ball")))
    with pytest.raises(UserError, match=r"holds no labelled set; .*coco: .*; voc: VOC2007/Im"):
        read_set(coco_root / "val2017")
    with pytest.raises(UserError, match="no such folder"):
        read_set(voc_root / "none")


# -- VOC ------------------------------------------------------------------------------------------


def test_digest_follows_the_content(voc_root: Path) -> None:
    voc = read_set(voc_root)
    assert (voc.name, voc.classes, voc.metric_year) == ("tiny", CLASSES, 2012)
    assert (voc.num_train, len(voc.test.pictures)) == (8, 4)
    before = voc.digest()
    assert read_set(voc_root).digest() == before
    file = voc_root / "VOC2007/Annotations/000000.xml"
    file.write_text(file.read_text().replace("<truncated>0", "<truncated>1"))
    assert read_set(voc_root).digest() != before


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    return make_official(tmp_path / "VOCdevkit")


@pytest.fixture
def small_is_official(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(voc_format.OFFICIAL_COUNTS, 1)
    monkeypatch.setattr(voc_format, "OFFICIAL_COUNTS", counts)


@pytest.mark.usefixtures("small_is_official")
def test_official_devkit_and_the_0712_protocol(tmp_path: Path) -> None:
    assert tuple(VOC_CLASSES) == CLASS_NAMES
    root = make_official(tmp_path / "VOCdevkit")
    voc = read_set(root)
    assert (voc.metric_year, len(voc.classes)) == (2007, 20)
    assert voc.train[0].folder.name == "VOC2007"
    lists = "voc_2007_trainval+voc_2012_trainval"
    both = read_set(root, SetChoice(train_split=lists, test_split="voc_2007_test"))
    assert [split.folder.name for split in both.train] == ["VOC2007", "VOC2012"]
    assert both.num_train == 2
    assert read_set(root, SetChoice(usual_train=lists, usual_test="voc_2012_test")).num_train == 2
    shutil.rmtree(root / "VOC2012")
    assert read_set(root, SetChoice(train_split="trainval", usual_train=lists)).num_train == 1
    with pytest.raises(UserError, match=r"VOC2012/.*trainval.txt: no such list.* the config"):
        read_set(root, SetChoice(usual_train=lists))
    make_official(root)
    assert read_set(tmp_path).num_train == 1  # the folder that holds VOCdevkit
    assert read_set(root, SetChoice(test_split="voc_2012_test")).metric_year == 2012
    with pytest.raises(UserError, match="in VOC2007 and in VOC2012; say voc_2007_test"):
        read_set(root, SetChoice(test_split="test"))


@pytest.mark.parametrize("label", ["helmet", "person"])
def test_an_own_devkit_is_not_taken_for_pascals(devkit: Path, label: str) -> None:
    """Also where its folder has that name, and its classes are among the 20."""
    for file in devkit.glob("*/Annotations/*"):
        file.write_text(file.read_text().replace("dog", label).replace("<xmax>20", "<xmax>23"))
    data = read_set(devkit)
    assert (data.classes, data.metric_year, data.train[0].name) == ((label,), 2012, "trainval")
    unused = "2 lists that are not used (voc_2012_test, voc_2012_trainval): --train-split takes"
    assert data.notes == (
        "2 boxes that reach further outside their picture: clipped", f"{unused} them, joined by +"
    )  # fmt: skip
    both = read_set(devkit, SetChoice(train_split="voc_2007_trainval+voc_2012_trainval"))
    assert (both.num_train, len(both.notes)) == (2, 1)
    chosen = SetChoice(classes=VOC_CLASSES)  # says that it is a part of PASCAL's
    with pytest.raises(UserError, match=r"lies outside" if label == "person" else "unknown class"):
        read_set(devkit, chosen)


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("is_official", [True, False])
def test_a_year_without_its_usual_lists(
    devkit: Path, year: int, is_official: bool, request: pytest.FixtureRequest
) -> None:
    """Lists that a config names are needed in PASCAL's own set alone."""
    if is_official:
        request.getfixturevalue("small_is_official")
    shutil.rmtree(devkit / f"VOC{4019 - year}")
    lists = devkit / f"VOC{year}/ImageSets/Main"
    shutil.copy(lists / "trainval.txt", lists / "train.txt")
    (lists / "test.txt").rename(lists / "val.txt")
    data = read_set(devkit)
    assert [x.name for x in (*data.train, data.test)] == ["train", "val"]
    metric = year if is_official else 2012
    assert (len(data.classes), data.metric_year) == (20 if is_official else 1, metric)
    named = SetChoice(usual_train="voc_2007_trainval+voc_2012_trainval", usual_test="voc_2007_test")
    if is_official:
        with pytest.raises(UserError, match="no such list"):
            read_set(devkit, named)
    else:
        assert read_set(devkit, named).digest() == data.digest()


def test_annotations_in_no_list_are_counted(voc_root: Path) -> None:
    folder = voc_root / "VOC2007"
    (folder / "ImageSets/Main/disc_train.txt").write_text("000000 1\n")
    assert read_set(voc_root).notes == ()
    for name in ("new", "e\u0301"):
        shutil.copy(folder / "Annotations/000000.xml", folder / f"Annotations/{name}.xml")
    (folder / "ImageSets/Main/more.txt").write_text("\u00e9\n")
    note = "1 annotations of pictures in no list: left out"
    assert read_set(voc_root).notes == (note,)
    (voc_root / "dataset.json").unlink()
    assert note in read_set(voc_root).notes


@pytest.mark.usefixtures("small_is_official")
def test_lists_of_one_or_two_years_are_there_once(tmp_path: Path) -> None:
    root = make_official(tmp_path / "VOCdevkit")
    data = read_set(root, SetChoice(all_lists=True))
    lists = [(x.folder.name, x.name) for x in (*data.train, data.test, *data.others)]
    assert lists[:2] == [("VOC2007", "trainval"), ("VOC2007", "test")]
    assert sorted(lists) == [
        (year, name) for year in ("VOC2007", "VOC2012") for name in ("test", "trainval")
    ]
    names = [official_name(split) for split in (*data.train, data.test, *data.others)]
    assert names[:2] == ["voc_2007_trainval", "voc_2007_test"]
    assert read_set(root, SetChoice(train_split="+".join([names[0], names[3]]))).num_train == 2
    shutil.rmtree(root / "VOC2012")
    data = read_set(root, SetChoice(train_split="voc_2007_trainval", all_lists=True))
    assert [x.name for x in (*data.train, data.test, *data.others)] == ["trainval", "test"]
    assert official_name(data.test) == "test"


def test_names_of_pictures_are_relative_to_the_folder_that_was_given(tmp_path: Path) -> None:
    make_voc(tmp_path / "outer/inner")
    data = read_set(tmp_path / "outer")
    assert data.root == tmp_path / "outer"
    assert data.test.pictures[0].file.relative_to(data.root).parts[0] == "inner"


def overwrite(path: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(text)


def many_wrong(root: Path) -> None:
    for path in (root / "VOC2007/Annotations").iterdir():
        path.write_text(path.read_text().replace("<xmin>", "<xmin>9"))


def no_objects(root: Path) -> None:
    for index in range(8, 12):
        (root / f"VOC2007/Annotations/{index:06d}.xml").write_text(annotation(96, []))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (overwrite("dataset.json", "{"), "dataset.json: is damaged, no JSON"),
        (
            overwrite("dataset.json", '{"classes": ["disc", "box", "bar"], "metric_year": 2010}'),
            "metric year 2010",
        ),
        (overwrite("dataset.json", '{"classes": "disc"}'), "dataset.json: has no list 'classes'"),
        (overwrite("dataset.json", '{"classes": ["disc", 7]}'), "dataset.json: class name 7"),
        (overwrite("dataset.json", '{"classes": ["a"], "test_split": 7}'), "test_split 7: give"),
        (overwrite("VOC2007/ImageSets/Main/train.txt", "x\n000001\ny"), r"(?s)x.xml: .*y.xml: no"),
        (many_wrong, r"(?s)000000.xml: object 1 .*000007.xml"),
        (no_objects, "none of its 4 pictures holds an object"),
    ],
)
def test_faults_of_a_voc_set_are_named(harm: Callable, message: str, voc_root: Path) -> None:
    harm(voc_root)
    with pytest.raises(UserError, match=message):
        read_set(voc_root)


# -- COCO -----------------------------------------------------------------------------------------


def test_boxes_classes_and_crowds_of_coco(coco_root: Path) -> None:
    coco, voc = read_set(coco_root), read_set(coco_root.parent / "as_voc")
    assert coco.classes == ("box", "disc", "bar"), "in the order of COCO's numbers"
    assert coco.metric_year is None
    pictures = coco.train[0].pictures
    assert [picture.image_id for picture in pictures] == [str(n) for n in range(100, 106)]
    for place, (ours, other) in enumerate(zip(pictures, voc.train[0].pictures, strict=True)):
        expected = () if place == 1 else other.objects  # crowds are not trained on
        assert [item.box for item in ours.objects] == [item.box for item in expected]
    crowds = [item.crowd for picture in coco.test.pictures for item in picture.objects]
    assert crowds == [False, True, False, False, False]


@pytest.mark.parametrize("places", [("val.json", "val"), ("instances_val.json", "images/val"),
                                    ("val.json", "images"), ("val.json", ".")])  # fmt: skip
def test_other_names_of_coco_files(coco_root: Path, places: tuple[str, str]) -> None:
    (coco_root / "annotations/instances_val2017.json").rename(coco_root / "annotations" / places[0])
    pictures = coco_root / places[1]
    pictures.mkdir(parents=True, exist_ok=True)
    for path in (coco_root / "val2017").iterdir():
        path.rename(pictures / path.name)
    shutil.rmtree(coco_root / "val2017")
    data = read_set(coco_root, SetChoice(test_split="val", test_only=True))
    assert (data.test.name, len(data.test.pictures)) == ("val", 5)
    assert read_set(coco_root, SetChoice(test_only=True)).test == data.test
    with pytest.raises(UserError, match=r"no such file; lists there: .*; see --train-split, --t"):
        read_set(coco_root, SetChoice(test_split="test"))


def test_one_of_cocos_lists_alone_is_split(coco_root: Path) -> None:
    (coco_root / "annotations/instances_train2017.json").unlink()
    data = read_set(coco_root)
    assert (data.num_train, len(data.test.pictures)) == (3, 2), "the five of val2017"
    with pytest.raises(UserError, match=r"instances_train2017.json: no such file"):
        read_set(coco_root, SetChoice(usual_train="coco_2017_train"))


def test_other_categories_and_another_metric_are_refused(coco_root: Path) -> None:
    with pytest.raises(UserError, match="leave --metric-year out"):
        read_set(coco_root, SetChoice(metric_year=2007))
    path = coco_root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "pole"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="different categories"):
        read_set(coco_root)
