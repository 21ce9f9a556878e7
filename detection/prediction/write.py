"""What a prediction leaves: drawn pictures, predictions.json, and data sets for correction.

OUT/predictions.json, OUT/pictures/NAME.jpg
OUT/{voc,coco,yolo}/..: common/annotations/write.py, with the list `default`
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.annotations.record import ObjectRecord, PictureRecord
from common.annotations.write import WRITERS, upright_copy
from common.drawing import draw_boxes
from common.errors import require
from common.files import LOCK, held, read_json_or_none, remove, write_bytes, write_json
from detection.predict import Prediction
from detection.prediction.sources import OpenedPicture, name_of

FORMATS = ("json", "voc", "coco", "yolo")
_LIST = "default"
_RESULT, _STARTED = "predictions.json", ".unfinished"
_OWN = ("pictures", "voc", "coco", "yolo", _RESULT)
_DRAWN_QUALITY = 90


class PredictionWriter:
    """Writes the predictions of one picture after another; `finish` makes the lists."""

    def __init__(self, out: Path, formats: Sequence[str], classes: Sequence[str]) -> None:
        """Into a folder that is `prepared`."""
        self.out, self.formats, self.classes = out, formats, classes
        self._taken: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        (out / "pictures").mkdir()
        sets = [name for name in formats if name in WRITERS]
        self._writers = [WRITERS[name](out / name, classes) for name in sets]

    def add(self, picture: OpenedPicture, found: Sequence[Prediction]) -> None:
        """Draw and write one picture."""
        name = name_of(picture, self._taken)
        height, width = picture.pixels.shape[:2]
        drawn = f"pictures/{name}.jpg"
        image = draw_boxes(picture.pixels, found, self.classes)
        image.save(self.out / drawn, quality=_DRAWN_QUALITY)
        row: dict[str, Any] = {"file": str(picture.path), "width": width, "height": height}
        if picture.frame is not None:
            row["frame"] = picture.frame
        boxes = [{"class": x.class_name, "score": x.score, "box": list(x.box)} for x in found]
        self._rows.append({**row, "drawn": drawn, "boxes": boxes})

        if not self._writers:
            return
        suffix, data = upright_copy(picture.data, picture.pixels, picture.path.suffix)
        objects = tuple(ObjectRecord(one.class_name, one.box) for one in found)
        record = PictureRecord(name, picture.path, width, height, objects, "")
        for writer in self._writers:
            writer.add(_LIST, f"{name}{suffix}", data, record)

    def finish(self) -> None:
        """Write the lists, last predictions.json: its presence says that all is there."""
        for writer in self._writers:
            writer.finish()
        write_json(self.out / _RESULT, self._rows)
        (self.out / _STARTED).unlink()


@contextmanager
def prepared(out: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold the folder of the results: made, or emptied of older ones and of those of a killed run.

    Raises:
        UserError: If something else has their names, older results may not be replaced, or another
            process is at work there.
    """
    require(out.is_dir() or not out.exists(), f"--out {out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    with held(out / LOCK):
        there = [name for name in _OWN if (out / name).exists()]
        is_killed = (out / _STARTED).is_file()
        if there and not is_killed:
            is_ours = isinstance(read_json_or_none(out / _RESULT), list)
            require(is_ours, f"--out {out}: has a {there[0]} of another program; choose another")
            text = f"--out {out}: holds predictions; choose another, or give --overwrite"
            require(overwrite, text)
        write_bytes(out / _STARTED, b"")
        for name in there:
            remove(out, name)
        yield
