"""Labelled sets of every format through the one entry point: recognised, read, refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from PIL import Image

from common.annotations.formats.voc import VOC_CLASSES
from common.annotations.record import FORMATS, SetChoice, read_set
from common.errors import UserError
from tests.detection.tiny_detection import CLASSES, annotation, make_coco, make_voc


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    return make_voc(tmp_path / "data")


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def test_formats_are_listed_without_heavy_libraries() -> None:
    code = (
        "import sys; from common.annotations.record import FORMATS\n"
        "names = FORMATS.names()\n"
        "print({'coco', 'voc'} <= set(names), all(FORMATS[name].holds for name in names))\n"
        "print({'torch', 'detectron2', 'pycocotools'} & {m.split('.')[0] for m in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["True True", "set()"]


def test_each_format_recognises_its_own_folders_only(voc_root: Path, coco_root: Path) -> None:
    for root, name in ((voc_root, "voc"), (voc_root / "VOC2007", "voc"), (coco_root, "coco")):
        assert [x for x in FORMATS.names() if FORMATS[x].recognises(root)] == [name]
    shutil.copytree(coco_root, voc_root, dirs_exist_ok=True)
    with pytest.raises(UserError, match="looks like coco and voc; choose one with --format"):
        read_set(voc_root)
    assert read_set(voc_root, SetChoice(format="voc")).metric_year == 2012
    assert read_set(voc_root, SetChoice(format="coco")).metric_year is None
    with pytest.raises(UserError, match=r"holds no labelled set; .*coco: .*; voc: VOC2007/Im"):
        read_set(coco_root / "annotations")
    with pytest.raises(UserError, match="no such folder"):
        read_set(voc_root / "none")


@pytest.mark.parametrize("name", ["voc", "coco"])
def test_a_test_list_for_the_classes_of_a_detector(
    name: str, voc_root: Path, coco_root: Path
) -> None:
    root = voc_root if name == "voc" else coco_root
    data = read_set(root, SetChoice(classes=("bar", "box", "disc"), test_only=True))
    assert (data.classes, data.train) == (("bar", "box", "disc"), ())
    message = "only in the set: disc; missing in the set: ball; rename"
    with pytest.raises(UserError, match=message):
        read_set(root, SetChoice(classes=("bar", "box", "ball"), test_only=True))


# -- VOC ------------------------------------------------------------------------------------------


def test_set_of_ours(voc_root: Path) -> None:
    voc = read_set(voc_root)
    assert (voc.name, voc.classes, voc.metric_year) == ("tiny", CLASSES, 2012)
    assert (voc.num_train, len(voc.test.pictures)) == (8, 4)
    (voc_root / "VOC2007/ImageSets/Main/test.txt").write_text("000009\n")
    voc = read_set(voc_root)
    assert len(voc.test.pictures) == 1
    assert voc.test.classes_without_objects(voc.classes) == ["box", "bar"]


def test_digest_follows_the_content(voc_root: Path) -> None:
    before = read_set(voc_root).digest()
    assert read_set(voc_root).digest() == before
    file = voc_root / "VOC2007/Annotations/000000.xml"
    file.write_text(file.read_text().replace("<truncated>0", "<truncated>1"))
    assert read_set(voc_root).digest() != before


def make_official(root: Path) -> Path:
    for year in ("2007", "2012"):
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
    lists = "voc_2007_trainval+voc_2012_trainval"
    both = read_set(root, SetChoice(train_split=lists, test_split="voc_2007_test"))
    assert [split.folder.name for split in both.train] == ["VOC2007", "VOC2012"]
    assert both.num_train == 2
    assert read_set(tmp_path).num_train == 1  # the folder that holds VOCdevkit
    assert read_set(root, SetChoice(test_split="voc_2012_test")).metric_year == 2012
    with pytest.raises(UserError, match="in VOC2007 and in VOC2012; say voc_2007_test"):
        read_set(root, SetChoice(test_split="test"))


def write(path: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(text)


def many_wrong(root: Path) -> None:
    for path in (root / "VOC2007/Annotations").iterdir():
        path.write_text(path.read_text().replace("<xmin>", "<xmin>-"))


def no_objects(root: Path) -> None:
    for index in range(8, 12):
        (root / f"VOC2007/Annotations/{index:06d}.xml").write_text(annotation(96, []))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (write("dataset.json", "{"), "dataset.json: is damaged, no JSON"),
        (write("dataset.json", "{}"), "dataset.json: has no list 'classes'"),
        (
            write("dataset.json", '{"classes": ["disc", "box", "bar"], "metric_year": 2010}'),
            "metric year 2010",
        ),
        (write("VOC2007/ImageSets/Main/train.txt", "x\n000001\ny"), r"(?s)x.xml: .*y.xml: no such"),
        (many_wrong, r"(?s)000000.xml: object 1 .*000007.xml"),
        (no_objects, "none of its 4 pictures holds an object"),
    ],
)
def test_faults_of_a_voc_set_are_named(harm: Callable, message: str, voc_root: Path) -> None:
    harm(voc_root)
    with pytest.raises(UserError, match=message):
        read_set(voc_root)


def test_no_more_than_ten_faults_are_listed(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "data", num_train=13)
    many_wrong(root)
    with pytest.raises(UserError, match=r"(?s)000009.xml: object 1 .*\nand 3 more$"):
        read_set(root)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (SetChoice(test_split="val"), "val.txt: no such list; .*: VOC2007/test, VOC2007/train"),
        (SetChoice(test_split="train+test"), "give one list"),
        (SetChoice(classes=("disc", "disc")), "must be different"),
        (SetChoice(classes=("disc", "box")), "unknown class"),
    ],
)
def test_wrong_choices_are_refused(choice: SetChoice, message: str, voc_root: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_set(voc_root, choice)


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


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: shutil.rmtree(root / "annotations"), r"files there: none.*val2017"),
        (lambda root: (root / "annotations/instances_val2017.json").unlink(), "val2017.json: no s"),
        (lambda root: (root / "val2017/000007.jpg").unlink(), "000007.jpg: no such picture"),
        (
            write("annotations/instances_val2017.json", '{"images": []}'),
            "is no COCO annotation of instances .KeyError: 'categories'",
        ),
        (write("annotations/instances_val2017.json", "{"), "JSONDecodeError"),
    ],
)
def test_faults_of_a_coco_folder_are_named(coco_root: Path, harm: Callable, message: str) -> None:
    harm(coco_root)
    with pytest.raises(UserError, match=message):
        read_set(coco_root)


def test_other_categories_and_another_metric_are_refused(coco_root: Path) -> None:
    with pytest.raises(UserError, match="leave --metric-year out"):
        read_set(coco_root, SetChoice(metric_year=2007))
    path = coco_root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "pole"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="different categories"):
        read_set(coco_root)
