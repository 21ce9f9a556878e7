"""Data sets of VOC's layout or COCO's: every annotation is read and checked before any work.

Lists, annotation files, boxes, class names and pictures are checked. The first fault ends the run
with one message that names the file and the remedy.

VOC: ROOT/VOC2007/{ImageSets/Main/LIST.txt, Annotations/ID.xml, JPEGImages/ID.jpg}.
COCO: ROOT/annotations/instances_train2017.json, ROOT/train2017/*.jpg; the same with val2017.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.annotations.coco import read_instances
from common.annotations.record import PictureRecord
from common.annotations.voc import (
    VOC_CLASSES,
    annotation_file,
    class_names,
    list_file,
    list_names,
    read_list,
    read_picture,
)
from common.errors import UserError
from common.files import read_json

_OFFICIAL_SPLIT = re.compile(r"voc_(2007|2012)_(\w+)")


@dataclass(frozen=True)
class VocSplit:
    """One list of pictures: FOLDER/ImageSets/Main/NAME.txt, or COCO's, FOLDER with its pictures."""

    folder: Path
    name: str
    pictures: tuple[PictureRecord, ...]


@dataclass(frozen=True)
class VocSet:
    """A checked set: its classes in order, which AP metric it uses, its training and test lists.

    `metric_year` is VOC's (2007: 11 points, 2012: area), or None for COCO's metric.
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    metric_year: int | None
    train: tuple[VocSplit, ...]
    test: VocSplit

    @property
    def num_train(self) -> int:
        """Number of training pictures."""
        return sum(len(split.pictures) for split in self.train)

    def digest(self) -> str:
        """Hash of everything that training and evaluation read, but the pixels."""
        digest = hashlib.sha256(repr((self.classes, self.metric_year)).encode())
        for role, split in [*(("train", split) for split in self.train), ("test", self.test)]:
            digest.update(f"{role} {split.name}\n".encode())
            for picture in split.pictures:
                digest.update(f"{picture.content_digest}\n".encode())
        return digest.hexdigest()


def read_set(
    root: Path,
    *,
    classes: Sequence[str] | None = None,
    metric_year: int | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
) -> VocSet:
    """Read and check a data set of VOC's layout.

    Args:
        root: A folder with dataset.json and VOC2007/, or a VOC devkit (VOC2007/ and/or VOC2012/).
        classes: Class names in order; default: dataset.json, else the 20 VOC names.
        metric_year: 2007 for the 11-point AP, 2012 for the area; default: dataset.json, else 2007
            for the 20 VOC names in VOC2007 and 2012 for any other set.
        train_split: Lists joined by "+", such as "train" or
            "voc_2007_trainval+voc_2012_trainval".
        test_split: One list.

    Returns:
        The set, every annotation read.

    Raises:
        UserError: For the first fault found.
    """
    root = Path(root)
    description = _read_description(root)
    names = tuple(classes or description.get("classes") or VOC_CLASSES)
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"class list {', '.join(names)!r}: names must be different and not empty")
    official = _is_official(names, description)
    train_split = train_split or description.get("train_split")
    train_split = train_split or ("voc_2007_trainval" if official else "train")
    test_split, year = _test_list(description, official, metric_year, test_split)
    return VocSet(
        root=root,
        name=str(description.get("name") or root.name),
        classes=names,
        metric_year=year,
        train=tuple(
            _read_split(root, part, names, official=official) for part in train_split.split("+")
        ),
        test=_read_split(root, test_split, names, official=official),
    )


def read_test_set(
    root: Path,
    classes: Sequence[str],
    *,
    metric_year: int | None = None,
    test_split: str | None = None,
) -> VocSet:
    """Read and check the test list of a set that a trained detector shall be evaluated on.

    Args:
        root: As for `read_set`; it needs no training list.
        classes: The detector's class names, in its order.
        metric_year: As for `read_set`.
        test_split: One list; default as for `read_set`.

    Returns:
        A set without training lists, its classes in the detector's order.

    Raises:
        UserError: For the first fault found, or if the set has other class names.
    """
    root = Path(root)
    description = _read_description(root)
    official = _is_official(classes, description)
    split, year = _test_list(description, official, metric_year, test_split)
    folder, name = _split_folder(root, split)
    own = set(description.get("classes") or classes)
    if not description:  # the detector's names, and whatever else the annotations hold
        for image_id in read_list(folder, name):
            own |= class_names(annotation_file(folder, image_id))
    unknown, missing = sorted(own - set(classes)), sorted(set(classes) - own)
    if unknown or missing:
        raise UserError(
            f"{root}: its class names are not the detector's ({', '.join(classes)})"
            + (f"; only in the set: {', '.join(unknown)}" if unknown else "")
            + (f"; only in the detector: {', '.join(missing)}" if missing else "")
            + "; rename the classes in the annotations, or choose a set with the same ones"
        )
    return VocSet(
        root=root,
        name=str(description.get("name") or root.name),
        classes=tuple(classes),
        metric_year=year,
        train=(),
        test=_read_split(root, split, tuple(classes), official=official),
    )


def _is_official(classes: Sequence[str], description: dict[str, Any]) -> bool:
    """Whether a set is PASCAL's own, unpacked or imported by tools/make_dataset.py voc."""
    return tuple(classes) == VOC_CLASSES and (not description or description.get("kind") == "voc")


def _test_list(
    description: dict[str, Any], official: bool, year: int | None, split: str | None
) -> tuple[str, int]:
    """Which list is the test, and which metric it takes."""
    split = split or description.get("test_split") or ("voc_2007_test" if official else "test")
    assert split is not None
    if "+" in split:
        raise UserError(f"--test-split {split}: give one list; AP is taken over one set")
    # 11 points for the official VOC2007, the area for everything else.
    usual_year = 2007 if official and "2012" not in split else 2012
    year = year or description.get("metric_year") or usual_year
    if year not in (2007, 2012):
        raise UserError(f"metric year {year}: give 2007 (11-point AP) or 2012 (area)")
    return split, year


def _read_description(root: Path) -> dict[str, Any]:
    """dataset.json, or an empty dictionary for a plain devkit."""
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; give a data set made by tools/make_dataset.py or a VOC devkit"
        )
    path = root / "dataset.json"
    if not path.is_file():
        return {}
    description = read_json(path)
    if not isinstance(description, dict) or not description.get("classes"):
        raise UserError(
            f"{path}: has no list 'classes'; make the data set again with tools/make_dataset.py"
        )
    return description


def _split_folder(root: Path, split: str) -> tuple[Path, str]:
    """Where a list lives: "train" -> (ROOT/VOC2007, "train"), "voc_2012_val" -> (.../VOC2012, ..).

    Raises:
        UserError: If no VOC folder is there, or several and the name does not say which.
    """
    match = _OFFICIAL_SPLIT.fullmatch(split)
    years, name = ([match[1]], match[2]) if match else (["2007", "2012"], split)
    bases = [base for base in (root, root / "VOCdevkit") if base.is_dir()]
    found = [base / f"VOC{year}" for base in bases for year in years]
    if not match or root.name == f"VOC{years[0]}":
        found.append(root)  # a VOC folder itself
    found = [folder for folder in found if (folder / "ImageSets" / "Main").is_dir()]
    holders = [folder for folder in found if list_file(folder, name).is_file()]
    if not found:
        needed = " or ".join(f"VOC{year}/ImageSets/Main" for year in years)
        raise UserError(
            f"{root}: holds no {needed}; give the folder that holds VOC2007 (a VOC devkit), a data "
            "set made by tools/make_dataset.py, or a COCO folder (annotations/instances_*.json)"
        )
    if not holders:
        there = sorted(name for folder in found for name in list_names(folder))[:20]
        raise UserError(
            f"{list_file(found[0], name)}: no such list; lists there: "
            f"{', '.join(there) or 'none'}; choose with --train-split / --test-split / --eval-split"
        )
    if len(holders) > 1:
        raise UserError(
            f"list {split!r} is in {holders[0].name} and in {holders[1].name}; say "
            f"voc_2007_{name} or voc_2012_{name} with --train-split / --test-split"
        )
    return holders[0], name


def _read_split(root: Path, split: str, classes: tuple[str, ...], *, official: bool) -> VocSplit:
    """Read one list and every annotation it names."""
    folder, name = _split_folder(root, split)
    pictures = tuple(
        read_picture(folder, image_id, classes, tolerance_px=1 if official else 0)
        for image_id in read_list(folder, name)
    )
    if not any(picture.objects for picture in pictures):
        raise UserError(
            f"{list_file(folder, name)}: none of its {len(pictures)} pictures holds an object; "
            "annotate them or choose another list"
        )
    return VocSplit(folder, name, pictures)


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
        The set, pictures by number, classes ordered by COCO's numbers; `metric_year` is None:
        COCO's metric.

    Raises:
        UserError: If a file is missing or does not hold what it must.
    """
    root = Path(root)
    train, classes = _read_coco_list(root, train_split or "train2017", keeps_crowds=False)
    test, test_classes = _read_coco_list(root, test_split or "val2017", keeps_crowds=True)
    if classes != test_classes:
        raise UserError(
            f"{root / 'annotations'}: instances_{train.name}.json and instances_{test.name}.json "
            "have different categories; take both from the same release"
        )
    return VocSet(root, root.resolve().name, classes, None, (train,), test)


def _read_coco_list(
    root: Path, name: str, *, keeps_crowds: bool
) -> tuple[VocSplit, tuple[str, ...]]:
    """One list and its class names."""
    path = root / "annotations" / f"instances_{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) or "none"
        raise UserError(
            f"{path}: no such file (annotation files there: {there}); a COCO folder holds "
            "annotations/instances_train2017.json and instances_val2017.json, and the pictures in "
            "train2017 and val2017: give that folder with --data, or name other lists with "
            "--train-split and --test-split"
        )
    classes, pictures = read_instances(path, root / name)
    if not keeps_crowds:
        pictures = tuple(
            replace(picture, objects=tuple(item for item in picture.objects if not item.crowd))
            for picture in pictures
        )
    if not any(picture.objects for picture in pictures):
        raise UserError(f"{path}: holds no object; download it again")
    return VocSplit(root / name, name, pictures), classes


def classes_without_objects(split: VocSplit, classes: Sequence[str]) -> list[str]:
    """Classes for which AP is undefined: no object in the split that is not 'difficult'."""
    present = {
        item.class_name
        for picture in split.pictures
        for item in picture.objects
        if not item.is_ignored
    }
    return [name for name in classes if name not in present]
