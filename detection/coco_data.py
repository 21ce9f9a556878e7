"""A COCO folder, read into the same structure as a VOC set; its AP is COCO's own.

ROOT/annotations/instances_train2017.json, instances_val2017.json
ROOT/train2017/*.jpg, val2017/*.jpg
"""

from dataclasses import replace
from pathlib import Path

from common.annotations.coco import read_instances
from common.errors import UserError
from detection.dataset import VocSet, VocSplit

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
        test_split: Default: val2017. Crowds stay in it; the evaluation ignores them.

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
    classes, pictures = read_instances(path, root / split)
    if not is_test:
        pictures = tuple(
            replace(picture, objects=tuple(item for item in picture.objects if not item.crowd))
            for picture in pictures
        )
    if not any(picture.objects for picture in pictures):
        raise UserError(f"{path}: holds no object; download it again")
    return VocSplit(root / split, split, pictures), classes
