"""COCO's layout: one JSON file of pictures, categories and boxes for each list."""

import hashlib
import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from common.annotations.record import (
    LabelledFormat,
    LabelledSet,
    LabelledSplit,
    ObjectRecord,
    PictureRecord,
    SetChoice,
    check_same_classes,
    checked_class_name,
)
from common.errors import UserError

_OFFICIAL_SPLIT = re.compile(r"coco_(20\d\d)_([a-z]+)")


class Coco(LabelledFormat):
    """ROOT/annotations/instances_train2017.json, ROOT/train2017/*.jpg; the same with val2017."""

    holds = "COCO's annotations/instances_train2017.json and instances_val2017.json"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        """Whether there is a file of instances or a folder of COCO's pictures."""
        return any((root / "annotations").glob("instances_*.json")) or any(
            (root / name).is_dir() for name in ("train2017", "val2017")
        )

    @classmethod
    def read(cls, root: Path, choice: SetChoice) -> LabelledSet:
        """Read and check the chosen lists; see `LabelledFormat.read`.

        Masks are not used. Crowds are left out of the training list, as Detectron2 does; they stay
        in the test list, where the evaluation ignores them. Pictures and classes are in the order
        of COCO's numbers, unless the choice orders the classes. The metric is COCO's.
        """
        if choice.metric_year is not None:
            raise UserError(f"{root}: a COCO folder has COCO's metric; leave --metric-year out")
        test, classes = _read_split(root, choice.test_split or _usual(choice.usual_test, "val2017"))
        train = ()
        if not choice.test_only:
            split, train_classes = _read_split(
                root, choice.train_split or _usual(choice.usual_train, "train2017")
            )
            if classes != train_classes:
                raise UserError(f"{root}: {split.name} and {test.name} have different categories")
            pictures = tuple(
                replace(picture, objects=tuple(item for item in picture.objects if not item.crowd))
                for picture in split.pictures
            )
            train = (replace(split, pictures=pictures),)
        for split in (*train, test):
            if not any(picture.objects for picture in split.pictures):
                raise UserError(f"{root}: list {split.name!r} holds no object; choose another")
        if choice.classes is not None:
            check_same_classes(root, classes, choice.classes)
            classes = choice.classes
        return LabelledSet(root, root.resolve().name, classes, None, train, test)


def _usual(name: str | None, default: str) -> str:
    """The list that a Detectron2 config names: coco_2014_train is train2014."""
    match = _OFFICIAL_SPLIT.fullmatch(name or "")
    return f"{match[2]}{match[1]}" if match else default


def _read_split(root: Path, name: str) -> tuple[LabelledSplit, tuple[str, ...]]:
    """One list and its class names."""
    path = root / "annotations" / f"instances_{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) or "none"
        raise UserError(f"{path}: no such file; there: {there}; see --train-split, --test-split")
    classes, pictures = read_instances(path, root / name)
    return LabelledSplit(root / name, name, pictures), classes


def read_instances(path: Path, folder: Path) -> tuple[tuple[str, ...], tuple[PictureRecord, ...]]:
    """Read and check the boxes of a list; masks are not used, boxes are not rounded.

    Args:
        path: instances_NAME.json.
        folder: Holds the pictures.

    Returns:
        Class names in the order of COCO's numbers, and the pictures in the order of theirs.

    Raises:
        UserError: If the file does not hold what it must, or an annotation has no picture.
    """
    try:
        content = json.loads(path.read_bytes())
        categories = sorted((row["id"], row["name"]) for row in content["categories"])
        labels = {number: checked_class_name(name, str(path)) for number, name in categories}
        images = sorted(content["images"], key=lambda row: row["id"])
        numbers = {row["id"] for row in images}
        if len(labels) < len(categories) or len(set(labels.values())) < len(categories):
            raise UserError(f"{path}: names or numbers a category twice; give each once")
        if len(numbers) < len(images):
            raise UserError(f"{path}: has two pictures of the same id; give each its own")
        objects: dict[int, list[ObjectRecord]] = defaultdict(list)
        for row in content["annotations"]:
            if row["image_id"] not in numbers:
                raise UserError(
                    f"{path}: annotation {row.get('id')!r} is of a picture that it does not list, "
                    f"image_id {row['image_id']!r}; add the picture or remove the annotation"
                )
            objects[row["image_id"]].append(_object(path, row, labels))
        pictures = tuple(_picture(path, folder, row, objects[row["id"]]) for row in images)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: is no COCO annotation of instances ({reason})") from error
    return tuple(labels.values()), pictures


def _object(path: Path, row: dict[str, Any], labels: dict[int, str]) -> ObjectRecord:
    where = f"{path}: annotation {row.get('id')!r}"
    if row["category_id"] not in labels:
        raise UserError(f"{where}: category_id {row['category_id']!r} is none of the categories")
    x, y, width, height = (float(value) for value in row["bbox"])
    if not all(map(math.isfinite, (x, y, width, height))) or min(width, height) < 0:
        raise UserError(f"{where}: bbox {row['bbox']}: give x, y, width >= 0, height >= 0")
    return ObjectRecord(
        labels[row["category_id"]],
        (x, y, x + width, y + height),
        crowd=bool(row.get("iscrowd", 0)),
        area=float(row["area"]) if "area" in row else None,
    )


def _picture(
    path: Path, folder: Path, row: dict[str, Any], objects: list[ObjectRecord]
) -> PictureRecord:
    name = PurePosixPath(row["file_name"])
    file = folder / name
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{path}: file_name {str(name)!r} leads out of {folder}; give one within")
    if not file.is_file():
        raise UserError(f"{file}: no such picture, but {path.name} names it; add it")
    text = repr((row["id"], row["file_name"], file.stat().st_size, objects))
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    width, height = int(row["width"]), int(row["height"])
    return PictureRecord(str(row["id"]), file, width, height, tuple(objects), digest)
