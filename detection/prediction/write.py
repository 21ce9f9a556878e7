"""What a prediction leaves: drawn pictures, predictions.json, and data sets for correction.

    OUT/predictions.json, OUT/pictures/NAME.jpg
    OUT/voc/VOC2007/{JPEGImages,Annotations,ImageSets/Main/default.txt}
    OUT/coco/annotations/instances_default.json, OUT/coco/default/NAME.jpg
    OUT/yolo/data.yaml, OUT/yolo/{images,labels}/

The pictures of these sets are upright, as their boxes are.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.annotations.record import (
    YEAR_FOLDER,
    ObjectRecord,
    PictureRecord,
    annotation_file,
    annotation_xml,
    coco_content,
    make_folders,
    write_list,
)
from common.errors import UserError
from common.files import read_json_or_none, remove, write_bytes, write_json, write_text
from common.pictures import read_header
from detection.predict import Prediction
from detection.prediction.draw import draw_boxes
from detection.prediction.sources import OpenedPicture, name_of

FORMATS = ("json", "voc", "coco", "yolo")
_LIST = "default"
_RESULT, _STARTED = "predictions.json", ".unfinished"
_OWN = ("pictures", "voc", "coco", "yolo", _RESULT)
_KEPT = {b"\xff\xd8": ".jpg", b"\x89PNG\r\n\x1a\n": ".png"}  # first bytes -> suffix
_DRAWN_QUALITY, _COPY_QUALITY = 90, 95


class PredictionWriter:
    """Writes the predictions of one picture after another; `finish` makes the lists."""

    def __init__(self, out: Path, formats: Sequence[str], classes: Sequence[str]) -> None:
        """Prepare the folder, see `prepare`."""
        self.out, self.formats, self.classes = out, formats, classes
        self._taken: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._records: list[PictureRecord] = []
        self._voc, self._coco, self._yolo = out / "voc" / YEAR_FOLDER, out / "coco", out / "yolo"
        (out / "pictures").mkdir()
        if "voc" in formats:
            make_folders(self._voc)
        if "coco" in formats:
            (self._coco / _LIST).mkdir(parents=True)
        if "yolo" in formats:
            for name in ("images", "labels"):
                (self._yolo / name).mkdir(parents=True)

    def add(self, picture: OpenedPicture, found: Sequence[Prediction]) -> None:
        """Draw and write one picture."""
        name = name_of(picture, self._taken)
        height, width = picture.pixels.shape[:2]
        drawn = f"pictures/{name}.jpg"
        encoded = io.BytesIO()
        draw_boxes(picture.pixels, found, self.classes).save(
            encoded, "JPEG", quality=_DRAWN_QUALITY
        )
        (self.out / drawn).write_bytes(encoded.getvalue())
        row: dict[str, Any] = {"file": str(picture.path), "width": width, "height": height}
        if picture.frame is not None:
            row["frame"] = picture.frame
        boxes = [{"class": x.class_name, "score": x.score, "box": list(x.box)} for x in found]
        self._rows.append({**row, "drawn": drawn, "boxes": boxes})

        sets = [x for x in self.formats if x != "json"]
        if not sets:
            return
        suffix, data = _upright_copy(picture)
        file = f"{name}{suffix}"
        objects = tuple(ObjectRecord(one.class_name, one.box) for one in found)
        self._records.append(PictureRecord(name, Path(file), width, height, objects, ""))
        if "voc" in sets:
            (self._voc / "JPEGImages" / file).write_bytes(data)
            whole = [ObjectRecord(x.class_name, whole_box(x.box, width, height)) for x in found]
            xml = annotation_xml(file, width, height, whole)
            annotation_file(self._voc, name).write_bytes(xml)
        if "coco" in sets:
            (self._coco / _LIST / file).write_bytes(data)
        if "yolo" in sets:
            (self._yolo / "images" / file).write_bytes(data)
            lines = [
                f"{self.classes.index(x.class_name)} {yolo_box(x.box, width, height)}\n"
                for x in found
            ]
            (self._yolo / "labels" / f"{name}.txt").write_text("".join(lines))

    def finish(self) -> None:
        """Write the lists, last predictions.json: its presence says that all is there."""
        if "voc" in self.formats:
            write_list(self._voc, _LIST, [record.image_id for record in self._records])
        if "coco" in self.formats:
            content = coco_content(self._records, self.classes)
            write_json(self._coco / "annotations" / f"instances_{_LIST}.json", content)
        if "yolo" in self.formats:
            names = json.dumps(list(self.classes), ensure_ascii=False)  # JSON is YAML
            write_text(self._yolo / "data.yaml", f"train: images\nnames: {names}\n")
        write_json(self.out / _RESULT, self._rows)
        (self.out / _STARTED).unlink()


def prepare(out: Path, *, overwrite: bool) -> None:
    """Make the folder of the results, or empty it of older ones and of those of a killed run.

    Raises:
        UserError: If something else has their names, or older results may not be replaced.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    there = [name for name in _OWN if (out / name).exists()]
    is_killed = (out / _STARTED).is_file()
    if there and not is_killed:
        if not isinstance(read_json_or_none(out / _RESULT), list):
            raise UserError(f"--out {out}: has a {there[0]} of another program; choose another")
        if not overwrite:
            raise UserError(f"--out {out}: holds predictions; choose another, or give --overwrite")
    write_bytes(out / _STARTED, b"")
    for name in there:
        remove(out, name)


def whole_box(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[float, float, float, float]:
    """Rounded to whole pixels, within the picture, no side below one pixel."""
    x0, y0 = min(round(box[0]), width - 1), min(round(box[1]), height - 1)
    return x0, y0, max(round(box[2]), x0 + 1), max(round(box[3]), y0 + 1)


def yolo_box(box: tuple[float, float, float, float], width: int, height: int) -> str:
    """Centre and size as shares of the picture."""
    x0, y0, x1, y1 = box
    values = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
    return " ".join(f"{value:.8f}" for value in values)


def _upright_copy(picture: OpenedPicture) -> tuple[str, bytes]:
    """Suffix and bytes for a data set: an upright JPEG or PNG as it is, else a JPEG."""
    data = picture.data
    if data is not None and read_header(data, where=str(picture.path)).orientation == 1:
        for start, suffix in _KEPT.items():
            if data.startswith(start):
                return suffix, data
    encoded = io.BytesIO()
    Image.fromarray(picture.pixels).save(encoded, "JPEG", quality=_COPY_QUALITY, subsampling=0)
    return ".jpg", encoded.getvalue()
