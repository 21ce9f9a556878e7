"""Labelled pictures as every format is read: sets, lists, pictures, objects; boxes in floats."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import read_text

_MAX_CLASS_NAME = 100  # characters


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
    box: tuple[float, float, float, float]
    difficult: bool = False
    crowd: bool = False
    truncated: bool = False
    area: float | None = None

    @property
    def voc_box(self) -> tuple[float, float, float, float]:
        """(xmin, ymin, xmax, ymax) as VOC counts: from 1, both ends inclusive."""
        x0, y0, x1, y1 = self.box
        return x0 + 1.0, y0 + 1.0, x1, y1

    @property
    def is_ignored(self) -> bool:
        """Whether the object counts neither as an error nor as a match in an evaluation."""
        return self.difficult or self.crowd


@dataclass(frozen=True)
class PictureRecord:
    """One picture and its objects; width and height in pixels.

    `content_digest` is a hash of the annotation and of the picture's size in bytes.
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
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    metric_year: int | None
    train: tuple[LabelledSplit, ...]
    test: LabelledSplit

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
        test_only: Read no training list; then `classes` are a detector's, and the set must have
            the same ones.
    """

    format: str | None = None
    classes: tuple[str, ...] | None = None
    metric_year: int | None = None
    train_split: str | None = None
    test_split: str | None = None
    test_only: bool = False


def checked_class_name(text: object, where: str) -> str:
    """A class name without white space round it.

    Raises:
        UserError: If it is empty, longer than 100 characters or does not print.
    """
    name = text.strip() if isinstance(text, str) else ""
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
    parts = read_text(path).splitlines() if path.is_file() else text.split(",")
    names = [checked_class_name(part, "--classes") for part in parts if part.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"--classes {text!r}: give different names, a,b,c, or a file with one name a line"
        )
    return names
