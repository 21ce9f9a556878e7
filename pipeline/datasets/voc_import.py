"""PASCAL VOC, or any set of its layout, from the archives or folders somebody has: checked, once.

What comes out is a devkit with a dataset.json, which detection takes without further options.
"""

import hashlib
import itertools
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from common.annotations.formats.voc import VOC_CLASSES
from common.annotations.record import SetChoice, list_file, read_set
from common.errors import UserError
from common.pictures import BadPicture, decode_fast, read_header
from pipeline.datasets.build import Card, make_set

# MD5 of the official archives, as torchvision lists them.
OFFICIAL_TARS = {
    "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
    "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
    "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
}
OFFICIAL_NAMES = ", ".join(OFFICIAL_TARS)
# (pictures, objects that are not difficult) of the lists that detection uses, as the challenges'
# pages state them: host.robots.ox.ac.uk/pascal/VOC/voc20{07,12}/dbstats.html
OFFICIAL_COUNTS = {
    "VOC2007/trainval": (5_011, 12_608),
    "VOC2007/test": (4_952, 12_032),
    "VOC2012/trainval": (11_540, 27_450),
}
_TEST = "VOC2007/test"
_PARTS = ("Annotations", "JPEGImages", "ImageSets/Main")
_YEAR = re.compile(r"VOC\d{4}")
_LICENCE = (
    "As the set states; PASCAL VOC: photographs from flickr under flickr's terms of use, for "
    "research. Not part of this project."
)
_NOTES = (
    "Objects marked difficult are trained on, as Detectron2 does; in the evaluation they are "
    "neither missed nor errors, as in the devkit."
)


@dataclass(frozen=True)
class Request:
    """What is imported.

    Attributes:
        sources: Archives and folders.
        classes: Class names of a set of one's own; None for PASCAL's twenty.
        train_split, test_split: Lists of a set of one's own.
        any_count: Whether other than the official numbers of pictures are accepted.
        num_workers: Processes that decode.
    """

    sources: tuple[Path, ...]
    classes: tuple[str, ...] | None
    train_split: str
    test_split: str
    any_count: bool
    num_workers: int

    def options(self) -> dict[str, object]:
        """What decides the result, for dataset.json: no absolute path."""
        sizes = {path.name: path.stat().st_size if path.is_file() else 0 for path in self.sources}
        return {
            "sources": sizes,
            "classes": list(self.classes) if self.classes else None,
            "train_split": self.train_split if self.classes else None,
            "test_split": self.test_split if self.classes else None,
            "any_count": self.any_count,
        }

    def accept_or_refuse(self, problem: str) -> None:
        """What is not official ends the import, or is a warning with --any-count."""
        if not self.any_count:
            raise UserError(f"{problem}; or give --any-count, and compare with no published figure")
        _warn(
            f"{problem}\nWARNING: --any-count was given: results on this set are NOT comparable "
            "with published figures"
        )


def import_voc(request: Request, out: Path, *, overwrite: bool) -> bool:
    """Unpack or link, check and describe a set.

    Args:
        request: What, and from where.
        out: Folder to make.
        overwrite: Whether a set made with other options is replaced.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: For the first source or list that is wrong.
        RunFailed: If the disk is full.
    """
    for source in request.sources:
        if not source.exists():
            raise UserError(f"{source}: no such file or folder; give {OFFICIAL_NAMES}, or folders")
    card = Card(out.name, "voc", request.options(), _LICENCE, _NOTES)
    return make_set(card, out, overwrite, lambda root: _fill(request, card, root))


def _fill(request: Request, card: Card, root: Path) -> None:
    """Make the whole set in a folder of its own."""
    # An archive with an official name is the official one.
    is_official, classes = request.classes is None, request.classes or VOC_CLASSES
    for source in request.sources if is_official else ():
        expected = OFFICIAL_TARS.get(source.name)
        if expected is not None and source.is_file():
            with open(source, "rb") as file:
                md5 = partial(hashlib.md5, usedforsecurity=False)
                digest = hashlib.file_digest(file, md5).hexdigest()
            if digest != expected:
                request.accept_or_refuse(
                    f"{source}: is not the official archive of that name (MD5 {digest} instead of "
                    f"{expected}, {source.stat().st_size} bytes); download it again"
                )
    for source in request.sources:
        folder = source if source.is_dir() else _unpack(source, root / "unpacked")
        print(f"{source}: {', '.join(_take(folder, root, source))}")
        shutil.rmtree(root / "unpacked", ignore_errors=True)

    # Every list: its annotations, pictures and numbers. The official ones are named as Detectron2
    # does: voc_2007_test.
    names = [*request.train_split.split("+"), request.test_split]
    names = _official_lists(root) if is_official else names
    classes, train_split = request.classes or VOC_CLASSES, "+".join(names[:-1])
    data = read_set(root, SetChoice("voc", classes, train_split=train_split, test_split=names[-1]))
    counts = {}
    for split in (*data.train, data.test):
        place, files = f"{split.folder.name}/{split.name}", [str(x.file) for x in split.pictures]
        _decode(files, place, request.num_workers)
        marks = [item.difficult for picture in split.pictures for item in picture.objects]
        counts[place] = {
            "pictures": len(files),
            "objects": len(marks) - sum(marks),
            "difficult": sum(marks),
        }
    for place, count in counts.items() if is_official else ():
        pictures, objects = OFFICIAL_COUNTS[place]
        if count["pictures"] != pictures:
            request.accept_or_refuse(
                f"{place} has {count['pictures']} pictures, the official list {pictures}: this is "
                f"a part or an altered copy. Unpack {OFFICIAL_NAMES} again"
            )
        elif count["objects"] != objects:
            _warn(
                f"{place} has {count['objects']} objects that count, the challenge's page says "
                f"{objects}: the annotations may have been altered"
            )
    print(f"{'list':<20} {'pictures':>9} {'objects':>9} {'difficult':>9}")
    for place, count in counts.items():
        print(f"{place:<20}", *(f"{number:>9}" for number in count.values()))

    has_official_classes = tuple(classes) == VOC_CLASSES
    card.write(
        root,
        classes=list(classes),
        metric_year=2007 if has_official_classes else 2012,
        splits=dict(zip(names, (count["pictures"] for count in counts.values()), strict=True)),
        train_split=train_split,
        test_split=names[-1],
        objects=counts,
        official_counts=has_official_classes
        and all(
            OFFICIAL_COUNTS.get(place, (0,))[0] == n["pictures"] for place, n in counts.items()
        ),
        pool=0,
        probe={"train": 0, "val": 0},
    )


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


# -- lists, annotations, pictures -----------------------------------------------------------------


def _official_lists(devkit: Path) -> list[str]:
    """Those of PASCAL's lists that are there: at least one to train on, and the test, the last."""
    there = [
        place
        for place in OFFICIAL_COUNTS
        if list_file(devkit / place.split("/")[0], place.split("/")[1]).is_file()
    ]
    train = sorted(place for place in there if place != "VOC2007/test")
    if "VOC2007/test" not in there or not train:
        have = ", ".join(there) or "none of the lists"
        need = "VOC2007/test" if train else "VOC2007/trainval or VOC2012/trainval"
        raise UserError(
            f"the sources hold {have}, but {need} is needed too; give all of {OFFICIAL_NAMES}, "
            "or the folders unpacked from them. A set with other lists or classes: --classes. "
            "VOC2012's own train and val: no import, but tools/train_voc.sh --data FOLDER "
            "--train-split voc_2012_train --test-split voc_2012_val"
        )
    return [f"voc_{place[3:].replace('/', '_')}" for place in (*train, "VOC2007/test")]


def _decode(files: Sequence[str], place: str, num_workers: int) -> None:
    """Decode every picture of a list; one that does not is an error."""
    with ProcessPoolExecutor(num_workers) as pool:
        results = pool.map(_fault, files, chunksize=64)
        bar = tqdm(results, total=len(files), desc=place, unit=" pictures", disable=None)
        broken = [fault for fault in bar if fault]
    if broken:
        raise UserError(
            "\n".join(broken[:5])
            + f"\n{len(broken)} of {len(files)} pictures of {place} do not decode; unpack or "
            "download the set again"
        )


def _fault(file: str) -> str | None:
    """What is wrong with a picture; all of its data is read, a JPEG at an eighth of its size."""
    try:
        data = Path(file).read_bytes()
        decode_fast(data, read_header(data, where=file), 8, where=file)
    except BadPicture as error:
        return str(error)
    return None


# -- sources: the official tars, or folders that hold what they hold ------------------------------


def _unpack(source: Path, folder: Path) -> Path:
    """Unpack the annotations, pictures and lists of a tar, which may be compressed.

    Args:
        source: The archive; its VOC folders may lie at any depth.
        folder: Files go to folder/VOC2007/JPEGImages and so on.
    Raises:
        UserError: If the archive is damaged, unsafe or holds no VOC set.
    """

    def needed(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        parts = PurePosixPath(member.name).parts
        first = next((i for i, part in enumerate(parts) if _YEAR.fullmatch(part)), len(parts))
        place = "/".join(parts[first + 1 :])
        if member.isdir() or not place.startswith(tuple(f"{part}/" for part in _PARTS)):
            return None
        if not member.isreg() or ".." in parts:
            raise UserError(
                f"{source}: {member.name} is a link or a device, or points outside the archive; "
                "the official archives hold no such thing: this is none of them"
            )
        named = member.replace(name=f"{parts[first]}/{place}", deep=False)
        return tarfile.data_filter(named, path)

    try:
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter=needed)
            names = archive.getnames()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        if source.suffix.lower() == ".zip":
            raise UserError(f"{source}: is a zip; unpack it and give the folder") from error
        raise UserError(
            f"{source}: cannot be read to its end as a tar ({error}); it is cut short or no tar: "
            "download it again, or give the unpacked folder"
        ) from error
    if not folder.is_dir():
        raise UserError(f"{source}: {_why_no_voc(names)}")
    return folder


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
    if not years:
        paths = [*folder.glob("*"), *folder.glob("*/*.json")]
        tars = sorted(str(p) for p in paths if p.name.endswith((".tar", ".tar.gz", ".tgz")))
        if tars:
            raise UserError(
                f"{source}: holds archives, not an unpacked set; give them by name: "
                + " ".join(tars)
            )
        raise UserError(
            f"{source}: {_why_no_voc(sorted(str(p.relative_to(folder)) for p in paths))}"
        )
    for (name, year), part in itertools.product(years, _PARTS):
        for file in sorted(path for path in (year / part).glob("[!.]*") if path.is_file()):
            place = devkit / name / part / file.name
            if place.exists():
                if place.read_bytes() != file.read_bytes():
                    raise UserError(
                        f"{source}: its {name}/{part}/{file.name} differs from the one that an "
                        "earlier source has brought; the sources are of different sets or "
                        "editions: give one of them"
                    )
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.resolve(), place)  # of the file, not of a link to it
            except OSError:
                shutil.copyfile(file, place)
    return sorted({name for name, _ in years})


def _why_no_voc(names: Sequence[str]) -> str:
    """What is there instead of a VOC set."""
    displayed = ", ".join(names[:5]) or "nothing"
    if any("VOCcode" in name for name in names):
        return f"is the devkit's program code, without pictures; give {OFFICIAL_NAMES}"
    if any(name.endswith(".json") or "instances_" in name for name in names):
        return (
            f"looks like a COCO set (found {displayed}), not VOC: one XML file a picture is needed"
        )
    return (
        f"holds no VOC set (found {displayed}); there must be a folder VOC2007 or VOC2012 with "
        "JPEGImages, Annotations and ImageSets/Main"
    )
