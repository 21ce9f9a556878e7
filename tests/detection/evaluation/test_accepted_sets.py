"""Sets as tools write them, through reader, loader, evaluator and page.

A detector that sees the coloured rectangles reaches AP 100 if boxes, classes and pixels agree.
"""

import base64
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from common.annotations.record import LabelledSet, SetChoice, read_set
from common.errors import UserError
from detection.evaluation.evaluate import Evaluation, evaluate_detector, evaluated_split
from detection.training.config import load_config
from detection.training.data import build_test_loader, register
from pipeline.datasets.importers import open_source
from pipeline.report.pictures import Album
from tests import layouts
from tests.detection.tiny_detection import CONFIGS
from tests.layouts import LAYOUTS, SIZE
from tools.train_voc import main

CLASSES = ("cat", "dog")  # red, blue
FLAGS = "<pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"


class ColourDetector(nn.Module):
    """Finds one rectangle a picture by its colour, in the pixels that the loader gives."""

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        return [self._detect(given) for given in inputs]

    def _detect(self, given: dict[str, Any]) -> dict[str, Instances]:
        pixels = given["image"].numpy().astype(int)
        reds = [pixels[0] - pixels[2] > 150, pixels[2] - pixels[0] > 150]
        label = int(reds[1].sum() > reds[0].sum())
        rows, columns = np.nonzero(reds[label])
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        instances = Instances((given["height"], given["width"]))
        instances.pred_boxes = Boxes(torch.tensor([box], dtype=torch.float32))
        instances.scores = torch.tensor([0.9])
        instances.pred_classes = torch.tensor([label])
        return {"instances": instances}


def evaluated(data: LabelledSet) -> Evaluation:
    overrides = {"INPUT.FORMAT": "RGB", "INPUT.MIN_SIZE_TEST": "0", "TEST.NUM_SAVED_IMAGES": "9"}
    cfg = load_config(CONFIGS / "thin_R50_C4.yaml", overrides)
    cfg.DATASETS.TEST = (register(data)[1],)
    loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    result = evaluate_detector(cfg, ColourDetector(), loader, data)
    assert result is not None
    return result


STORED = [*layouts.BOXES.values()]  # continuous, on the stored picture


def write_picture(path: Path, number: int, orientation: int = 1, size=SIZE) -> None:
    layouts.paint(path, layouts.NAMES[number], orientation, size, is_turned=False)


def turned(box: tuple[float, ...], orientation: int, size=SIZE) -> tuple[float, ...]:
    """The box's place after Pillow's turn of a picture in which it alone is white."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    x0, y0, x1, y1 = (int(value) for value in box)
    mask[y0:y1, x0:x1] = 1
    turns = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
             Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
             Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
             Image.Transpose.ROTATE_90]  # fmt: skip
    image = Image.fromarray(mask)
    rows, columns = np.nonzero(
        np.asarray(image.transpose(turns[orientation - 2]) if orientation > 1 else image)
    )
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def xml(number: int, box: tuple[float, ...], size=SIZE) -> str:
    x0, y0, x1, y1 = box
    return layouts.voc_xml(CLASSES[number % 2], (x0 + 1, y0 + 1, x1, y1), size, FLAGS)


def make_devkit(root: Path, suffix: str = ".jpg", names=("000", "001", "002", "003")) -> Path:
    voc = root / "VOC2007"
    for part in ("Annotations", "ImageSets/Main"):
        (voc / part).mkdir(parents=True)
    for number, name in enumerate(names):
        write_picture(voc / f"JPEGImages/{name}{suffix}", number)
        (voc / f"Annotations/{name}.xml").parent.mkdir(exist_ok=True)
        (voc / f"Annotations/{name}.xml").write_text(xml(number, STORED[number]))
    for part in ("train", "test"):
        (voc / f"ImageSets/Main/{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return voc


def rewritten(change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    """Changes every annotation of a devkit."""

    def harm(voc: Path) -> None:
        for path in (voc / "Annotations").iterdir():
            text = change(path.read_text())
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return harm


def replaced(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    def change(text: str) -> str:
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        return text

    return rewritten(change)


def declared(encoding: str, codec: str, folder: str, bom: bytes = b"") -> Callable[[Path], None]:
    head = f'<?xml version="1.0" encoding="{encoding}"?>\n' if encoding else ""
    return rewritten(lambda text: bom + (head + text.replace("VOC2007", folder)).encode(codec))


def lists(write: Callable[[list[str]], bytes]) -> Callable[[Path], None]:
    def harm(voc: Path) -> None:
        for path in (voc / "ImageSets/Main").iterdir():
            path.write_bytes(write(path.read_text().split("\n")[:-1]))

    return harm


def renamed_pictures(suffix: str) -> Callable[[Path], None]:
    def harm(voc: Path) -> None:
        for number, path in enumerate(sorted((voc / "JPEGImages").iterdir())):
            write_picture(path.with_suffix(suffix), number)
            path.unlink()

    return harm


def at_the_edge(voc: Path) -> None:
    """Corners from 0 and to W + 1, as tools write them that count otherwise."""
    for number, path in enumerate(sorted((voc / "Annotations").iterdir())):
        pixels = np.full((96, 128, 3), 90, np.uint8)
        pixels[:, : 40 + number] = [(250, 20, 10), (10, 20, 250)][number % 2]
        Image.fromarray(pixels).save(voc / f"JPEGImages/{path.stem}.jpg", quality=95, subsampling=0)
        path.write_text(xml(number, (-1, -1, 40 + number, 97)))


CLIPPED = "4 boxes up to 1 pixel outside their picture: clipped"
NO_SIZE = "4 annotations without a size: the picture's taken"
EVALUATED = ("plain", "fractional", "corners from 0")  # and what has pictures of other formats
NOTES = {"no size": NO_SIZE, "size 0": NO_SIZE, "corners from 0": CLIPPED}
VOC_SETS: dict[str, Callable[[Path], None]] = {
    "plain": lambda voc: None,
    "gb2312": declared("gb2312", "gb2312", "图片"),
    "gbk": declared("GB2312", "gbk", "圖片"),
    "gb18030": declared("GB18030", "gb18030", "图片🐈"),
    "Shift_JIS": declared("Shift_JIS", "cp932", "①写真"),
    "big5": declared("Big5", "big5", "圖片"),
    "EUC-KR": declared("euc-kr", "cp949", "똠"),
    "windows-1251": declared("windows-1251", "cp1251", "Снимки"),
    "ISO-8859-15": declared("ISO-8859-15", "iso-8859-15", "Bücher€"),
    "utf-16": declared("UTF-16", "utf-16", "图片"),
    "utf-16 without mark": declared("utf-16", "utf-16-le", "图片"),
    "utf-16, big end first": declared("", "utf-16-be", "图片"),
    "utf-32": declared("", "utf-32", "图片"),
    "utf-16 that is utf-8": declared("utf-16", "utf-8", "图片"),
    "mark before a declaration": declared("utf-8", "utf-8", "图片", b"\xef\xbb\xbf"),
    "mark against the declaration": declared("gb2312", "utf-8", "图片", b"\xef\xbb\xbf"),
    "white space": replaced(("<name>", "<name>\n\t\t"), ("</name>", "\n\t</name>"),
                            ("<xmin>", "<xmin> ")),
    "fewest fields": replaced((FLAGS, ""), ("<folder>VOC2007</folder>", ""),
                              ("<depth>3</depth>", "")),
    "unspecified": replaced((FLAGS, "<truncated>Unspecified</truncated>"
                             "<difficult>False</difficult>")),
    "no size": rewritten(lambda text: text.replace("size>", "measure>")),
    "size 0": replaced(("<width>128", "<width>0"), ("<height>96", "<height>0")),
    "fractional": replaced(("</xmin>", ".5</xmin>"), ("</ymin>", ".25</ymin>"),
                           ("</xmax>", ".0</xmax>")),
    "corners from 0": at_the_edge,
    "parts with boxes": replaced(("</object>", "<part><name>head</name><bndbox><xmin>9</xmin>"
                                  "</bndbox></part></object>")),
    "namespace, comment": replaced((
        "<annotation>", '<annotation xmlns="http://x.org/voc"><!-- <object> -->')),
    "windows": lists(lambda x: ("\ufeff" + "\r\n".join(x)).encode()),
    "utf-16 lists": lists(lambda x: "\r\n".join([*x, ""]).encode("utf-16")),
    "old mac, blanks": lists(lambda x: "  \r".join([*x, " ", ""]).encode()),
    "suffix in lists": lists(lambda x: "\n".join(f"{name}.jpg" for name in x).encode()),
    ".png": renamed_pictures(".png"),
    ".JPG": renamed_pictures(".JPG"),
    ".jfif": renamed_pictures(".jfif"),
    ".webp": renamed_pictures(".webp"),
    ".bmp": renamed_pictures(".bmp"),
}  # fmt: skip


@pytest.mark.parametrize("name", VOC_SETS)
def test_voc_as_tools_write_it(tmp_path: Path, name: str) -> None:
    voc = make_devkit(tmp_path)
    VOC_SETS[name](voc)
    data = read_set(tmp_path, SetChoice(classes=CLASSES, test_only=True))
    assert ", ".join(data.notes) == NOTES.get(name, "")
    for number, picture in enumerate(data.test.pictures):
        expected = (0, 0, 40 + number, 96) if name == "corners from 0" else STORED[number]
        (item,) = picture.objects
        assert item.class_name == CLASSES[number % 2]
        assert item.box == pytest.approx(expected, abs=0.5 if name == "fractional" else 0)
    if name in EVALUATED or name.startswith("."):
        result = evaluated(data)
        assert result.means == pytest.approx(dict.fromkeys(result.means, 100))
        assert result.coco["AP"] == pytest.approx(100)
        assert result.errors["AP50"] == pytest.approx(100)
    assert len(open_source(tmp_path, split="test").pictures) == 4, "packing finds the same"


@pytest.mark.parametrize("name", {kind: name for name, (kind, *_) in LAYOUTS.items()}.values())
def test_folders_of_annotation_tools(tmp_path, name, capsys):
    """One of each format; common/test_formats.py reads them all."""
    LAYOUTS[name][1](tmp_path / "set")
    words = ["random", "--config", str(CONFIGS / "thin_R50_C4.yaml"), "--data"]
    words += [str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--check", "all", "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_train"], facts["num_test"]) == (4, 2)
    result = evaluated(read_set(tmp_path / "set", SetChoice(classes=CLASSES, test_only=True)))
    assert (result.coco["AP"], result.errors["AP50"]) == pytest.approx((100, 100))
    assert result.means == pytest.approx(dict.fromkeys(result.means, 100))


def test_evaluated_pictures_are_spread_over_the_list(tmp_path: Path) -> None:
    """The first pictures of a list are often one folder, so of one class."""
    voc = make_devkit(tmp_path)
    (voc / "ImageSets/Main/test.txt").write_text("000\n002\n001\n003\n")  # cat, cat, dog, dog
    data = read_set(tmp_path, SetChoice(classes=CLASSES, test_only=True))
    cfg = load_config(CONFIGS / "thin_R50_C4.yaml", {"TEST.NUM_IMAGES": "2"})
    split = evaluated_split(cfg, data)
    assert [picture.image_id for picture in split.pictures] == ["000", "001"]
    loader = build_test_loader(cfg, register(data)[1])
    assert [row["image_id"] for batch in loader for row in batch] == ["000", "001"]


def test_the_check_demands_objects_that_count(tmp_path: Path, capsys) -> None:
    voc = make_devkit(tmp_path)
    words = ["random", "--config", str(CONFIGS / "thin_R50_C4.yaml"), "--data", str(tmp_path)]
    words += ["--out", str(tmp_path / "out"), "--check", "all", "--json"]
    words += ["--train-split", "train", "--test-split", "test"]  # the same pictures
    torch.set_num_threads(2)
    assert main(words) == 0
    assert torch.get_num_threads() == 2, "the next check of a process times as this one did"
    replaced(("<difficult>0", "<difficult>1"))(voc)
    assert main(words) == 2
    assert "list 'test': no object of the detector's classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a 1", "photo (1)", "a.b.c", "鳥", "é", "sub/a"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_pictures(tmp_path: Path, name: str, form: Any) -> None:
    """The listed picture alone, though others have a part of its name."""
    voc = make_devkit(tmp_path, names=("a", "photo", unicodedata.normalize(form, name)))
    (voc / "ImageSets/Main/test.txt").write_text(unicodedata.normalize("NFC", name) + "\n")
    data = read_set(tmp_path, SetChoice(classes=CLASSES, test_only=True))
    (listed,) = data.test.pictures
    assert listed.file.is_file()
    assert unicodedata.normalize("NFC", str(listed.file.with_suffix(""))).endswith(f"es/{name}")
    assert [Path(x[0]) for x in open_source(tmp_path, split="test").pictures] == [listed.file]


def make_coco(root: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> Path:
    """A list val2017 of four pictures; `change` edits what its JSON holds."""
    content = layouts.coco(layouts.NAMES[:4])
    edit("annotations", area=1681, iscrowd=0)(content)
    for number in range(4):
        write_picture(root / f"val2017/photo {number}.jpg", number)
    change(content)
    layouts.write(root / "annotations/instances_val2017.json", json.dumps(content))
    return root


def edit(table: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Set values of every row; None takes them away, a function gets the old ones."""

    def change(content: dict[str, Any]) -> None:
        for row in content[table]:
            for key, value in values.items():
                if value is None:
                    row.pop(key, None)
                else:
                    row[key] = value(row[key]) if callable(value) else value

    return change


def ids_as_text(content: dict[str, Any]) -> None:
    edit("images", id=str)(content)
    edit("annotations", id=str, image_id=str, category_id=str)(content)
    edit("categories", id=str)(content)


COCO_SETS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": lambda content: None,
    "text as ids": ids_as_text,
    "fewest fields": edit("annotations", id=None, area=None, iscrowd=None),
    "no values": edit("annotations", area=lambda _: None, iscrowd=lambda _: None),
    "area 0": edit("annotations", area=0),
    "no size": edit("images", width=None, height=None),
    "size 0": edit("images", width=0, height=0),
    "fractional": edit("annotations", bbox=lambda b: [b[0] + 0.25, b[1], b[2] - 0.5, b[3]]),
}


@pytest.mark.parametrize("name", COCO_SETS)
def test_coco_as_tools_write_it(tmp_path: Path, name: str) -> None:
    data = read_set(make_coco(tmp_path, COCO_SETS[name]), SetChoice(test_only=True))
    assert ", ".join(data.notes) == NOTES.get(name, "")
    result = evaluated(data)
    assert result.means == pytest.approx(dict.fromkeys(result.means, 100))
    assert result.errors["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_coco_pictures(tmp_path: Path, form: Any) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["images"][0]["file_name"] = unicodedata.normalize(form, "sub/é 1.JPG")

    for other in ("NFC", "NFD"):
        root = make_coco(tmp_path / other, rename)
        write_picture(root / f"val2017/sub/{unicodedata.normalize(other, 'é 1.JPG')}", 0)
        assert evaluated(read_set(root, SetChoice(test_only=True))).coco["AP"] == pytest.approx(100)


def test_boxes_of_coco_at_the_edge_are_clipped(tmp_path: Path) -> None:
    def widen(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = [-1, -0.5, 130, 97.5]

    before = read_set(make_coco(tmp_path / "a"), SetChoice(test_only=True))
    after = read_set(make_coco(tmp_path / "b", widen), SetChoice(test_only=True))
    assert after.notes == ("1 boxes up to 1 pixel outside their picture: clipped",)
    assert after.test.pictures[0].objects[0].box == (0, 0, 128, 96)
    assert before.digest() != after.digest()


def make_turned_voc(root: Path, orientation: int, is_upright: bool, size=SIZE) -> Path:
    voc = make_devkit(root)
    upright = size[::-1] if orientation >= 5 else size
    for number, path in enumerate(sorted((voc / "JPEGImages").iterdir())):
        write_picture(path, number, orientation, size)
        box = turned(STORED[number], orientation, size) if is_upright else STORED[number]
        text = xml(number, box, upright if is_upright else size)
        (voc / f"Annotations/{path.stem}.xml").write_text(text)
    return root


def make_turned_coco(root: Path, orientation: int, is_upright: bool, size=SIZE) -> Path:
    upright = size[::-1] if orientation >= 5 and is_upright else size

    def change(content: dict[str, Any]) -> None:
        edit("images", width=upright[0], height=upright[1])(content)
        for row in content["annotations"]:
            box = STORED[row["image_id"]]
            x0, y0, x1, y1 = map(int, turned(box, orientation, size) if is_upright else box)
            row["bbox"] = [x0, y0, x1 - x0, y1 - y0]

    make_coco(root, change)
    for number in range(4):
        write_picture(root / f"val2017/photo {number}.jpg", number, orientation, size)
    return root


@pytest.mark.parametrize(
    ("make", "orientation"),
    [*((make_turned_voc, n) for n in range(1, 9)), *((make_turned_coco, n) for n in (1, 3, 6))],
)
@pytest.mark.parametrize("is_upright", [True, False])
def test_boxes_turn_with_their_picture(tmp_path, make, orientation, is_upright):
    root, keeps_size = make(tmp_path / "set", orientation, is_upright), 2 <= orientation <= 4
    choice = SetChoice(classes=CLASSES, test_only=True)
    data = read_set(root, choice)
    digest, (note, *_) = data.digest(), (*data.notes, "")
    assert note.startswith("4 pictures whose EXIF orientation keeps their size") == keeps_size
    if not is_upright and keeps_size:
        assert evaluated(data).coco["AP50"] < 50, "taken as upright, wrongly, but said"
    if not is_upright and orientation > 1:
        data = read_set(root, SetChoice(classes=CLASSES, test_only=True, exif="stored"))
        assert data.notes[0].startswith("4 pictures annotated as they are stored")
        assert (data.digest() != digest) == keeps_size, "the boxes belong to the digest"
    result = evaluated(data)
    assert result.coco["AP"] == pytest.approx(100)
    # What is drawn: the file's pixels upright, and the boxes of detections.json.
    for number, row in enumerate(result.detections):
        assert row["ground_truth"][0]["box"] == list(turned(STORED[number], orientation))
        size = SIZE[::-1] if orientation >= 5 else SIZE
        assert (row["width"], row["height"]) == size
        uri = Album().add(data.root / row["file_name"], 480)
        assert uri is not None
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), int)
        x0, y0, x1, y1 = map(int, row["ground_truth"][0]["box"])
        inside = drawn[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3]
        assert drawn.shape == (*size[::-1], 3)
        assert (abs(inside[..., 0] - inside[..., 2]) > 150).all()


def test_the_option_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_turned_voc(tmp_path / "set", 3, False)
    words = ["random", "--config", str(CONFIGS / "thin_R50_C4.yaml"), "--data", str(root)]
    words += ["--out", str(tmp_path / "out"), "--classes", "cat,dog", "--check", "all", "--json"]
    words += ["--train-split", "train", "--test-split", "test"]  # the same pictures
    notes = []
    for more in ((), ("--exif", "stored")):
        assert main([*words, *more]) == 0
        notes += json.loads(capsys.readouterr().out)["notes"]
    assert [note.split(":")[1][:30] for note in notes] == [
        " 8 pictures whose EXIF orienta", " 4 pictures in both lists",
        " 8 pictures annotated as they ", " 4 pictures in both lists",
    ]  # fmt: skip


def test_square_pictures_and_sizes_of_neither(tmp_path: Path) -> None:
    root = make_turned_voc(tmp_path / "square", 6, True, (128, 128))
    data = read_set(root, SetChoice(classes=CLASSES, test_only=True))
    assert data.notes[0].startswith("4 pictures whose EXIF orientation keeps their size: ")
    assert evaluated(data).coco["AP"] == pytest.approx(100)
    root = make_turned_voc(tmp_path / "upright", 6, True)
    with pytest.raises(UserError, match=r"96 x 128 pixels, but .* has 128 x 96 \(EXIF orient.* 6"):
        read_set(root, SetChoice(classes=CLASSES, test_only=True, exif="stored"))
