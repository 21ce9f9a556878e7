"""One VOC annotation file: read it, check it against its picture, name what is wrong."""

import hashlib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.errors import UserError

_BOX_FIELDS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocObject:
    """One object; `box` is (xmin, ymin, xmax, ymax) in pixels, 1-based, both ends inclusive.

    `area` in pixels is COCO's, that of the mask; None: the box's.
    """

    class_name: str
    box: tuple[float, float, float, float]
    difficult: bool
    area: float | None = None

    def box_from_zero(self) -> list[float]:
        """[x0, y0, x1, y1] in continuous pixel coordinates: (1, 1, W, H) covers the picture."""
        xmin, ymin, xmax, ymax = self.box
        return [xmin - 1.0, ymin - 1.0, xmax, ymax]


@dataclass(frozen=True)
class VocPicture:
    """One picture and its objects; width and height in pixels."""

    image_id: str
    file: Path
    width: int
    height: int
    objects: tuple[VocObject, ...]
    content_digest: str


def read_picture(
    folder: Path,
    image_id: str,
    classes: tuple[str, ...],
    *,
    integer_boxes: bool,
    tolerance_px: int = 0,
) -> VocPicture:
    """Read Annotations/ID.xml and the header of JPEGImages/ID.jpg.

    Args:
        folder: VOC2007 or VOC2012.
        image_id: Name without suffix.
        classes: Names that may occur.
        integer_boxes: Whether the boxes must be whole numbers (Detectron2's evaluator reads them
            so); a few official VOC2012 training boxes are not.
        tolerance_px: How far a box may reach beyond the picture; above 0 (the official sets) a
            training object may also lack pose, truncated and difficult, which only the evaluator
            reads.

    Raises:
        UserError: If a file is missing or unreadable, or its content would mislead training.
    """
    path = folder / "Annotations" / f"{image_id}.xml"
    image_file = folder / "JPEGImages" / f"{image_id}.jpg"
    content, tree = _parse(path)
    width, height = (int(_number(path, tree, f"size/{side}")) for side in ("width", "height"))
    _check_picture(image_file, path, width, height)
    needs_flags = integer_boxes or tolerance_px == 0
    objects = tuple(
        _read_object(path, element, classes, integer_boxes, needs_flags)
        for element in tree.findall("object")
    )
    for item in objects:
        _check_box(path, item, width, height, tolerance_px)
    digest = hashlib.sha256(content + f"{image_id}{image_file.stat().st_size}".encode())
    return VocPicture(image_id, image_file, width, height, objects, digest.hexdigest())


def class_names(path: Path) -> set[str]:
    """Names of the objects of an annotation, unchecked."""
    _, tree = _parse(path)
    return {(element.findtext("name") or "").strip() for element in tree.findall("object")} - {""}


def _parse(path: Path) -> tuple[bytes, ElementTree.Element]:
    try:
        content = path.read_bytes()
        return content, ElementTree.fromstring(content)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such annotation, but a list names {path.stem!r}; add it or remove the line"
        ) from None
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: not readable as XML ({error}); write it again") from error


def _text(path: Path, element: ElementTree.Element, field: str) -> str:
    found = element.find(field)
    if found is None or not (found.text or "").strip():
        raise UserError(
            f"{path}: <{element.tag}> has no <{field}>; Detectron2's evaluator needs "
            "size, and name, pose, truncated, difficult, bndbox of every object"
        )
    return (found.text or "").strip()


def _number(path: Path, element: ElementTree.Element, field: str) -> float:
    text = _text(path, element, field)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{path}: <{field}> holds {text!r}; write a number") from None


def _read_object(
    path: Path,
    element: ElementTree.Element,
    classes: tuple[str, ...],
    integer_boxes: bool,
    needs_flags: bool,
) -> VocObject:
    name = _text(path, element, "name")
    if name not in classes:
        raise UserError(
            f"{path}: unknown class {name!r}; the set's classes are "
            f"{', '.join(classes)}; mend the annotation or give the list with "
            "--classes"
        )
    if needs_flags:
        _text(path, element, "pose")
    flags = {
        field: _text(path, element, field)
        if needs_flags or element.find(field) is not None
        else "0"
        for field in ("truncated", "difficult")
    }
    for field, value in flags.items():
        if value not in ("0", "1"):
            raise UserError(f"{path}: <{field}> holds {value!r}; write 0 or 1")
    box_element = element.find("bndbox")
    if box_element is None:
        raise UserError(f"{path}: an object {name!r} has no <bndbox>; add it")
    xmin, ymin, xmax, ymax = (_number(path, box_element, field) for field in _BOX_FIELDS)
    if integer_boxes:
        for field in _BOX_FIELDS:
            if not _text(path, box_element, field).lstrip("+-").isdigit():
                raise UserError(
                    f"{path}: <{field}> of a test box must be a whole number (VOC "
                    "counts pixels from 1); round it"
                )
    return VocObject(name, (xmin, ymin, xmax, ymax), flags["difficult"] == "1")


def _check_box(path: Path, item: VocObject, width: int, height: int, tolerance_px: int) -> None:
    xmin, ymin, xmax, ymax = item.box
    inside = (
        xmin >= 1 - tolerance_px
        and ymin >= 1 - tolerance_px
        and xmax <= width + tolerance_px
        and ymax <= height + tolerance_px
    )
    if not inside:
        raise UserError(
            f"{path}: box {_show(item)} of {item.class_name!r} lies outside the "
            f"picture of {width} x {height} pixels (counted from 1); mend the "
            "annotation"
        )
    if xmax < xmin or ymax < ymin:
        raise UserError(
            f"{path}: box {_show(item)} of {item.class_name!r} is empty; "
            "xmin <= xmax and ymin <= ymax must hold"
        )


def _show(item: VocObject) -> str:
    return "(" + ", ".join(f"{value:g}" for value in item.box) + ")"


def _check_picture(file: Path, annotation: Path, width: int, height: int) -> None:
    """Compare the picture's header with the annotation; pixels are not decoded here."""
    try:
        with Image.open(file) as image:
            size = image.size
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such picture, but {annotation.name} describes it; add the "
            "picture or remove its line from the list"
        ) from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{file}: not a readable picture ({error}); replace it") from error
    if size != (width, height):
        raise UserError(
            f"{annotation}: says {width} x {height} pixels, but {file.name} has "
            f"{size[0]} x {size[1]}; mend the annotation"
        )
