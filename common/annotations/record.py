"""What every reader of annotations gives: pictures with their objects, boxes in floats."""

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
        difficult: VOC's mark: neither missed nor wrongly found in an evaluation, but trained on.
        crowd: COCO's mark: the same in an evaluation, and not trained on.
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
        """Whether an evaluation counts the object neither as missed nor as found."""
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
