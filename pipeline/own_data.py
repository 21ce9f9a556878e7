"""What two folders of a person hold: pictures for pretraining, and labelled ones."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from common.annotations import record
from common.annotations.formats import voc
from common.errors import UserError, no_such_file, require
from common.files import walk
from common.pictures import PICTURE_SUFFIXES, decode, is_picture_file, read_file
from pipeline.datasets.importers import open_source, split_folders

LEAST_POOL = 32  # two batches of the smallest size; below, negatives and BN say nothing


def num_bad(num_pictures: int) -> int:
    """How many of some pictures may be damaged: one in 20, and three at least."""
    return max(3, num_pictures // 20)


@dataclass(frozen=True)
class OwnData:
    """What the two folders hold.

    Attributes:
        pool: Folder that is packed for pretraining, and a sub-folder or list of it (or None).
        num_pool: Its pictures.
        labels: Folder of the labelled set.
        train_split, test_split: Its lists, named as `tools/train_voc.sh` names them.
        num_train, num_test: Pictures in them.
        classes: Names.
        max_left_out: Faulty labelled pictures and objects that are left out.
        short_side: Of labelled pictures, median, in pixels.
        aspect: Long over short side, median.
        objects: Square roots of boxes' areas over the short side of their picture: their deciles
            (9 numbers).
        decode_seconds: Of a labelled picture.
        notes: What a person should know.
    """

    pool: Path
    pool_split: str | None
    num_pool: int
    labels: Path
    train_split: str
    test_split: str
    num_train: int
    num_test: int
    classes: tuple[str, ...]
    max_left_out: int
    short_side: float
    aspect: float
    objects: tuple[float, ...]
    decode_seconds: float
    notes: tuple[str, ...] = ()


def survey(images: Path | None, labels: Path, options: Mapping[str, Any] | None = None) -> OwnData:
    """Look at the two folders.

    Args:
        images: Pictures, labelled or not; None: the labelled ones.
        labels: A labelled set of any format that is read.
        options: Of `tools/train_voc.sh`; those that say how the set is read are followed.
    Raises:
        UserError: If they are missing, swapped, empty or too small, or the labels are wrong.
    """
    for option, folder in (("--images", images), ("--labels", labels)):
        if folder is not None and not folder.is_dir():
            fault = no_such_file(folder, "give a folder", "folder")
            fault = f"{folder}: is a file: unpack an archive" if folder.is_file() else fault
            raise UserError(f"{option} {fault}")
    num_pictures = sum(path.suffix.lower() in PICTURE_SUFFIXES for path in walk(labels))
    choice = _choice({"max_left_out": num_bad(num_pictures)} | dict(options or {}))
    data = _labelled(images, labels, choice)
    train, test = [p for split in data.train for p in split.pictures], data.test.pictures
    notes = [f"labels: {note}" for note in data.notes]

    # The pool.
    folder = labels if images is None else images
    pool, split, about = _pool_of(folder)
    num_pool = len(open_source(pool, split=split).pictures)
    if images is None:
        notes.append("no --images: pretraining on the labelled pictures, without their labels")
    notes += about
    remedy = (
        "leave --images out, and the labelled pictures are taken" if images and images != labels
        and num_pictures >= LEAST_POOL else "add pictures; they need no labels"
    )  # fmt: skip
    require(
        num_pool >= LEAST_POOL,
        f"{'--images' if images else '--labels'} {folder}: {num_pool} pictures; pretraining takes "
        f"{LEAST_POOL} at least, and hundreds to be of use: {remedy}",
    )
    inside = folder.resolve()
    if any(picture.file.resolve().is_relative_to(inside) for picture in test):
        notes.append(
            "the pictures of the evaluation lie in the pool too, without their labels: AP of the "
            "pretrained arm may be a little above that on pictures never seen"
        )
    if len(test) < 50:
        notes.append(f"pictures to evaluate: {len(test)}; AP is uncertain by several points")

    sides = [sorted((picture.width, picture.height)) for picture in train]
    objects = [
        math.sqrt((box[2] - box[0]) * (box[3] - box[1])) / min(picture.width, picture.height)
        for picture in train
        for box in (item.box for item in picture.objects)
    ]
    return OwnData(
        pool=pool,
        pool_split=split,
        num_pool=num_pool,
        labels=labels,
        train_split="+".join(voc.official_name(one) for one in data.train),
        test_split=voc.official_name(data.test),
        num_train=len(train),
        num_test=len(test),
        classes=data.classes,
        max_left_out=choice.max_left_out,
        short_side=median(short for short, _ in sides),
        aspect=median(long / short for short, long in sides),
        objects=tuple(quantiles(objects * 2, n=10, method="inclusive")),  # two values at least
        decode_seconds=_decode_seconds(train),
        notes=tuple(notes),
    )


def _choice(options: Mapping[str, Any]) -> record.SetChoice:
    """How a set is read, by options of `tools/train_voc.sh`."""
    names = ("format", "train_split", "test_split", "exif")
    given: dict[str, Any] = {x: str(options[x]) for x in names if options.get(x) is not None}
    if options.get("classes") is not None:
        given["classes"] = tuple(record.read_class_names(str(options["classes"])))
    number = options["max_left_out"]
    require(isinstance(number, int), f"--max-left-out {number}: give a whole number")
    return record.SetChoice(max_left_out=number, **given)


def _labelled(images: Path | None, labels: Path, choice: record.SetChoice) -> record.LabelledSet:
    """The labelled set; what is wrong with it, and what to try instead."""
    try:
        return record.read_set(labels, choice)
    except UserError as error:
        if images is None or images.resolve() == labels.resolve():
            raise UserError(f"--labels {error}") from None
        fault = str(error)
    # Perhaps they are swapped, or the annotations lie apart from their pictures.
    above = Path(os.path.commonpath([images.resolve(), labels.resolve()]))
    tries = [(images, f"swapped? Give --images {labels} --labels {images}")]
    if above not in (images.resolve(), labels.resolve()) and len(above.parts) > 2:
        tries.append((above, f"do its pictures lie in {images}? Give --labels {above}"))
    for folder, remedy in tries:
        try:
            record.read_set(folder, choice)
        except UserError:
            continue
        raise UserError(f"--labels {fault}\n  {folder} holds labelled pictures: {remedy}")
    raise UserError(f"--labels {fault}")


def _pool_of(folder: Path) -> tuple[Path, str | None, list[str]]:
    """The pictures of a folder: where they are, a sub-folder or list to choose, and remarks."""
    years = voc.year_folders(folder) or voc.year_folders(folder / "VOCdevkit")
    if not years and (inner := record.only_folder(folder)) is not None:
        return _pool_of(inner)
    if years:
        if len(years) == 1 and (years[0] / "JPEGImages").is_dir():
            return years[0] / "JPEGImages", None, []
        names = [set(voc.list_names(year)) for year in years]
        usual = [x for x in ("trainval", "train", *sorted(set.union(*names))) if any(
            x in one for one in names)]  # fmt: skip
        require(bool(usual), f"{folder}: a VOC devkit without lists; give its JPEGImages")
        return years[0].parent, usual[0], [f"pool: list {usual[0]} of the devkit"]
    names = [path.relative_to(folder).as_posix() for path in walk(folder) if is_picture_file(path)]
    folders, loose = split_folders(names), sum("/" not in name for name in names)
    if not folders:
        return folder, None, []
    train = next((x for x in folders if x.lower() in ("train", "training")), folders[0])
    notes = [f"pool: the folder {train} of {', '.join(folders)}"]
    return folder, train, notes + [f"pool: {loose} pictures beside these: left out"] * (loose > 0)


def _decode_seconds(pictures: list[record.PictureRecord]) -> float:
    """Processor time of decoding a picture; the median of some."""
    took = []
    for picture in pictures[:: max(1, len(pictures) // 5)][:5]:
        began = time.process_time()
        decode(read_file(picture.file), where=str(picture.file))
        took.append(time.process_time() - began)
    return median(took)
