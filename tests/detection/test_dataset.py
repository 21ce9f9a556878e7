import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from PIL import Image

from common.annotations.voc import VOC_CLASSES
from common.errors import UserError
from detection.dataset import classes_without_objects, read_set
from detection.training.data import register, to_detectron2
from tests.detection.tiny_detection import CLASSES, annotation


def test_set_of_ours(voc_root: Path) -> None:
    voc = read_set(voc_root)
    assert (voc.name, voc.classes, voc.metric_year) == ("tiny", CLASSES, 2012)
    assert (voc.num_train, len(voc.test.pictures)) == (8, 4)


def test_same_annotations_as_detectron2_reads(voc_root: Path) -> None:
    voc = read_set(voc_root)
    ours = to_detectron2(voc.train[0], voc.classes)
    theirs = load_voc_instances(str(voc_root / "VOC2007"), "train", CLASSES)
    assert [{**row, "image_id": str(row["image_id"])} for row in theirs] == ours


def test_registered_with_its_own_classes(voc_root: Path) -> None:
    voc = read_set(voc_root)
    for _ in range(2):  # a second time in the same process changes nothing
        train, test = register(voc)
    assert len(DatasetCatalog.get(train[0])) == 8
    assert MetadataCatalog.get(test).thing_classes == list(CLASSES)


def test_digest_follows_the_content(voc_root: Path) -> None:
    before = read_set(voc_root).digest()
    assert read_set(voc_root).digest() == before
    file = voc_root / "VOC2007" / "Annotations" / "000000.xml"
    file.write_text(file.read_text().replace("<truncated>0", "<truncated>1"))
    assert read_set(voc_root).digest() != before


def test_one_image_split_serves(voc_root: Path) -> None:
    (voc_root / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text("000009\n")
    voc = read_set(voc_root)
    assert len(voc.test.pictures) == 1
    assert classes_without_objects(voc.test, voc.classes) == ["box", "bar"]


def make_official(root: Path, years: tuple[str, ...] = ("2007", "2012")) -> Path:
    for year in years:
        voc = root / f"VOC{year}"
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (voc / folder).mkdir(parents=True)
        for split in ("trainval", "test"):
            name = f"{year}_{split}"
            Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(voc / f"JPEGImages/{name}.jpg")
            (voc / f"Annotations/{name}.xml").write_text(annotation(20, [("dog", 1, 1, 20, 20)]))
            (voc / f"ImageSets/Main/{split}.txt").write_text(f"{name}\n")
    return root


def test_official_devkit_and_the_0712_protocol(tmp_path: Path) -> None:
    assert tuple(VOC_CLASSES) == CLASS_NAMES
    root = make_official(tmp_path / "VOCdevkit")
    voc = read_set(root)
    assert (voc.metric_year, len(voc.classes)) == (2007, 20)
    assert voc.train[0].folder.name == "VOC2007"
    both = read_set(root, train_split="voc_2007_trainval+voc_2012_trainval",
                    test_split="voc_2007_test")  # fmt: skip
    assert [split.folder.name for split in both.train] == ["VOC2007", "VOC2012"]
    assert both.num_train == 2
    assert read_set(tmp_path).num_train == 1  # the folder that holds VOCdevkit
    assert read_set(root, test_split="voc_2012_test").metric_year == 2012
    with pytest.raises(UserError, match="in VOC2007 and in VOC2012; say voc_2007_test"):
        read_set(root, test_split="test")


def break_xml(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root / "VOC2007" / "Annotations" / "000009.xml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def write(path: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(text)


TEST_LIST = "VOC2007/ImageSets/Main/test.txt"
PICTURE = "VOC2007/JPEGImages/000009.jpg"
FAULTS = {
    "unknown class": (
        break_xml("disc", "ufo"),
        r"000009.xml: object 1 .*: unknown class 'ufo'.*disc, box, bar",
    ),
    "box outside": (
        break_xml("<ymax>", "<ymax>9"),
        r"000009.xml: object 1 .disc.: box .* outside the picture of 96",
    ),
    "box from 0": (break_xml("<xmin>", "<xmin>-"), r"000009.xml: object 1 .disc.: box .* outside"),
    "empty box": (break_xml("<xmin>", "<xmin>9"), r"000009.xml: object 1 .* (empty|outside)"),
    "no number": (break_xml("<width>96", "<width>wide"), r"<size/width> holds 'wide'"),
    "odd flag": (
        break_xml("<truncated>0", "<truncated>no"),
        r"<truncated> holds 'no'; write 0 or 1",
    ),
    "no box": (break_xml("bndbox", "bdnbox"), r"not readable as XML"),
    "other size": (
        break_xml("<width>96", "<width>97"),
        r"says 97 x 96 pixels, but 000009.jpg has 96",
    ),
    "empty split": (write(TEST_LIST, "\n"), r"test.txt: the list is empty"),
    "missing xml": (write(TEST_LIST, "nothere\n"), r"nothere.xml: no such annotation"),
    "listed twice": (write(TEST_LIST, "000009\n000009\n"), r"'000009' is listed 2 times"),
    "class-wise list": (write(TEST_LIST, "000009 -1\n"), r"must hold one picture name"),
    "missing picture": (lambda root: (root / PICTURE).unlink(), r"000009.jpg: no such picture"),
    "no picture": (write(PICTURE, "hello"), r"000009.jpg: does not decode, no picture"),
    "bad json": (write("dataset.json", "{"), r"dataset.json: is damaged, no JSON"),
    "no classes": (write("dataset.json", "{}"), r"dataset.json: has no list 'classes'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_with_its_file(fault: str, voc_root: Path) -> None:
    change, message = FAULTS[fault]
    change(voc_root)
    with pytest.raises(UserError, match=message) as caught:
        read_set(voc_root)
    assert str(voc_root) in str(caught.value)
    assert ";" in str(caught.value)  # what is wrong; what to do


def test_split_without_objects(voc_root: Path) -> None:
    for index in range(8, 12):
        (voc_root / f"VOC2007/Annotations/{index:06d}.xml").write_text(annotation(96, []))
    with pytest.raises(UserError, match="none of its 4 pictures holds an object"):
        read_set(voc_root)


def test_wrong_folders_and_options(voc_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_set(tmp_path / "none")
    with pytest.raises(UserError, match="holds no VOC2007/ImageSets/Main; give"):
        read_set(voc_root / "VOC2007" / "JPEGImages")
    with pytest.raises(UserError, match=r"val.txt: no such list; lists there: test, train"):
        read_set(voc_root, test_split="val")
    with pytest.raises(UserError, match="give one list"):
        read_set(voc_root, test_split="train+test")
    with pytest.raises(UserError, match="must be different"):
        read_set(voc_root, classes=["disc", "disc"])
    with pytest.raises(UserError, match="unknown class"):
        read_set(voc_root, classes=["disc", "box"])
    description = json.loads((voc_root / "dataset.json").read_text())
    (voc_root / "dataset.json").write_text(json.dumps({**description, "metric_year": 2010}))
    with pytest.raises(UserError, match="metric year 2010"):
        read_set(voc_root)
