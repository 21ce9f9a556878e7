"""Labelled pictures: the record that every format is read into, and the files written from it.

`read_set` recognises the format of a folder, reads and checks it before any work. A format is one
module of `common/annotations/formats`; its name on a command line is the name of the module. We
write a VOC devkit with whole boxes, and COCO's JSON unrounded.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from xml.etree import ElementTree

from common.config import Modules
from common.errors import UserError, no_such_file
from common.files import read_text

YEAR_FOLDER = "VOC2007"

_MAX_CLASS_NAME = 100  # characters
Box = tuple[float, float, float, float]
_T = TypeVar("_T")


@dataclass(frozen=True)
class ObjectRecord:
    """One object.

    Attributes:
        class_name: Without white space round it.
        box: (x0, y0, x1, y1) in continuous pixel coordinates: (0, 0, W, H) covers the picture.
        difficult: VOC's mark: an evaluation ignores the object, training uses it.
        crowd: COCO's mark: evaluation and training ignore it.
        truncated: VOC's mark: cut by the picture's border.
        area: In pixels, of the object's mask; None: the box's.
    """

    class_name: str
    box: Box
    difficult: bool = False
    crowd: bool = False
    truncated: bool = False
    area: float | None = None

    @property
    def voc_box(self) -> Box:
        """(xmin, ymin, xmax, ymax) as VOC counts: from 1, both ends inclusive."""
        x0, y0, x1, y1 = self.box
        return x0 + 1.0, y0 + 1.0, x1, y1

    @property
    def is_ignored(self) -> bool:
        """Whether the object counts neither as an error nor as a match in an evaluation."""
        return self.difficult or self.crowd


@dataclass(frozen=True)
class PictureRecord:
    """One upright picture and its objects; width and height in pixels.

    `content_digest` is a hash of the annotation, of the picture's size in bytes, and of the boxes
    if they are not the annotation's own.
    """

    image_id: str
    file: Path
    width: int
    height: int
    objects: tuple[ObjectRecord, ...]
    content_digest: str


@dataclass(frozen=True)
class LabelledSplit:
    """One list of pictures: its folder (VOC2007, or the one with COCO's pictures) and its name."""

    folder: Path
    name: str
    pictures: tuple[PictureRecord, ...]

    @property
    def num_objects(self) -> int:
        """Of all pictures."""
        return sum(len(picture.objects) for picture in self.pictures)

    def where(self, is_kept: Callable[[ObjectRecord], bool]) -> "LabelledSplit":
        """The same pictures with some of their objects."""
        pictures = [replace(x, objects=tuple(filter(is_kept, x.objects))) for x in self.pictures]
        return replace(self, pictures=tuple(pictures))

    def classes_without_objects(self, classes: Sequence[str]) -> list[str]:
        """Classes for which AP is undefined: no object that an evaluation counts."""
        objects = [item for picture in self.pictures for item in picture.objects]
        present = {item.class_name for item in objects if not item.is_ignored}
        return [name for name in classes if name not in present]


@dataclass(frozen=True)
class LabelledSet:
    """A checked set.

    Attributes:
        root: Its folder.
        name: For people.
        classes: In order.
        metric_year: VOC's AP (2007: 11 points, 2012: area), or None for COCO's.
        train: Lists to train on; empty if only the test list was read.
        test: The list to evaluate on.
        others: Further lists, if they were asked for.
        repaired: Number of each kind of repair that the reader made.
        left_out: Number of each kind of pictures and objects that the reader left out.
        faults: A line for each of these that counts for `SetChoice.max_left_out`, of many the first
            ones.
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    metric_year: int | None
    train: tuple[LabelledSplit, ...]
    test: LabelledSplit
    others: tuple[LabelledSplit, ...] = ()
    repaired: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """A line with a number for each kind of repair and of what was left out; the faults."""
        told = [*self.repaired.items(), *self.left_out.items()]
        return (*(f"{number} {kind}" for kind, number in told), *self.faults)

    @property
    def num_train(self) -> int:
        """Number of training pictures."""
        return sum(len(split.pictures) for split in self.train)

    def digest(self) -> str:
        """Hash of everything that training and evaluation read, except the pixels."""
        digest = hashlib.sha256(repr((self.classes, self.metric_year)).encode())
        for role, split in [*(("train", split) for split in self.train), ("test", self.test)]:
            digest.update(f"{role} {split.name}\n".encode())
            for picture in split.pictures:
                digest.update(f"{picture.content_digest}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class SetChoice:
    """What is read of a labelled set; None: what the set itself says, or its format's usual value.

    Attributes:
        format: Name of a module of common/annotations/formats; None: recognised from the folder.
        classes: Names in order.
        metric_year: 2007 (11-point AP) or 2012 (area).
        train_split: Lists joined by "+", as voc_2007_trainval+voc_2012_trainval.
        test_split: One list.
        usual_train, usual_test: The same as the config names them; for a devkit or COCO folder that
            has them, where neither an option nor a dataset.json says which.
        test_only: Read no training list; then `classes` are a detector's, and the set must have
            the same ones.
        exif: Of pictures with an EXIF orientation. "auto": boxes are of the picture, upright or as
            stored, that has the annotation's size; of the upright one if both have. "stored":
            boxes are of the picture as stored.
        max_left_out: How many faulty pictures and objects are left out; more are an error.
        decodes: Whether all pixels are read, so that damaged pictures are found; they are, where
            something may be left out.
        val_share: Of the pictures of a set without lists, those that are evaluated.
        split_seed: Chooses them.
        all_lists: Read the set's further lists too, into `LabelledSet.others`.
    """

    format: str | None = None
    classes: tuple[str, ...] | None = None
    metric_year: int | None = None
    train_split: str | None = None
    test_split: str | None = None
    usual_train: str | None = None
    usual_test: str | None = None
    test_only: bool = False
    exif: Literal["auto", "stored"] = "auto"
    max_left_out: int = 0
    decodes: bool = False
    val_share: float = 0.2
    split_seed: int = 0
    all_lists: bool = False


def checked_class_name(text: object, where: str) -> str:
    """A class name without white space round it, its accents composed.

    Raises:
        UserError: If it is empty, longer than 100 characters or does not print.
    """
    name = unicodedata.normalize("NFC", text.strip()) if isinstance(text, str) else ""
    if not 0 < len(name) <= _MAX_CLASS_NAME or not name.isprintable():
        raise UserError(
            f"{where}: class name {text!r:.60}: give 1 to {_MAX_CLASS_NAME} characters that print"
        )
    return name


def read_class_names(text: str) -> list[str]:
    """Class names from "a,b,c", or from a text file with one name a line.

    Raises:
        UserError: If there is none, or one is there twice.
    """
    path = Path(text)
    is_file = path.exists() and not path.is_dir()  # a pipe is refused, and no class name
    parts = read_text(path).split("\n") if is_file else text.split(",")
    names = [checked_class_name(part, "--classes") for part in parts if part.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"--classes {text!r}: give different names, a,b,c, or a file with one name a line"
        )
    return names


# -- reading ---------------------------------------------------------------------------------------


# How one kind of tools stores labelled pictures. Each module has
#   HOLDS: str, what a folder of this format holds, for messages;
#   recognises(root) -> bool, whether a folder looks like this format, reading no annotation;
#   read(root, choice) -> LabelledSet, every annotation of the chosen lists, read and checked; it
#       raises UserError for what is wrong with the folder or the choice.
FORMATS = Modules("common.annotations.formats")


def read_set(root: Path, choice: SetChoice | None = None) -> LabelledSet:
    """Read and check a labelled data set of any format.

    Args:
        root: Its folder.
        choice: Format, lists, classes and metric; default: what the set itself says.

    Raises:
        UserError: If the folder is of no format or of several, or something in it is wrong.
    """
    root, choice = Path(root), choice or SetChoice()
    if root.is_file():
        raise UserError(f"{root}: is a file: unpack an archive; give the folder of a labelled set")
    if not root.is_dir():
        raise UserError(no_such_file(root, "give one with a labelled set", "folder"))
    names = FORMATS.names() if choice.format is None else [choice.format]
    matching = [name for name in names if FORMATS[name].recognises(root)]
    if not matching and (inner := only_folder(root)) is not None:
        return replace(read_set(inner, choice), root=root)
    if not matching:
        listed = "; ".join(f"{name}: {FORMATS[name].HOLDS}" for name in names)
        raise UserError(f"{root}: holds no labelled set; give a folder with one ({listed})")
    if len(matching) > 1:
        raise UserError(f"{root}: looks like {' and '.join(matching)}; choose one with --format")
    return FORMATS[matching[0]].read(root, choice)


def only_folder(root: Path) -> Path | None:
    """The folder that is all there is in another, as archives are unpacked; no link."""
    inner = [path for path in root.iterdir() if not path.name.startswith((".", "__MACOSX"))]
    is_only = len(inner) == 1 and inner[0].is_dir() and not inner[0].is_symlink()
    return inner[0] if is_only else None


def check_same_classes(root: Path, own: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a set whose classes are not those that are needed, in any order.

    Raises:
        UserError: Naming the differences.
    """
    unknown, missing = sorted(set(own) - set(needed)), sorted(set(needed) - set(own))
    if unknown or missing:
        raise UserError(
            f"{root}: its class names are not {', '.join(needed)}; only in the set: "
            f"{', '.join(unknown) or 'none'}; missing in the set: {', '.join(missing) or 'none'}"
        )


# -- writing ---------------------------------------------------------------------------------------


def annotation_file(folder: Path, image_id: str) -> Path:
    """Where the annotation of a picture is in a VOC folder."""
    return folder / "Annotations" / f"{image_id}.xml"


def list_file(folder: Path, name: str) -> Path:
    """Where the list NAME of a VOC folder is."""
    return folder / "ImageSets" / "Main" / f"{name}.txt"


def make_folders(folder: Path) -> None:
    """Make the empty folders of a VOC folder."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def annotation_xml(picture: str, width: int, height: int, objects: Sequence[ObjectRecord]) -> bytes:
    """The annotation of one picture, with every field that Detectron2's evaluator needs.

    Args:
        picture: File name with its suffix.
        width: Columns of the picture.
        height: Rows of the picture.
        objects: Their boxes are rounded, see `whole_box`.
    Returns:
        XML in ASCII, other characters as numbers; boxes 1-based, both ends included.
    """
    root = ElementTree.Element("annotation")
    _add(root, folder=YEAR_FOLDER, filename=picture)
    _add(ElementTree.SubElement(root, "source"), database="generated")
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=0)
    for item in objects:
        x0, y0, x1, y1 = whole_box(item.box, width, height)
        node = ElementTree.SubElement(root, "object")
        _add(node, name=item.class_name, pose="Unspecified")
        _add(node, truncated=int(item.truncated), difficult=int(item.is_ignored))
        box = ElementTree.SubElement(node, "bndbox")
        _add(box, xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def evenly(items: Sequence[_T], count: int) -> list[_T]:
    """At most `count` (0: all) of some items, at even distances, the first among them.

    The pictures of a list often stand folder by folder, so its first ones are no sample of it.
    """
    if not 0 < count < len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def whole_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Rounded to whole pixels, within the picture, no side below one pixel."""
    x0, y0 = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    return x0, y0, min(max(round(box[2]), x0 + 1), width), min(max(round(box[3]), y0 + 1), height)


def _add(parent: ElementTree.Element, **values: object) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)


def write_list(folder: Path, name: str, image_ids: Sequence[str]) -> None:
    """Write the list of a VOC folder, one picture name a line."""
    text = "".join(f"{image_id}\n" for image_id in image_ids)
    list_file(folder, name).write_text(text, encoding="utf-8")


def coco_content(pictures: Sequence[PictureRecord], classes: Sequence[str]) -> dict[str, Any]:
    """Ground truth as COCO's JSON holds it: boxes not rounded, ignored objects as crowds.

    All ids count from 1, since pycocotools takes 0 for "no match". Images and categories are
    numbered by their place.
    """
    annotations = []
    for image, picture in enumerate(pictures, start=1):
        for item in picture.objects:
            x0, y0, x1, y1 = item.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": classes.index(item.class_name) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0) if item.area is None else item.area,
                    "iscrowd": int(item.is_ignored),
                }
            )
    return {
        "images": [
            {"id": i, "file_name": item.file.name, "width": item.width, "height": item.height}
            for i, item in enumerate(pictures, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
