"""Pictures that are there already: somebody's folders, the official VOC archives, Fashion-MNIST."""

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.contrib.concurrent import process_map

from common.annotations.formats import voc
from common.annotations.record import SetChoice, list_file, read_set
from common.errors import UserError, no_such_file, require
from common.files import open_regular, read_text, walk
from common.pictures import PICTURE_SUFFIXES, fault_of, is_picture_file
from pipeline.datasets.sets import Card, make_set, packages_in, unpacked

# -- the pictures of a folder, for shards ---------------------------------------------------------

_SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test", "training", "testing"})


@dataclass(frozen=True)
class PictureSource:
    """What a folder turned out to be.

    Attributes:
        kind: "folder", or "voc" (no labels: many objects each).
        pictures: (path, name, label) of each file, sorted by name: the name is the path relative to
            the source, with slashes; the label the class number, or -1.
        classes: Class names in label order, or None.
        num_ignored: Files that are no pictures.
        about_labels: What was taken for labels and why, for people.
    """

    kind: Literal["folder", "voc"]
    pictures: tuple[tuple[str, str, int], ...]
    classes: tuple[str, ...] | None
    num_ignored: int
    about_labels: str


def open_source(
    path: str | Path, *, split: str | None = None, labels: str = "none"
) -> PictureSource:
    """Find out what a folder holds and list its pictures.

    Args:
        path: A VOC devkit (holds VOC2007 or the like, or is such a folder), a tree of class
            folders, or any folder of pictures.
        split: A list of a devkit's ImageSets/Main, or a sub-folder such as train.
        labels: "none"; "folders", if the first folder below the source is a picture's class; or a
            list, see `read_labels`.
    Raises:
        UserError: If there is no such folder or split, it holds no picture, a split must be chosen,
            or the labels do not fit the pictures.
    """
    root = Path(path)
    remedy = "give a folder of pictures or a VOC devkit"
    require(not root.is_file(), f"{root}: is a file: unpack an archive; {remedy}")
    require(root.is_dir(), no_such_file(root, remedy, "folder"))
    # A VOC devkit. Where no folder has the list, reading it from the first says what is missing.
    if years := voc.year_folders(root):
        if split is None:
            names = sorted(
                {name for year in years for name in voc.list_names(year) if "_" not in name}
            )
            there = ", ".join(names) or "(none)"
            raise UserError(f"{root}: is a VOC devkit; choose a part with --split, one of: {there}")
        found = []
        for year in [year for year in years if list_file(year, split).exists()] or years[:1]:
            pictures = voc.PictureFinder(year)
            for image_id in voc.read_list(year, split, class_wise=True):
                file = pictures.require(image_id)
                found.append((str(file), f"{year.name}/{file.name}"))
        require(labels != "folders", f"{root}: --labels folders: a VOC devkit has no class folders")
        return _labelled("voc", sorted(found, key=itemgetter(1)), labels, 0)

    # Any other folder: its pictures.
    root = root / (split or "")
    no_list = "folder, and no VOC devkit above it"
    require(root.is_dir(), no_such_file(root, "check --split", no_list))
    files = [file.relative_to(root) for file in walk(root)]
    names = sorted(x.as_posix() for x in files if is_picture_file(root / x))
    require(
        bool(names),
        f"{root}: holds no pictures ({len(files)} other files); suffixes read: "
        f"{' '.join(sorted(PICTURE_SUFFIXES))}",
    )

    # Sub-folders may be splits.
    splits = split_folders(names)
    require(
        not splits,
        f"{root}: its folders {', '.join(splits)} look like splits; choose one with --split",
    )
    if labels == "folders":
        loose = [name for name in names if "/" not in name]
        require(
            not loose,
            f"{root}: --labels folders: {len(loose)} pictures lie in no folder, as {loose[:1]}; "
            "move them, or pack without labels",
        )
    pictures = [(str(root / name), name) for name in names]
    return _labelled("folder", pictures, labels, len(files) - len(names))


def split_folders(names: Iterable[str]) -> list[str]:
    """The first folders of pictures' names if they look like splits, as train and valid do."""
    tops = sorted({name.split("/")[0] for name in names if "/" in name})
    return tops if len(tops) > 1 and {top.lower() for top in tops} <= _SPLIT_NAMES else []


def _labelled(
    kind: Literal["folder", "voc"], pictures: list[tuple[str, str]], labels: str, num_ignored: int
) -> PictureSource:
    """The pictures (path, name) with the labels that were asked for, and a sentence about these."""
    names, tops = [name for _, name in pictures], sorted({x.split("/")[0] for _, x in pictures})
    given: dict[str, str] = {}
    about = "no labels"
    if labels == "folders":
        given = {name: name.split("/")[0] for name in names}
        about = f"labels: {len(tops)} classes, the first folders ({_few(tops)})"
    elif labels != "none":
        listed = read_labels(Path(labels))
        keys = {x: x if x in listed else os.path.splitext(x)[0] for x in names}
        given = {name: listed[key] for name, key in keys.items() if key in listed}
        unknown = sorted(set(listed) - {keys[name] for name in given})
        require(
            not unknown,
            f"{labels}: {len(unknown)} of {len(listed)} names are no pictures of the source, as "
            f"{unknown[:1]}; names are paths below the source",
        )
        about = f"labels: {len(set(given.values()))} classes of {labels}"
        about += f", {len(names) - len(given)} pictures are not in it" * (len(given) < len(names))
    elif kind == "folder" and len(tops) > 1 and all("/" in name for name in names):
        about += (
            f": its {len(tops)} first folders ({_few(tops)}) are not taken for classes; with "
            "--labels folders they are"
        )
    classes = sorted(set(given.values()))
    number = {name: i for i, name in enumerate(classes)}
    if is_numbered := labels not in ("none", "folders") and all(map(str.isdecimal, classes)):
        number = {name: int(name) for name in classes}
    rows = tuple((path, name, number.get(given.get(name, ""), -1)) for path, name in pictures)
    known = None if is_numbered or not classes else tuple(classes)
    return PictureSource(kind, rows, known, num_ignored, about)


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *[".."][: len(names) > 3]])


def read_labels(file: Path) -> dict[str, str]:
    """Read a list of labels: a picture's name and its class in each line.

    A tab, else the last comma, else the last white space parts them. A name is the path below the
    source, with or without its suffix. Classes that are all numbers are the labels themselves.

    Raises:
        UserError: If it cannot be read, a line is none, a name has two classes, or a number is too
            large.
    """
    listed: dict[str, str] = {}
    remedy = "give folders, none or a list"
    require(file.is_file(), f"--labels {no_such_file(file, remedy, 'file')}")
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        divider = "\t" if "\t" in line else "," if "," in line else None
        parts = [part.strip() for part in line.rsplit(divider, 1)]
        where = f"{file}, line {number}: {line.strip()!r}"
        require(len(parts) == 2 and all(parts), f"{where}: write NAME CLASS")
        name = parts[0].removeprefix("./")
        is_new = listed.setdefault(name, parts[1]) == parts[1]
        require(is_new, f"{where}: has class {listed[name]!r} in a line above; keep one")
        is_small = not parts[1].isdecimal() or len(parts[1]) < 10
        require(is_small, f"{where}: no class has such a number; count classes from 0")
    require(bool(listed), f"{file}: lists no picture; write NAME CLASS in each line")
    return listed


# -- PASCAL VOC 2007 and 2012 -------------------------------------------------------------------

# MD5 of the official archives, as torchvision lists them.
OFFICIAL_TARS = {
    "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
    "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
    "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
}
_GIVE_OFFICIAL = f"give {', '.join(OFFICIAL_TARS)}, or the folders unpacked from them"
_NO_IMPORT = "Other sets need no import: tools/train_voc.sh --data FOLDER --train-split --classes"


def import_voc(sources: Sequence[Path], out: Path, num_workers: int, overwrite: bool) -> bool:
    """Unpack or link, check and describe PASCAL VOC: a devkit with a dataset.json.

    Args:
        sources: Official archives, and folders that hold VOC2007 or VOC2012 at any depth.
        out: Folder to make.
        num_workers: Processes that decode.
        overwrite: Whether a set made with other options is replaced.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: For the first source or list that is wrong.
    """
    for source in sources:
        require(source.exists(), no_such_file(source, _GIVE_OFFICIAL))
    card = Card(
        out.name,
        "voc",
        {"sources": {path.name: path.stat().st_size if path.is_file() else 0 for path in sources}},
        "PASCAL VOC: photographs under flickr's terms of use, for research. Not part of this "
        "project.",
        "Objects marked difficult are trained on; in the evaluation they are neither missed nor "
        "errors, as in the devkit.",
    )

    def fill(root: Path) -> None:
        # Archives are unpacked; then all are folders.
        for source in sources:
            if source.is_file():
                _unpack(source, root / "unpacked")
            _link_devkit(root / "unpacked" if source.is_file() else source, root)
            shutil.rmtree(root / "unpacked", ignore_errors=True)

        # Every list, named as Detectron2 does: its annotations, number of pictures, pictures.
        places = [Path(place) for place in voc.OFFICIAL_COUNTS]
        there = [str(x) for x in places if list_file(root / x.parent, x.name).is_file()]
        require(
            "VOC2007/test" in there and len(there) > 1,
            f"the sources hold {', '.join(there) or 'none of the lists'}; VOC2007/test and a "
            f"trainval list are needed: {_GIVE_OFFICIAL}. {_NO_IMPORT}",
        )
        names = [f"voc_{place[3:].replace('/', '_')}" for place in there]
        train, test = "+".join(names[:-1]), names[-1]
        data = read_set(root, SetChoice("voc", voc.VOC_CLASSES, train_split=train, test_split=test))
        for place, split in zip(there, (*data.train, data.test), strict=True):
            files, count = [str(x.file) for x in split.pictures], voc.OFFICIAL_COUNTS[place]
            require(
                len(files) == count,
                f"{place} has {len(files)} pictures, the official list {count}: a part or an "
                f"altered copy; {_GIVE_OFFICIAL}. {_NO_IMPORT}",
            )
            faults = process_map(
                fault_of, files, max_workers=num_workers, chunksize=64, desc=place, disable=None
            )
            broken = [fault for fault in faults if fault]
            more = f"{len(broken)} of {count} pictures do not decode; download the set again"
            require(not broken, "\n".join([*broken[:5], more]))
        card.write(
            root,
            classes=voc.VOC_CLASSES,
            metric_year=2007,
            splits={name: voc.OFFICIAL_COUNTS[x] for name, x in zip(names, there, strict=True)},
            train_split=train,
            test_split=test,
            pool=0,
            probe={"train": 0, "val": 0},
        )

    return make_set(card, out, overwrite, fill)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack an official tar; what would lie or point outside is refused."""
    with open_regular(archive) as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    require(
        md5 in OFFICIAL_TARS.values(),
        f"{archive}: is none of the official archives (MD5 {md5}); download it again, or give "
        "the folder unpacked from it",
    )
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error})") from error


def _link_devkit(folder: Path, devkit: Path) -> None:
    """Link the files of VOC2007 and VOC2012, at any depth of a folder; copy where links fail.

    A file that is there already, from an earlier source, stays.
    """
    for year in [folder, *folder.rglob("VOC20??")]:
        for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
            if year.name.startswith("VOC20") and (year / part).is_dir():
                place = devkit / year.name / part
                place.mkdir(parents=True, exist_ok=True)
                for file in (year / part).iterdir():
                    if file.is_file() and not (place / file.name).exists():
                        try:
                            os.link(os.path.realpath(file), place / file.name)  # not of a link
                        except OSError:
                            shutil.copyfile(file, place / file.name)


# -- Fashion-MNIST out of Debian's package: grey pictures of clothes, 28 x 28 pixels --------------

FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_CLASSES = (
    *("t_shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
)
FASHION_COUNTS = {"num_pool": 60_000, "num_probe_train": 60_000, "num_probe_val": 10_000}
SYSTEM = Path("/")  # where an installed package lies
_MAX_IDX_BYTES = 10**8  # twice the largest file


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
    from pipeline.datasets.scene import write_picture  # OpenCV is slow to import

    options: dict[str, object] = {**counts, "seed": seed}
    card = Card(out.name, "fashion", options, "MIT (Zalando SE)", "28 x 28 grey pixels.")
    probe = {"train": counts["num_probe_train"], "val": counts["num_probe_val"]}

    def fill(root: Path) -> None:
        place, source = "usr/share/datasets/fashion-mnist", SYSTEM
        kinds = ("images-idx3", "labels-idx1")
        if not (SYSTEM / place).is_dir():
            (source,) = packages_in([FASHION_PACKAGE], None, cache, "31 MB")
        with unpacked(source, cache) as package:
            (train, train_labels), (test, test_labels) = (
                [read_idx(package / place / f"{part}-{kind}-ubyte.gz") for kind in kinds]
                for part in ("train", "t10k")
            )
        for images, labels in ((train, train_labels), (test, test_labels)):
            is_whole = images.ndim == 3 and labels.shape == (len(images),)
            wrong = f"{place}: pictures {images.shape}, labels {labels.shape}; fetch it anew"
            require(is_whole, wrong)
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


def read_idx(file: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes: uint8 [n, ..].

    Raises:
        UserError: If it is none.
    """
    try:
        with gzip.open(file) as stream:  # to its end, where the checksum is
            raw = stream.read(_MAX_IDX_BYTES + 1)
        if len(raw) > _MAX_IDX_BYTES:
            raise ValueError(f"more than {_MAX_IDX_BYTES:,} bytes")
        shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + shape.nbytes).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise UserError(f"{file}: no readable IDX file ({error}); fetch it anew") from error
