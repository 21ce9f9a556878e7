"""Labelled pictures as other programs read them: VOC, COCO and YOLO.

    ROOT/VOC2007/{JPEGImages/NAME.jpg, Annotations/NAME.xml, ImageSets/Main/LIST.txt}
    ROOT/annotations/instances_LIST.json, ROOT/LIST/NAME.jpg
    ROOT/data.yaml, ROOT/{images/LIST/NAME.jpg, labels/LIST/NAME.txt}

The pictures are upright, as their boxes are.
"""

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from common.annotations import record
from common.annotations.checks import composed
from common.files import write_json, write_text
from common.pictures import read_header

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_KEPT = frozenset({".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})  # beside JPEG and PNG
_QUALITY = 95
_UNSAFE = re.compile(r"[^\w.-]+")
_MAX_NAME = 140  # characters


def upright_copy(data: bytes | None, pixels: np.ndarray, suffix: str) -> tuple[str, bytes]:
    """Suffix and bytes of a picture for a data set.

    Args:
        data: Of the file; None if there is none.
        pixels: uint8 [height, width, 3], RGB, upright.
        suffix: Of the file's name.

    Returns:
        An upright picture as it is. One that its EXIF orientation turns, or that few programs read,
        is encoded again: a JPEG or what has no file as JPEG of quality 95, others as PNG.
    """
    kind = ".jpg" if data is None or data.startswith(_JPEG) else suffix.lower()
    if data is not None:
        kind = ".png" if data.startswith(_PNG) else kind
        is_upright = read_header(data, where="picture").orientation == 1
        if is_upright and (kind in (".jpg", ".png") or kind in _KEPT):
            return kind, data
    encoded = io.BytesIO()
    kind = kind if kind == ".jpg" else ".png"
    options = {"quality": _QUALITY, "subsampling": 0} if kind == ".jpg" else {}
    Image.fromarray(pixels).save(encoded, "JPEG" if options else "PNG", **options)
    return kind, encoded.getvalue()


def safe_name(name: str, taken: Collection[str]) -> str:
    """A file's name without suffix that is safe everywhere, and not one of those taken.

    Detectron2's reader of VOC takes no names with spaces.

    Args:
        name: Letters, digits, points and hyphens stay.
        taken: In small letters, as some systems do not tell capitals.
    """
    safe = _UNSAFE.sub("_", composed(name)).strip("._-")[:_MAX_NAME] or "picture"
    numbered = safe
    number = 1
    while numbered.lower() in taken:
        number += 1
        numbered = f"{safe}-{number}"
    return numbered


class SetWriter(ABC):
    """Writes one picture after another; `finish` writes lists and tables."""

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        """Of a folder and the class names in order."""
        self.root, self.classes = root, classes
        self.lists: dict[str, list[record.PictureRecord]] = {}

    def add(self, split: str, file: str, data: bytes, picture: record.PictureRecord) -> None:
        """Write a picture of a list.

        Args:
            split: Name of the list.
            file: The picture's name there, with its suffix.
            data: The upright picture's bytes.
            picture: Size and objects.
        """
        self.lists.setdefault(split, []).append(replace(picture, file=Path(file)))
        self._write(split, file, data, picture)

    @abstractmethod
    def _write(self, split: str, file: str, data: bytes, picture: record.PictureRecord) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Write what comes last."""


class VocWriter(SetWriter):
    """A devkit, boxes rounded to whole pixels."""

    def _write(self, split: str, file: str, data: bytes, picture: record.PictureRecord) -> None:
        write_voc_picture(self.root / record.YEAR_FOLDER, file, data, picture)

    def finish(self) -> None:
        """Write the lists."""
        record.make_folders(self.root / record.YEAR_FOLDER)
        for name, pictures in self.lists.items():
            record.write_list(
                self.root / record.YEAR_FOLDER, name, [picture.file.stem for picture in pictures]
            )


def write_voc_picture(folder: Path, file: str, data: bytes, picture: record.PictureRecord) -> None:
    """Write a picture and its annotation into a VOC folder."""
    record.make_folders(folder)
    (folder / "JPEGImages" / file).write_bytes(data)
    text = record.annotation_xml(file, picture.width, picture.height, picture.objects)
    record.annotation_file(folder, Path(file).stem).write_bytes(text)


class CocoWriter(SetWriter):
    """COCO's layout, boxes not rounded."""

    def _write(self, split: str, file: str, data: bytes, picture: record.PictureRecord) -> None:
        (self.root / split).mkdir(parents=True, exist_ok=True)
        (self.root / split / file).write_bytes(data)

    def finish(self) -> None:
        """Write the tables."""
        (self.root / "annotations").mkdir(parents=True, exist_ok=True)
        for name, pictures in self.lists.items():
            content = record.coco_content(pictures, self.classes)
            write_json(self.root / "annotations" / f"instances_{name}.json", content)


class YoloWriter(SetWriter):
    """Ultralytics' layout; of a list that is not train, val or test it makes `train`."""

    def _write(self, split: str, file: str, data: bytes, picture: record.PictureRecord) -> None:
        for kind in ("images", "labels"):
            (self.root / kind / split).mkdir(parents=True, exist_ok=True)
        (self.root / "images" / split / file).write_bytes(data)
        rows = []
        for item in picture.objects:
            box = yolo_box(item.box, picture.width, picture.height)
            rows.append(f"{self.classes.index(item.class_name)} {box}\n")
        (self.root / "labels" / split / file).with_suffix(".txt").write_text("".join(rows))

    def finish(self) -> None:
        """Write data.yaml."""
        folders = {name: f"images/{name}" for name in self.lists}
        places: dict[str, str | list[str]] = {
            name: folders.pop(name) for name in ("train", "val", "test") if name in folders
        }
        if others := list(folders.values()):
            first = [f"images/{name}" for name in places if name == "train"]
            places["train"] = [*first, *others] if len(others) + len(first) > 1 else others[0]
        content = places | {"names": list(self.classes)}
        lines = [
            f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()
        ]
        write_text(self.root / "data.yaml", "\n".join(lines) + "\n")  # JSON is YAML


def yolo_box(box: record.Box, width: int, height: int) -> str:
    """Centre and size as shares of the picture."""
    x0, y0, x1, y1 = box
    values = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
    return " ".join(f"{value:.8f}" for value in values)


WRITERS: dict[str, type[SetWriter]] = {"voc": VocWriter, "coco": CocoWriter, "yolo": YoloWriter}
