"""Pictures that are there already: somebody's folders, the official VOC archives, Fashion-MNIST."""

import gzip
import hashlib
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from common.annotations.formats.voc import (
    VOC_CLASSES,
    list_names,
    read_list,
    require_picture,
    year_folders,
)
from common.annotations.record import LabelledSplit, SetChoice, list_file, read_set
from common.errors import UserError, require
from common.pictures import BadPicture, decode_fast, read_header
from pipeline.datasets import packages
from pipeline.datasets.build import Card, make_set, write_picture

# -- the pictures of a folder, for shards ---------------------------------------------------------

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


# -- PASCAL VOC 2007 and 2012 -------------------------------------------------------------------

# MD5 of the official archives, as torchvision lists them.
OFFICIAL_TARS = {
    "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
    "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
    "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
}
# Pictures of the lists that detection uses, as the challenges' pages state them:
# host.robots.ox.ac.uk/pascal/VOC/voc20{07,12}/dbstats.html
OFFICIAL_COUNTS = {"VOC2007/trainval": 5_011, "VOC2012/trainval": 11_540, "VOC2007/test": 4_952}
_GIVE_OFFICIAL = f"give {', '.join(OFFICIAL_TARS)}, or the folders unpacked from them"
_VOC_LICENCE = (
    "As the set states; PASCAL VOC: photographs from flickr under flickr's terms of use, for "
    "research. Not part of this project."
)
_VOC_NOTES = (
    "Objects marked difficult are trained on, as Detectron2 does; in the evaluation they are "
    "neither missed nor errors, as in the devkit."
)
_YEAR = re.compile(r"VOC\d{4}")


def import_voc(
    sources: Sequence[Path], out: Path, any_count: bool, num_workers: int, overwrite: bool
) -> bool:
    """Unpack or link, check and describe PASCAL VOC: a devkit with a dataset.json.

    Args:
        sources: Archives and folders.
        out: Folder to make.
        any_count: Whether other than the official archives and numbers of pictures are accepted.
        num_workers: Processes that decode.
        overwrite: Whether a set made with other options is replaced.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: For the first source or list that is wrong.
        RunFailed: If the disk is full.
    """

    def accept_or_refuse(problem: str) -> None:
        remedy = "or give --any-count, and compare with no published figure"
        require(any_count, f"{problem}; {remedy}")
        print(f"WARNING: {problem}; results are NOT comparable with published ones",
              file=sys.stderr)  # fmt: skip

    def fill(root: Path) -> None:
        # Archives are checked and unpacked; then all are folders, whose files are linked.
        for source in sources:
            folder = source
            if source.is_file():
                expected, digest = OFFICIAL_TARS.get(source.name), _md5(source)
                if expected not in (None, digest):
                    accept_or_refuse(
                        f"{source}: is not the official archive of that name (MD5 {digest} instead "
                        f"of {expected}); download it again"
                    )
                folder = root / "unpacked"
                _unpack(source, folder)
            print(f"{source}: {', '.join(_take(folder, root, source))}")
            shutil.rmtree(root / "unpacked", ignore_errors=True)

        # Every list: its annotations, pictures and numbers. They are named as Detectron2 does.
        there = [x for x in OFFICIAL_COUNTS if list_file(root / x[:7], x[8:]).is_file()]
        if "VOC2007/test" not in there or len(there) < 2:
            raise UserError(
                f"the sources hold {', '.join(there) or 'none of the lists'}; VOC2007/test and a "
                f"trainval list are needed: {_GIVE_OFFICIAL}. A set with other lists or classes "
                "needs no import: tools/train_voc.sh --data FOLDER --classes a,b,c"
            )
        names = [f"voc_{x[3:].replace('/', '_')}" for x in there]
        train, test = "+".join(names[:-1]), names[-1]
        data = read_set(root, SetChoice("voc", VOC_CLASSES, train_split=train, test_split=test))
        counts = {}
        for place, split in zip(there, (*data.train, data.test), strict=True):
            counts[place] = _counts(split, place, num_workers)
            print(f"{place}: {', '.join(f'{n} {what}' for what, n in counts[place].items())}")
            if counts[place]["pictures"] != OFFICIAL_COUNTS[place]:
                accept_or_refuse(
                    f"{place} has {counts[place]['pictures']} pictures, the official list "
                    f"{OFFICIAL_COUNTS[place]}: a part or an altered copy; {_GIVE_OFFICIAL}"
                )
        splits = {name: counts[x]["pictures"] for name, x in zip(names, there, strict=True)}
        card.write(
            root,
            classes=VOC_CLASSES,
            metric_year=2007,
            splits=splits,
            train_split=train,
            test_split=test,
            objects=counts,
            official_counts=all(n["pictures"] == OFFICIAL_COUNTS[x] for x, n in counts.items()),
            pool=0,
            probe={"train": 0, "val": 0},
        )

    for source in sources:
        require(source.exists(), f"{source}: no such file or folder; {_GIVE_OFFICIAL}")
    sizes = {path.name: path.stat().st_size if path.is_file() else 0 for path in sources}
    options = {"sources": sizes, "any_count": any_count}
    card = Card(out.name, "voc", options, _VOC_LICENCE, _VOC_NOTES)
    return make_set(card, out, overwrite, fill)


def _md5(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _counts(split: LabelledSplit, place: str, num_workers: int) -> dict[str, int]:
    """Decode every picture of a list; return how many pictures and objects it has."""
    files = [str(picture.file) for picture in split.pictures]
    with ProcessPoolExecutor(num_workers) as pool:
        results = pool.map(_fault, files, chunksize=64)
        bar = tqdm(results, total=len(files), desc=place, unit=" pictures", disable=None)
        broken = [fault for fault in bar if fault]
    require(
        not broken,
        "\n".join(broken[:5])
        + f"\n{len(broken)} of {len(files)} pictures of {place} do not decode; unpack or download "
        "the set again",
    )
    marks = [item.difficult for picture in split.pictures for item in picture.objects]
    return {"pictures": len(files), "objects": marks.count(False), "difficult": sum(marks)}


def _fault(file: str) -> str | None:
    """What is wrong with a picture; all of its data is read, a JPEG at an eighth of its size."""
    try:
        data = Path(file).read_bytes()
        decode_fast(data, read_header(data, where=file), 8, where=file)
    except BadPicture as error:
        return str(error)
    return None


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar, which may be compressed; what would lie or point outside is refused."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{archive}: cannot be unpacked as a tar ({error}); download it again, or give the "
            "unpacked folder"
        ) from error


def _take(folder: Path, devkit: Path, source: Path) -> list[str]:
    """Bring the files of a folder; they become hard links where the file system has them.

    Args:
        folder: Holds VOC2007 or the like at most three deep, or is a VOC folder itself (then it
            becomes VOC2007 unless its name says otherwise).
        devkit: Where the files go.
        source: What to name in messages.
    Returns:
        Names of the VOC folders.
    Raises:
        UserError: If there is none, or a file differs from one that is there already.
    """
    if (folder / "JPEGImages").is_dir() or (folder / "Annotations").is_dir():
        name = folder.resolve().name
        years = [(name if _YEAR.fullmatch(name) else "VOC2007", folder)]
    else:
        patterns = ("VOC*", "*/VOC*", "*/*/VOC*")
        paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        years = [(p.name, p) for p in paths if _YEAR.fullmatch(p.name) and p.is_dir()]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
    require(
        bool(years),
        f"{source}: holds no VOC set (found {found or 'nothing'}); there must be a folder VOC2007 "
        "or VOC2012 with JPEGImages, Annotations and ImageSets/Main",
    )
    for (name, year), part in product(years, ("Annotations", "JPEGImages", "ImageSets/Main")):
        for file in sorted(path for path in (year / part).glob("[!.]*") if path.is_file()):
            place = devkit / name / part / file.name
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(file.resolve(), place)  # of the file, not of a link to it
                except OSError:
                    shutil.copyfile(file, place)
            elif place.read_bytes() != file.read_bytes():
                raise UserError(
                    f"{source}: its {name}/{part}/{file.name} differs from the one that an "
                    "earlier source has brought; give sources of one edition"
                )
    return sorted({name for name, _ in years})


# -- Fashion-MNIST out of Debian's package: grey pictures of clothes, 28 x 28 pixels --------------

FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_CLASSES = (
    *("t_shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
)
FASHION_COUNTS = {"num_pool": 60_000, "num_probe_train": 60_000, "num_probe_val": 10_000}
SYSTEM = Path("/")  # where an installed package lies


def import_fashion(
    out: Path, cache: Path, counts: dict[str, int], seed: int, overwrite: bool
) -> bool:
    """Write OUT/pool/*.png, OUT/probe/{train,val}/<class>/*.png.

    The pool and probe/train are drawn from the 60,000 training pictures (a labelled one may lie in
    the pool too, without its label), probe/val from the 10,000 test pictures.

    Args:
        out: Folder to make.
        cache: Where the package's .deb is, or goes, unless the package is installed.
        counts: Number of pictures under the keys of `FASHION_COUNTS`, at most so many.
        seed: Of the choice.
        overwrite: Whether a set made with other options is replaced.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: If the package cannot be had.
    """
    options: dict[str, object] = {**counts, "seed": seed}
    card = Card(out.name, "fashion", options, "MIT (Zalando SE)", "28 x 28 grey pixels.")
    probe = {"train": counts["num_probe_train"], "val": counts["num_probe_val"]}

    def fill(root: Path) -> None:
        (train, train_labels), (test, test_labels) = _read_fashion(cache)
        generator = np.random.default_rng(seed)
        (root / "pool").mkdir(parents=True)
        for number, index in enumerate(generator.permutation(len(train))[: counts["num_pool"]]):
            write_picture(root / "pool" / f"{number:06d}.png", train[index])
        for part, images, labels in (("train", train, train_labels), ("val", test, test_labels)):
            folders = [root / "probe" / part / name for name in FASHION_CLASSES]
            for folder in folders:
                folder.mkdir(parents=True)
            # Drawn at random, of every class as many as of the others.
            by_class = [generator.permutation(np.flatnonzero(labels == c)) for c in range(10)]
            rounds = max(map(len, by_class))
            drawn = [indices[k] for k in range(rounds) for indices in by_class if k < len(indices)]
            for number, index in enumerate(drawn[: probe[part]]):
                write_picture(folders[labels[index]] / f"{number:06d}.png", images[index])
        card.write(root, classes=FASHION_CLASSES, pool=counts["num_pool"], probe=probe)

    return make_set(card, out, overwrite, fill)


def _read_fashion(cache: Path) -> list[list[np.ndarray]]:
    """Pictures and labels of the training and of the test set."""
    place, source = "usr/share/datasets/fashion-mnist", SYSTEM
    if not (SYSTEM / place).is_dir():
        (source,) = packages.fetched([FASHION_PACKAGE], cache, "31 MB")
    with packages.unpacked(source, cache) as root:
        kinds = ("images-idx3", "labels-idx1")
        return [
            [read_idx(root / place / f"{part}-{kind}-ubyte.gz") for kind in kinds]
            for part in ("train", "t10k")
        ]


def read_idx(file: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes: uint8 [n, ..].

    Raises:
        UserError: If it is none.
    """
    try:
        raw = gzip.decompress(file.read_bytes())
        shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + shape.nbytes).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise UserError(f"{file}: no readable IDX file ({error}); fetch it anew") from error
