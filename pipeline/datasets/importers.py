"""Find the pictures of somebody's own data: a folder, a tree of class folders, or a VOC devkit."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.annotations.formats.voc import list_names, read_list, require_picture, year_folders
from common.annotations.record import list_file
from common.errors import UserError, require

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
)
SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test", "training", "testing"})

Kind = Literal["folder", "classes", "voc"]
Labels = Literal["auto", "none"]


@dataclass(frozen=True)
class Picture:
    """One file of a source.

    Attributes:
        path: Where it is.
        name: Path relative to the source, with slashes.
        label: Class number, -1 for none.
    """

    path: str
    name: str
    label: int


@dataclass(frozen=True)
class PictureSource:
    """What a folder turned out to be.

    Attributes:
        kind: "folder" (no labels), "classes" (one folder per class) or "voc" (no labels: many
            objects each).
        pictures: The files, sorted by name.
        classes: Class names in label order, or None.
        ignored: Files that are no pictures, counted by suffix.
    """

    kind: Kind
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...] | None
    ignored: dict[str, int]


def open_source(
    path: str | Path, *, split: str | None = None, labels: Labels = "auto"
) -> PictureSource:
    """Find out what a folder holds and list its pictures.

    Args:
        path: A VOC devkit (holds VOC2007 or the like, or is such a folder), a tree of class
            folders, or any folder of pictures.
        split: A list of a devkit's ImageSets/Main, or a sub-folder such as train.
        labels: "none" ignores class folders.
    Raises:
        UserError: If there is no such folder or split, it holds no picture, or a split must be
            chosen.
    """
    root = Path(path)
    require(
        root.is_dir(),
        f"{root}: no such folder; give a folder of pictures, class folders or a VOC devkit",
    )
    # A VOC devkit. Where no folder has the list, reading it from the first says what is missing.
    if years := year_folders(root):
        if split is None:
            names = sorted({name for year in years for name in list_names(year) if "_" not in name})
            raise UserError(
                f"{root}: is a VOC devkit; choose a part with --split, one of: "
                f"{', '.join(names) or '(none)'}"
            )
        found = []
        for year in [year for year in years if list_file(year, split).exists()] or years[:1]:
            for image_id in read_list(year, split, class_wise=True):
                file = require_picture(year, image_id)
                found.append(Picture(str(file), f"{year.name}/{file.name}", -1))
        return PictureSource("voc", tuple(sorted(found, key=lambda one: one.name)), None, {})

    # Any other folder: its pictures.
    if split is not None:
        if not (root / split).is_dir():
            folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
            raise UserError(
                f"{root}: has no folder {split!r} and is no VOC devkit; leave --split out, or "
                "name one of: " + (", ".join(folders[:10]) or "(no sub-folders)")
            )
        root = root / split
    names, ignored = [], Counter()
    for file in _walk(root):
        if file.suffix.lower() in PICTURE_SUFFIXES:
            names.append(file.relative_to(root).as_posix())
        else:
            ignored[file.suffix.lower() or "(no suffix)"] += 1
    if not names:
        kinds = [f"{count} {suffix}" for suffix, count in ignored.most_common(3)]
        raise UserError(
            f"{root}: holds no pictures (found {', '.join(kinds) or 'nothing at all'}); suffixes "
            f"read: {' '.join(sorted(PICTURE_SUFFIXES))}"
        )

    # Sub-folders are splits, or classes if every picture lies in one of several.
    tops = sorted({name.split("/")[0] for name in names if "/" in name})
    require(
        len(tops) < 2 or not {top.lower() for top in tops} <= SPLIT_NAMES,
        f"{root}: its folders {', '.join(tops)} look like splits; choose one with --split",
    )
    has_classes = labels == "auto" and len(tops) > 1 and all("/" in name for name in names)
    number = {name: i for i, name in enumerate(tops if has_classes else ())}
    pictures = tuple(
        Picture(str(root / name), name, number.get(name.split("/")[0], -1))
        for name in sorted(names)
    )
    kind, classes = ("classes", tuple(tops)) if has_classes else ("folder", None)
    return PictureSource(kind, pictures, classes, dict(ignored))


def _walk(root: Path) -> Iterator[Path]:
    """Files below a folder through links, each real folder once; hidden names are left out."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(f for f in subfolders if not f.startswith((".", "__MACOSX")))
        yield from (Path(folder, name) for name in files if not name.startswith("."))
