"""A COCO folder, read into the same structure as a VOC set; its AP is COCO's own.

ROOT/annotations/instances_train2017.json, instances_val2017.json
ROOT/train2017/*.jpg, val2017/*.jpg
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from common.errors import UserError
from detection.voc import VocSet, VocSplit
from detection.voc_annotation import VocObject, VocPicture

_LAYOUT = (
    "a COCO folder holds annotations/instances_train2017.json and instances_val2017.json, and the "
    "pictures in train2017 and val2017"
)


def is_coco(root: Path) -> bool:
    """Whether a folder looks like COCO's."""
    return any((root / "annotations").glob("instances_*.json")) or any(
        (root / name).is_dir() for name in ("train2017", "val2017")
    )


def read_coco(
    root: Path, *, train_split: str | None = None, test_split: str | None = None
) -> VocSet:
    """Read and check the boxes of a COCO folder; masks are not used.

    Args:
        root: The folder.
        train_split: Default: train2017. Crowds are left out of it, as Detectron2 does.
        test_split: Default: val2017. Crowds are marked "difficult" in it.

    Returns:
        The set, pictures by number; `metric_year` is None: COCO's metric.

    Raises:
        UserError: If a file is missing or does not hold what it must.
    """
    root = Path(root)
    train, train_classes = _read_split(root, train_split or "train2017", is_test=False)
    test, test_classes = _read_split(root, test_split or "val2017", is_test=True)
    if train_classes != test_classes:
        raise UserError(
            f"{_file(root, train.name)} and {_file(root, test.name).name}: have different "
            "categories; take both from the same release"
        )
    return VocSet(root, root.resolve().name, train_classes, None, (train,), test)


def _file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _read_split(root: Path, split: str, *, is_test: bool) -> tuple[VocSplit, tuple[str, ...]]:
    """One list and its class names, ordered by COCO's numbers."""
    path = _file(root, split)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) or "none"
        raise UserError(
            f"{path}: no such file (annotation files there: {there}); {_LAYOUT}: give that folder "
            "with --data, or name other lists with --train-split and --test-split"
        )
    try:
        content = json.loads(path.read_text())
        categories = sorted((row["id"], row["name"]) for row in content["categories"])
        labels = dict(categories)
        objects: dict[int, list[VocObject]] = defaultdict(list)
        for row in content["annotations"]:
            if is_test or not row.get("iscrowd", 0):
                objects[row["image_id"]].append(_object(row, labels))
        images = sorted(content["images"], key=lambda row: row["id"])
        pictures = tuple(_picture(root / split, row, objects[row["id"]]) for row in images)
    except UserError:
        raise
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is no COCO annotation of instances ({type(error).__name__}: {error}); "
            "download it again"
        ) from error
    if not any(picture.objects for picture in pictures):
        raise UserError(f"{path}: holds no object; download it again")
    return VocSplit(root / split, split, pictures), tuple(labels.values())


def _object(row: dict[str, Any], labels: dict[int, str]) -> VocObject:
    """COCO's (x, y, width, height) from 0 as a box counted from 1; the area is the mask's."""
    x, y, width, height = (float(value) for value in row["bbox"])
    box = (x + 1, y + 1, x + width, y + height)
    return VocObject(
        labels[row["category_id"]], box, bool(row.get("iscrowd", 0)), float(row["area"])
    )


def _picture(folder: Path, row: dict[str, Any], objects: list[VocObject]) -> VocPicture:
    file = folder / row["file_name"]
    if not file.is_file():
        raise UserError(f"{file}: no such picture, but its list names it; {_LAYOUT}")
    text = repr((row["id"], row["file_name"], file.stat().st_size, objects))
    digest = hashlib.sha256(text.encode()).hexdigest()
    width, height = int(row["width"]), int(row["height"])
    return VocPicture(str(row["id"]), file, width, height, tuple(objects), digest)
