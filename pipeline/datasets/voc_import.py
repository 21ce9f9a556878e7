"""PASCAL VOC, or any set of its layout, from the archives or folders somebody has: checked, once.

What comes out is a devkit with a dataset.json, which detection takes without further options.
"""

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.annotations.voc import (
    VOC_CLASSES,
    list_file,
    list_names,
    read_list,
    read_picture,
    require_picture,
    year_folders,
)
from common.errors import UserError
from common.files import write_json
from common.pictures import BadPicture, decode_fast, read_header
from pipeline.datasets.build import FORMAT, Card, DiskError, is_finished, only_one
from pipeline.datasets.voc_sources import OFFICIAL_NAMES, damaged_archive, take

# (pictures, objects that are not difficult) of the lists that detection uses, as the challenges'
# pages state them: host.robots.ox.ac.uk/pascal/VOC/voc20{07,12}/dbstats.html
OFFICIAL_COUNTS = {
    "VOC2007/trainval": (5_011, 12_608),
    "VOC2007/test": (4_952, 12_032),
    "VOC2012/trainval": (11_540, 27_450),
}
_MAX_SHOWN = 10  # problems of a list
_LICENCE = (
    "As the set states; PASCAL VOC: photographs from flickr under flickr's terms of use, for "
    "research. Not part of this project."
)
_NOTES = (
    "Objects marked difficult are trained on, as Detectron2 does; in the evaluation they are "
    "neither missed nor wrongly found, as in the devkit."
)


@dataclass(frozen=True)
class ListCounts:
    """One list of pictures: how many, and how many objects count or are difficult."""

    pictures: int
    objects: int
    difficult: int


@dataclass(frozen=True)
class Request:
    """What shall be imported.

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


def import_voc(request: Request, out: Path, *, overwrite: bool) -> bool:
    """Unpack or link, check and describe a set.

    Args:
        request: What, and from where.
        out: Folder to make; while unfinished it is called `out`.partial.
        overwrite: Whether a set made with other options is replaced.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: For the first source or list that is wrong.
        DiskError: If the disk is full.
    """
    for source in request.sources:
        if not source.exists():
            raise UserError(f"{source}: no such file or folder; give {OFFICIAL_NAMES}, or folders")
    partial = out.with_name(out.name + ".partial")
    card = Card(out.name, "voc", request.options(), _LICENCE, _NOTES)
    with only_one(out):
        if is_finished(card, out, overwrite):
            return False
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _fill(request, card, partial)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise DiskError(f"{out}: importing failed ({error}); free some space?") from error
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    return True


def _fill(request: Request, card: Card, partial: Path) -> None:
    """Make the whole set in a folder of its own."""
    if request.classes is None:
        for source in request.sources:
            _accept_or_refuse(damaged_archive(source), request)
    for source in request.sources:
        print(f"{source}: {', '.join(take(source, partial))}")
    train, test = _lists(request, partial)
    classes = request.classes or VOC_CLASSES
    counts = {}
    for year, split in [*train, test]:
        counts[f"{year}/{split}"] = _checked(partial / year, split, classes, request)
        _decode(partial / year, split, request.num_workers)
    if request.classes is None:
        for place, found in counts.items():
            _compare_with_official(place, found, request)
    _show(counts)
    official = request.classes is None
    _write_card(card, partial, classes, counts, [_name(*one, official) for one in [*train, test]])


def _lists(request: Request, devkit: Path) -> tuple[list[tuple[str, str]], tuple[str, str]]:
    """(folder, list) of the training lists and of the test list."""
    if request.classes is None:
        return _official_lists(devkit)
    found = []
    for split in (request.train_split, request.test_split):
        years = [year.name for year in year_folders(devkit) if list_file(year, split).is_file()]
        if len(years) != 1:
            names = sorted(
                f"{year.name}/{name}" for year in year_folders(devkit) for name in list_names(year)
            )
            problem = f"is in {' and '.join(years)}" if years else "is not there"
            raise UserError(
                f"list {split!r} {problem}; lists in the sources: "
                f"{', '.join(names[:20]) or 'none'}; choose with --train-split and --test-split"
            )
        found.append((years[0], split))
    return [found[0]], found[1]


def _official_lists(devkit: Path) -> tuple[list[tuple[str, str]], tuple[str, str]]:
    """What is there of PASCAL's lists: the test, and at least one to train on."""
    keys = [(place.split("/")[0], place.split("/")[1]) for place in OFFICIAL_COUNTS]
    there = [key for key in keys if list_file(devkit / key[0], key[1]).is_file()]
    test = ("VOC2007", "test")
    train = sorted(key for key in there if key != test)
    if test not in there or not train:
        have = ", ".join("/".join(key) for key in there) or "none of the lists"
        need = "VOC2007/test" if train else "VOC2007/trainval or VOC2012/trainval"
        raise UserError(
            f"the sources hold {have}, but {need} is needed too; give all of {OFFICIAL_NAMES}, "
            "or the folders unpacked from them. A set with other lists or classes: --classes. "
            "VOC2012's own train and val: no import, but tools/train_voc.sh --data FOLDER "
            "--train-split voc_2012_train --test-split voc_2012_val"
        )
    return train, test


def _name(year: str, split: str, official: bool) -> str:
    """A list as Detectron2 names the official ones, voc_2007_test; else its own name."""
    return f"voc_{year.removeprefix('VOC')}_{split}" if official else split


def _checked(year: Path, split: str, classes: Sequence[str], request: Request) -> ListCounts:
    """Check one list with its annotations and pictures, and count."""
    tolerance_px = 1 if request.classes is None else 0
    pictures, problems = [], []
    for image_id in read_list(year, split):
        try:
            pictures.append(read_picture(year, image_id, classes, tolerance_px=tolerance_px))
        except UserError as error:
            problems.append(str(error))
    unknown = [line for line in problems if "unknown class" in line]
    if unknown:
        raise UserError(
            f"{unknown[0]}\n{len(unknown)} pictures hold a class that is not known; if the set has "
            "a class list of its own, give all names with --classes a,b,c or --classes FILE"
        )
    if problems:
        more = len(problems) - _MAX_SHOWN
        rest = [f"... and {more} more"] if more > 0 else []
        raise UserError("\n".join(problems[:_MAX_SHOWN] + rest))
    objects = [item for picture in pictures for item in picture.objects]
    difficult = sum(item.difficult for item in objects)
    return ListCounts(len(pictures), len(objects) - difficult, difficult)


def _decode(year: Path, split: str, num_workers: int) -> None:
    """Decode every picture of a list; the first that does not is an error."""
    files = [str(require_picture(year, name)) for name in read_list(year, split)]
    bar = {"total": len(files), "desc": f"{year.name}/{split}", "unit": " pictures"}
    if num_workers == 1:
        faults = [_fault(file) for file in tqdm(files, disable=None, **bar)]
    else:
        with ProcessPoolExecutor(num_workers) as pool:
            results = pool.map(_fault, files, chunksize=64)
            faults = list(tqdm(results, disable=None, **bar))
    broken = [fault for fault in faults if fault]
    if broken:
        raise UserError(
            "\n".join(broken[:5])
            + f"\n{len(broken)} of {len(files)} pictures of {year.name}/{split} do not decode; "
            "unpack or download the set again"
        )


def _fault(file: str) -> str | None:
    """What is wrong with a picture; all of its data is read, a JPEG at an eighth of its size."""
    try:
        data = Path(file).read_bytes()
        decode_fast(data, read_header(data, where=file), 8, where=file)
    except BadPicture as error:
        return str(error)
    return None


def _compare_with_official(place: str, found: ListCounts, request: Request) -> None:
    """Another number of pictures is refused; another number of objects is said."""
    pictures, objects = OFFICIAL_COUNTS[place]
    if found.pictures != pictures:
        _accept_or_refuse(
            f"{place} has {found.pictures} pictures, the official list {pictures}: this is a part "
            f"or an altered copy. Unpack {OFFICIAL_NAMES} again",
            request,
        )
    elif found.objects != objects:
        _warn(
            f"{place} has {found.objects} objects that count, the challenge's page says {objects}: "
            "the annotations may have been altered"
        )


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _accept_or_refuse(problem: str | None, request: Request) -> None:
    """What is not official ends the import, or is said loudly with --any-count."""
    if problem is None:
        return
    if not request.any_count:
        raise UserError(f"{problem}; or give --any-count, and compare with no published figure")
    _warn(problem)
    _warn("--any-count was given: results on this set are NOT comparable with published figures")


def _show(counts: dict[str, ListCounts]) -> None:
    print(f"{'list':<20} {'pictures':>9} {'objects':>9} {'difficult':>9}")
    for place, one in counts.items():
        print(f"{place:<20} {one.pictures:>9} {one.objects:>9} {one.difficult:>9}")


def _write_card(
    card: Card,
    root: Path,
    classes: Sequence[str],
    counts: dict[str, ListCounts],
    names: Sequence[str],
) -> None:
    """Write dataset.json; `names` are the training lists, and the test list last."""
    official = tuple(classes) == VOC_CLASSES
    published = {place: pictures for place, (pictures, _) in OFFICIAL_COUNTS.items()}
    description = {
        "format": FORMAT,
        "name": card.name,
        "kind": card.kind,
        "classes": list(classes),
        "metric_year": 2007 if official else 2012,
        "splits": dict(zip(names, (one.pictures for one in counts.values()), strict=True)),
        "train_split": "+".join(names[:-1]),
        "test_split": names[-1],
        "objects": {place: vars(one) for place, one in counts.items()},
        "official_counts": official
        and all(published[place] == one.pictures for place, one in counts.items()),
        "pool": 0,
        "probe": {"train": 0, "val": 0},
        "options": card.options,
        "licence": card.licence,
        "notes": card.notes,
    }
    write_json(root / "dataset.json", description)
