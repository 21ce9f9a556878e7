"""PASCAL VOC's layout: lists of pictures, and one XML file of objects for each picture."""

import codecs
import hashlib
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from common.annotations.record import ObjectRecord, PictureRecord, checked_class_name
from common.errors import UserError
from common.files import read_text
from common.pictures import BadPicture, picture_size

# The twenty names of the PASCAL VOC challenges 2007 to 2012, in their official order.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MAX_XML_BYTES = 16 << 20
_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")
# What Chinese programs call by the older names is often the wider set, which holds all of theirs.
_CODECS = {"gb2312": "gb18030", "gbk": "gb18030", "utf-8": "utf-8-sig", "utf8": "utf-8-sig"}


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


def list_file(folder: Path, name: str) -> Path:
    """Where the list NAME of a VOC folder is."""
    return folder / "ImageSets" / "Main" / f"{name}.txt"


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
        there = ", ".join(list_names(folder)[:20]) or "none"
        raise UserError(f"{path}: no such list; lists there: {there}; choose one of them")
    names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    pairs = [line.rsplit(maxsplit=1) for line in names]
    is_class_wise = all(len(pair) == 2 and pair[1] in ("-1", "0", "1") for pair in pairs)
    if names and is_class_wise and not any(find_picture(folder, line) for line in names):
        if not class_wise:
            raise UserError(
                f"{path}: line {names[0]!r} must hold one picture name and nothing else; "
                "class-wise lists such as aeroplane_train.txt do not serve"
            )
        names = [pair[0] for pair in pairs if pair[1] != "-1"]
    if not names:
        raise UserError(
            f"{path}: the list is empty; put one picture name a line, without .jpg, or choose "
            "another list"
        )
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
        raise UserError(
            f"{folder / 'JPEGImages' / image_id}.jpg: no such picture, but a list names it; add it "
            "or take its name off the list"
        )
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
        tolerance_px: How far a box may reach beyond its picture. 1 is meant for the official sets:
            a few of their boxes do.

    Raises:
        UserError: If a file is missing or unreadable, or its content would mislead training.
    """
    path = annotation_file(folder, image_id)
    content, tree = _parse(path)
    file = require_picture(folder, image_id)
    try:
        width, height = picture_size(file)
    except BadPicture as error:
        raise UserError(f"{error}; replace the picture") from error
    size = tuple(_number(path, tree, f"size/{side}") for side in ("width", "height"))
    if size != (width, height):
        raise UserError(
            f"{path}: <size> says {size[0]:g} x {size[1]:g} pixels, but {file.name} has {width} x "
            f"{height}; correct the size, and the boxes if the picture was scaled"
        )
    objects = []
    for number, element in enumerate(tree.findall("object"), start=1):
        where = f"{path}: object {number}"
        name = checked_class_name(element.findtext("name"), where)
        where += f" ({name})"
        if classes is not None and name not in classes:
            raise UserError(
                f"{where}: unknown class {name!r}; the set's classes are {', '.join(classes)}; "
                "mend the annotation or give the list with --classes"
            )
        xmin, ymin, xmax, ymax = (_number(where, element, f"bndbox/{key}") for key in _CORNERS)
        text = f"box ({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
        if xmax < xmin or ymax < ymin:
            raise UserError(
                f"{where}: {text} is empty or turned round; xmin <= xmax and ymin <= ymax must hold"
            )
        low, over = 1 - tolerance_px, tolerance_px
        if min(xmin, ymin) < low or xmax > width + over or ymax > height + over:
            raise UserError(
                f"{where}: {text} lies outside the picture of {width} x {height} pixels (counted "
                "from 1, both ends inclusive); clip or correct it"
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


def annotation_file(folder: Path, image_id: str) -> Path:
    """Where the annotation of a picture is."""
    return folder / "Annotations" / f"{image_id}.xml"


def class_names(path: Path) -> set[str]:
    """Names of the objects of an annotation, which are not checked otherwise."""
    _, tree = _parse(path)
    return {checked_class_name(item.findtext("name"), str(path)) for item in tree.findall("object")}


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
        raise UserError(
            f"{path}: no such annotation, but a list names {path.stem!r}; add it or take its name "
            "off the list"
        ) from None
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
    except LookupError:
        raise UserError(
            f"{path}: says that its encoding is {encoding!r}, which is not known; save it as UTF-8"
        ) from None
    except UnicodeError as error:
        raise UserError(
            f"{path}: is no {encoding.upper()} text, as it says ({error}); save it as UTF-8"
        ) from None
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
