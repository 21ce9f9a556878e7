"""PASCAL VOC's layout: lists of pictures, and one XML file of objects for each picture."""

import codecs
import hashlib
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.annotations.record import (
    LabelledFormat,
    LabelledSet,
    LabelledSplit,
    ObjectRecord,
    PictureRecord,
    SetChoice,
    annotation_file,
    check_same_classes,
    checked_class_name,
    list_file,
)
from common.config import unknown
from common.errors import UserError
from common.files import read_json, read_text
from common.pictures import BadPicture, read_shape

# The twenty names of the PASCAL VOC challenges 2007 to 2012, in their official order.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_OFFICIAL_SPLIT = re.compile(r"voc_(2007|2012)_(\w+)")
_MAX_PROBLEMS = 10  # wrong annotations of a list that one message names
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MAX_XML_BYTES = 16 << 20
_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")
# What Chinese programs call by the older names is often the wider set, which holds all of theirs.
_CODECS = {"gb2312": "gb18030", "gbk": "gb18030", "utf-8": "utf-8-sig", "utf8": "utf-8-sig"}


# -- sets -----------------------------------------------------------------------------------------


class Voc(LabelledFormat):
    """ROOT/VOC2007/{ImageSets/Main/LIST.txt, Annotations/ID.xml, JPEGImages/ID.jpg}.

    The folder is a VOC devkit (VOC2007/ and/or VOC2012/), or a set made by tools/make_dataset.py,
    whose dataset.json says the classes, the lists and the metric.
    """

    holds = "VOC2007/ImageSets/Main or VOC2012/ImageSets/Main, or a dataset.json beside them"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        """Whether there is a dataset.json or a VOC folder."""
        return (root / "dataset.json").is_file() or bool(_devkit_folders(root))

    @classmethod
    def read(cls, root: Path, choice: SetChoice) -> LabelledSet:
        """Read and check the chosen lists; see `LabelledFormat.read`.

        Classes: the choice, else dataset.json, else the 20 VOC names. The metric of the 20 VOC
        names in VOC2007 is the 11-point AP, that of any other set the area.
        """
        description: dict[str, Any] = {}
        path = root / "dataset.json"
        if path.is_file():
            description = read_json(path)
            if not isinstance(description, dict) or not description.get("classes"):
                raise UserError(f"{path}: has no list 'classes'; make the data set again")
        classes = tuple(choice.classes or description.get("classes") or VOC_CLASSES)
        if len(set(classes)) != len(classes) or not all(classes):
            raise UserError(f"classes {', '.join(classes)!r} must be different and not empty")
        if choice.test_only and description:
            check_same_classes(root, description["classes"], classes)

        # PASCAL's own set, unpacked or imported, has its own lists, metric and tolerance.
        is_official = classes == VOC_CLASSES and (
            not description or description.get("kind") == "voc"
        )
        usual = ("train", "test")
        if is_official:
            config = (choice.usual_train or "", choice.usual_test or "")
            official = ("voc_2007_trainval", "voc_2007_test")
            usual = tuple(
                a if a.startswith("voc_") else b for a, b in zip(config, official, strict=True)
            )
        train_split = choice.train_split or description.get("train_split") or usual[0]
        test_split = choice.test_split or description.get("test_split") or usual[1]
        if "+" in test_split:
            raise UserError(f"--test-split {test_split}: give one list; AP is taken over one set")
        usual_year = 2007 if is_official and "2012" not in test_split else 2012
        year = choice.metric_year or description.get("metric_year") or usual_year
        if year not in (2007, 2012):
            raise UserError(f"metric year {year}: give 2007 (11-point AP) or 2012 (area)")

        def read(name: str) -> LabelledSplit:
            return read_split(*_find_list(root, name), classes, tolerance_px=int(is_official))

        return LabelledSet(
            root=root,
            name=str(description.get("name") or root.name),
            classes=classes,
            metric_year=year,
            train=() if choice.test_only else tuple(map(read, train_split.split("+"))),
            test=read(test_split),
        )


def read_split(
    folder: Path, name: str, classes: Collection[str], *, tolerance_px: int = 0
) -> LabelledSplit:
    """Read a list and every annotation that it names.

    Args:
        folder: VOC2007 or the like.
        name: Of the list.
        classes: Names that may occur.
        tolerance_px: See `read_picture`.

    Raises:
        UserError: For a missing or empty list, for up to ten wrong annotations together, and if
            no picture holds an object.
    """
    pictures, problems = [], []
    for image_id in read_list(folder, name):
        try:
            pictures.append(read_picture(folder, image_id, classes, tolerance_px=tolerance_px))
        except UserError as error:
            problems.append(str(error))
    if problems:
        more = [f"and {len(problems) - _MAX_PROBLEMS} more"] * (len(problems) > _MAX_PROBLEMS)
        raise UserError("\n".join([*problems[:_MAX_PROBLEMS], *more]))
    if not any(picture.objects for picture in pictures):
        path = list_file(folder, name)
        raise UserError(f"{path}: none of its {len(pictures)} pictures holds an object")
    return LabelledSplit(folder, name, tuple(pictures))


def _devkit_folders(root: Path) -> list[Path]:
    """VOC folders with lists: the folder itself, those in it, and those in ROOT/VOCdevkit."""
    folders = [*year_folders(root), *year_folders(root / "VOCdevkit")]
    return [folder for folder in folders if list_file(folder, "x").parent.is_dir()]


def _find_list(root: Path, split: str) -> tuple[Path, str]:
    """Where a list is: "train" -> (ROOT/VOC2007, "train"), "voc_2012_val" -> (.../VOC2012, "val").

    Raises:
        UserError: If there is no such list, or several and the name does not say which.
    """
    match = _OFFICIAL_SPLIT.fullmatch(split)
    name = match[2] if match else split
    folders = _devkit_folders(root)
    if match:
        folders = [folder for folder in folders if folder.name == f"VOC{match[1]}"]
    holders = [folder for folder in folders if list_file(folder, name).is_file()]
    if not holders:
        there = sorted(f"{folder.name}/{x}" for folder in folders for x in list_names(folder))
        year = match[1] if match else 2007
        needed = list_file(folders[0] if folders else root / f"VOC{year}", name)
        raise UserError(
            f"{needed}: no such list; lists there: {', '.join(there[:20]) or 'none'}; "
            "the config and --train-split, --test-split say which are read"
        )
    if len(holders) > 1:
        years = f"{holders[0].name} and in {holders[1].name}"
        raise UserError(f"list {split!r} is in {years}; say voc_2007_{name} or voc_2012_{name}")
    return holders[0], name


# -- lists ----------------------------------------------------------------------------------------


def year_folders(root: Path) -> list[Path]:
    """The VOC folders of a devkit, sorted: those below it, or itself; empty if it is none."""
    if (root / "ImageSets").is_dir() and (root / "JPEGImages").is_dir():
        return [root]
    return sorted(
        path
        for path in root.glob("VOC*")
        if path.is_dir() and ((path / "ImageSets").is_dir() or (path / "JPEGImages").is_dir())
    )


def list_names(folder: Path) -> list[str]:
    """Names of the lists of a VOC folder."""
    return sorted(path.stem for path in list_file(folder, "x").parent.glob("*.txt"))


def read_list(folder: Path, name: str, *, class_wise: bool = False) -> list[str]:
    """Picture names of a list, each once and without suffix; they may hold spaces.

    Args:
        folder: VOC2007 or the like.
        name: Of the list.
        class_wise: Whether a list such as aeroplane_train serves, whose lines end in 1, 0 or -1;
            the pictures with -1, without the class, are left out.

    Raises:
        UserError: If the list is missing or empty, or names a picture twice.
    """
    path = list_file(folder, name)
    if not path.is_file():
        raise UserError(f"{path}: no such list; lists there: {', '.join(list_names(folder)[:20])}")
    names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    pairs = [line.rsplit(maxsplit=1) for line in names]
    is_class_wise = all(len(pair) == 2 and pair[1] in ("-1", "0", "1") for pair in pairs)
    if names and is_class_wise and not any(find_picture(folder, line) for line in names):
        if not class_wise:
            raise UserError(f"{path}: line {names[0]!r} must hold one picture name alone")
        names = [pair[0] for pair in pairs if pair[1] != "-1"]
    if not names:
        raise UserError(f"{path}: the list is empty; put one picture name a line, without .jpg")
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: {twice!r} is listed {count} times; keep one of the lines")
    return names


def find_picture(folder: Path, image_id: str) -> Path | None:
    """JPEGImages/ID with any of the usual suffixes."""
    files = (folder / "JPEGImages" / f"{image_id}{suffix}" for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def require_picture(folder: Path, image_id: str) -> Path:
    """As `find_picture`.

    Raises:
        UserError: If there is none.
    """
    file = find_picture(folder, image_id)
    if file is None:
        path = folder / "JPEGImages" / f"{image_id}.jpg"
        raise UserError(f"{path}: no such picture, but a list names it; add it")
    return file


# -- annotations ----------------------------------------------------------------------------------


def read_picture(
    folder: Path, image_id: str, classes: Collection[str] | None, *, tolerance_px: int = 0
) -> PictureRecord:
    """Read Annotations/ID.xml and the header of the picture.

    Args:
        folder: VOC2007 or the like.
        image_id: Name without suffix.
        classes: Names that may occur; None: any.
        tolerance_px: How far a box may reach beyond its picture. 1 is for the official sets:
            a few of their boxes do.

    Raises:
        UserError: If a file is missing or unreadable, or its content would mislead training.
    """
    path = annotation_file(folder, image_id)
    content, tree = _parse(path)
    file = require_picture(folder, image_id)
    try:
        shape = read_shape(file)
        width, height = shape.width, shape.height
    except BadPicture as error:
        raise UserError(f"{error}; replace the picture") from error
    size = tuple(_number(path, tree, f"size/{side}") for side in ("width", "height"))
    if size != (width, height):
        raise UserError(
            f"{path}: <size> says {size[0]:g} x {size[1]:g} pixels, but {file.name} has {width} x "
            f"{height}; correct the size and the boxes"
        )
    objects = []
    for number, element in enumerate(tree.findall("object"), start=1):
        where = f"{path}: object {number}"
        name = checked_class_name(element.findtext("name"), where)
        where += f" ({name})"
        if classes is not None and name not in classes:
            raise UserError(f"{where}: {unknown(f'class {name!r}', name, classes)}; see --classes")
        xmin, ymin, xmax, ymax = (_number(where, element, f"bndbox/{key}") for key in _CORNERS)
        text = f"box ({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
        if xmax < xmin or ymax < ymin:
            raise UserError(f"{where}: {text} is empty or turned round")
        low, over = 1 - tolerance_px, tolerance_px
        if min(xmin, ymin) < low or xmax > width + over or ymax > height + over:
            raise UserError(
                f"{where}: {text} lies outside the picture of {width} x {height} pixels; clip it"
            )
        objects.append(
            ObjectRecord(
                name,
                (xmin - 1.0, ymin - 1.0, xmax, ymax),
                difficult=_flag(where, element, "difficult"),
                truncated=_flag(where, element, "truncated"),
            )
        )
    digest = hashlib.sha256(content + f"{image_id}{file.stat().st_size}".encode())
    return PictureRecord(image_id, file, width, height, tuple(objects), digest.hexdigest())


def _parse(path: Path) -> tuple[bytes, ElementTree.Element]:
    """Bytes and elements of an XML file in the encoding that it names.

    Python's parser knows no encoding of several bytes but UTF-8 and UTF-16, so text is decoded
    here. Entities are refused: they can expand without bound.
    """
    try:
        if path.stat().st_size > _MAX_XML_BYTES:
            raise UserError(f"{path}: has more than {_MAX_XML_BYTES >> 20} MiB; no annotation has")
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation, but a list names it; add it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    declared = _DECLARATION.match(content.removeprefix(codecs.BOM_UTF8))
    encoding = declared[1].decode().lower() if declared else "utf-8"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = content.decode(_CODECS.get(encoding, encoding))
        if "<!ENTITY" in text:
            raise UserError(f"{path}: defines entities; write the text in full")
        return content, ElementTree.fromstring(text)
    except (LookupError, UnicodeError) as error:
        reason = f"is no {encoding.upper()} text, as it says ({error})"
        raise UserError(f"{path}: {reason}; save it as UTF-8") from None
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: not readable as XML ({error}); write it again") from None


def _number(where: object, element: ElementTree.Element, field: str) -> float:
    text = (element.findtext(field) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: <{field}> holds {text!r}; write a number")
    return value


def _flag(where: str, element: ElementTree.Element, field: str) -> bool:
    """A mark that is 0 or 1; 0 if it is not there."""
    text = (element.findtext(field) or "0").strip()
    if text not in ("0", "1"):
        raise UserError(f"{where}: <{field}> holds {text!r}; write 0 or 1")
    return text == "1"
