"""YOLO's layout: a text file of boxes for each picture, and a list of class names.

ROOT/data.yaml or ROOT/classes.txt; ROOT/images/a.jpg and ROOT/labels/a.txt, or side by side. Lists
are the entries train, val and test of data.yaml: a folder, a text file of paths, or several of
these. Without them, text files of these names (CVAT), or folders.

A line is a class number from 0 and centre and size of a box as shares of the picture; or a number
and the corners of a polygon, whose box is taken. Shares are of the upright picture, as Ultralytics
takes them.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from common.annotations import checks, record
from common.annotations.lists import assemble, by_role, list_reader, role_of
from common.config import read_yaml
from common.errors import UserError
from common.files import read_text, walk

_STARTED_WITH = "predefined_classes.txt"
_NAME_FILES = ("classes.txt", "obj.names", _STARTED_WITH)
_LISTS = ("train", "val", "valid", "test")
_LINE = re.compile(r"\s*\d+(\.0*)?(\s+[-+.e\d]+){4,}\s*", re.IGNORECASE)
SCORES = "boxes with a score: the score is not used"
KEYPOINTS = "objects with key points: these are not used"
POLYGONS = f"{checks.POLYGONS} (key points need kpt_shape in data.yaml)"
_FAR = 1.5  # a corner may reach out of the picture; shares beyond this are no corners
ELSEWHERE = "text files in folders of which no picture has one: not used"
NO_FILE = "pictures without a text file: taken as without objects"
NO_LIST = "lists of data.yaml that are not there: left out"
MOVED = "paths of another place: found below the folder"
HOLDS = "YOLO's data.yaml, or classes.txt and a text file for each picture"


def recognises(root: Path) -> bool:
    """Whether there is a YAML file with names, or a list of names and a text file of boxes."""
    if _settings(root)[0] is not None:
        return True
    if not any(path.name in _NAME_FILES for path in walk(root)):
        return False
    files = checks.FolderFiles(root, ".txt")
    return any(files.picture_of(path) for path in files.annotations)


def read(root: Path, choice: record.SetChoice) -> record.LabelledSet:
    """Read and check the chosen lists; see `record.FORMATS`.

    A picture without a text file, or with an empty one, has no objects.
    """
    files, findings = checks.FolderFiles(root, ".txt"), checks.Findings(choice.max_left_out)
    path, content = _settings(root)
    names = _class_names(files, path, content)
    lists = _lists(files, path, content, findings)
    has_keypoints = "kpt_shape" in content
    texts = {picture: _text_file(root, picture) for picture in files.pictures}
    _leave_out_orphans(files, list(filter(None, texts.values())), findings)

    def read_picture(picture: PurePosixPath) -> record.PictureRecord:
        file, text_file = root / picture, texts[picture]
        frame = checks.read_frame(file, None, choice.exif, text_file or file, findings)
        if text_file is None:
            findings.repairs[NO_FILE] += 1
        width, height = frame.annotated_size
        objects = []
        for number, line in enumerate(read_text(text_file).split("\n") if text_file else (), 1):
            if not line.strip():
                continue
            where = f"{text_file}, line {number}"
            with findings.leaving_out(checks.OBJECT):
                label, shares = _numbers(line, names, where, findings, has_keypoints=has_keypoints)
                box = (shares[0] * width, shares[1] * height, shares[2] * width, shares[3] * height)
                where += f" ({label}): {line.strip()!r:.80}"
                box = checks.placed(_on_the_edge(box, width, height), frame, where, findings)
                objects.append(record.ObjectRecord(label, box))
        digest = hashlib.sha256(repr((str(picture), file.stat().st_size, objects)).encode())
        return record.PictureRecord(
            str(picture), file, frame.width, frame.height, tuple(objects), digest.hexdigest()
        )

    load = list_reader(root, lists, read_picture, findings)
    return assemble(
        root, list(lists), load, choice, findings,
        stated=lambda: names, says_roles=path is not None,
    )  # fmt: skip


# -- the set ---------------------------------------------------------------------------------------


def _settings(root: Path) -> tuple[Path | None, dict[str, Any]]:
    """data.yaml or another YAML file in the folder that has `names`, and what it holds."""
    paths = [*root.glob("*.yaml"), *root.glob("*.yml")]
    for path in sorted(paths, key=lambda path: (path.stem not in ("data", "dataset"), path.name)):
        try:
            content = read_yaml(path)
        except UserError:
            if path.stem == "data":
                raise
            continue
        if "names" in content:
            return path, content
    return None, {}


def _class_names(
    files: checks.FolderFiles, path: Path | None, content: dict[str, Any]
) -> tuple[str, ...]:
    """Class names in the order of their numbers: a list, or a map from numbers."""
    if path is None:
        listed = (*files.annotations, *files.others)
        paths = [files.root / x for x in listed if x.name in _NAME_FILES]
        # That with which LabelImg starts counts if there is no other.
        paths = [x for x in paths if x.name != _STARTED_WITH] or paths
        if not paths:
            raise UserError(f"{files.root}: has no data.yaml with names, nor classes.txt; add one")
        rows = [[x.strip() for x in read_text(one).split("\n") if x.strip()] for one in paths]
        path, raw = paths[0], rows[0]
        for other, own in zip(paths, rows, strict=True):
            if own != raw:  # LabelImg writes one in each folder, in the order of that session
                raise UserError(
                    f"{path} and {other} have different class names; keep one if it is right for "
                    "all text files, else use each folder alone"
                )
    else:
        raw = content["names"]
    if isinstance(raw, dict):
        numbers = [_whole(key) for key in raw]
        if sorted(numbers, key=str) != sorted(range(len(raw)), key=str):
            raise UserError(f"{path}: names has the numbers {numbers!s:.120}; count them from 0")
        raw = [value for _, value in sorted(zip(numbers, raw.values(), strict=True))]
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{path}: names must be a list of class names; write names: [cat, dog]")
    for one in raw:
        if one is None or isinstance(one, bool):
            raise UserError(f"{path}: names holds {one}, as YAML reads yes, no, on, off, null and "
                            "nothing; put the name in quotes")  # fmt: skip
    names = tuple(record.checked_class_name(str(one), f"{path}: names") for one in raw)
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names holds one twice; give each class its own")
    return names


def _whole(value: object) -> int:
    text = str(value).strip()
    return int(text) if text.isdecimal() else -1


def _lists(
    files: checks.FolderFiles, path: Path | None, content: dict[str, Any], findings: checks.Findings
) -> dict[str, list[PurePosixPath]]:
    """The pictures of every list."""
    root, known = files.root, set(files.pictures)
    entries = {name: content[name] for name in _LISTS if content.get(name)}
    if path is None:  # CVAT writes train.txt beside obj.names
        entries = {name: f"{name}.txt" for name in _LISTS if (root / f"{name}.txt").is_file()}
    found: dict[str, list[PurePosixPath]] = {}
    base = content.get("path")
    bases = [PurePosixPath(base)] if isinstance(base, str) else []
    for name, entry in entries.items():
        rows: dict[PurePosixPath, None] = {}
        for one in entry if isinstance(entry, list) else [entry]:
            if not isinstance(one, str):
                raise UserError(f"{path}: {name} holds {one!r:.60}; give a folder or a text file")
            place = _place(root, one, bases, findings)
            if place is None:
                if role_of(name) != "train":
                    findings.repairs[NO_LIST] += 1  # Roboflow writes the lines of all three
                    continue
                raise UserError(f"{path or root}: {name}: {one}: no such folder or file below "
                                f"{root}; correct the path")  # fmt: skip
            if (root / place).is_dir():
                parts = place.parts
                rows |= dict.fromkeys(x for x in files.pictures if x.parts[: len(parts)] == parts)
                continue
            # A text file names pictures, one a line; paths may begin at its own folder.
            for line in filter(str.strip, read_text(root / place).split("\n")):
                picture = _place(root, line, [place.parent, *bases], findings)
                if picture in known:
                    rows[picture] = None
                else:
                    message = f"{root / place}: no such picture, {line.strip()!r:.120}; add it"
                    findings.leave_out(UserError(message), checks.PICTURE)
        if rows:
            found[name] = list(rows)
    return found or by_role({x: x.parts[:-1] for x in files.pictures}, findings)


def _place(
    root: Path, name: str, bases: Sequence[PurePosixPath], findings: checks.Findings
) -> PurePosixPath | None:
    """Where a path of data.yaml or of a list is below the folder; None if nowhere.

    It is looked for as it is, below `path`, and without its first folders, since Roboflow writes
    ../train/images, and others paths of another machine. A folder called train or the like is not
    dropped: the pictures of ../train/images are not those of images.
    """
    given = PurePosixPath(name.strip().replace("\\", "/"))
    for place in (*(base / given for base in bases), given):
        if not place.is_absolute() and ".." not in place.parts and (root / place).exists():
            return PurePosixPath(*place.parts)
    parts = [part for part in given.parts if part not in ("..", "/")]
    for start in range(len(parts)):
        place = PurePosixPath(*parts[start:])
        if role_of(*parts[:start]) is not None:
            break
        if (root / place).exists():
            if start or given.is_absolute():
                findings.repairs[MOVED] += 1
            return place
    return None


def _text_file(root: Path, picture: PurePosixPath) -> Path | None:
    """The text file of a picture: labels/ in place of the last images/, or beside it."""
    folders, name = picture.parts[:-1], f"{picture.stem}.txt"
    places = [picture.with_name(name), PurePosixPath("labels", *folders, name)]
    for at in (i for i, part in enumerate(folders) if part == "images"):
        places.insert(0, PurePosixPath(*folders[:at], "labels", *folders[at + 1 :], name))
    if len(folders) and "images" not in folders:  # train/a.jpg, labels beside train or below it
        places += [PurePosixPath(*folders, "labels", name)]
    return next((file for place in places if (file := checks.find_file(root / place))), None)


def _leave_out_orphans(
    files: checks.FolderFiles, used: Sequence[Path], findings: checks.Findings
) -> None:
    """Leave out the files of boxes whose picture was removed, renamed, or is of no kind we read.

    A folder whose files belong to no picture at all, such as one of older labels, is only counted.
    """
    known = {_identity(file) for file in used}
    folders = {_identity(file.parent) for file in used}
    for path in files.annotations:
        file = files.root / path
        if file.is_file() and _identity(file) not in known and _holds_boxes(file):
            if _identity(file.parent) not in folders:
                findings.ignored[ELSEWHERE] += 1
                continue
            message = (
                f"{file}: its picture is not there, {path.stem}.jpg, .png or the like in images/ "
                "for labels/, or beside it; add it"
            )
            findings.leave_out(UserError(message), checks.PICTURE)


def _identity(file: Path) -> tuple[int, int]:
    """The same for all paths of a file, as through links, or where case does not count."""
    status = file.stat()
    return status.st_dev, status.st_ino


def _holds_boxes(file: Path) -> bool:
    """Whether every line is a class number and four numbers or more; lists and notes are not."""
    try:
        lines = [line for line in read_text(file).split("\n") if line.strip()]
    except UserError:
        return False
    return bool(lines) and all(map(_LINE.fullmatch, lines))


# -- a picture -------------------------------------------------------------------------------------


def _on_the_edge(box: record.Box, width: int, height: int) -> record.Box:
    """A box whose sides are off the picture's edge by less than the digits of a share give."""
    edges = (0.0, 0.0, float(width), float(height))
    x0, y0, x1, y1 = (
        edge if abs(value - edge) < 1e-5 * max(width, height) else value
        for value, edge in zip(box, edges, strict=True)
    )
    return x0, y0, x1, y1


def _numbers(
    line: str, names: Sequence[str], where: str, findings: checks.Findings, *, has_keypoints: bool
) -> tuple[str, record.Box]:
    """Class name, and x0, y0, x1, y1 as shares of the picture."""
    label, *values = map(checks.written_number, line.split())
    if not all(map(math.isfinite, (label, *values))) or label != int(label):
        raise UserError(f"{where}: {line.strip()!r:.80}: give a class number and shares")
    if not 0 <= label < len(names):
        raise checks.Unusable(
            checks.UNKNOWN,
            f"{where}: class {label:g}: there are {len(names)} names, from 0 on; add it",
        )
    if len(values) > 5 and not has_keypoints:
        if len(values) % 2:
            raise UserError(f"{where}: {len(values)} numbers; give a box, or pairs of a polygon")
        if max(values) > _FAR:
            remedy = "key points need kpt_shape in data.yaml, corners of a polygon are shares"
            raise UserError(f"{where}: {max(values):g} is no share; {remedy}")
        findings.repairs[POLYGONS] += 1
        x, y = values[::2], values[1::2]
        box = (min(x), min(y), max(x), max(y))
    elif len(values) < 4:
        raise UserError(f"{where}: {len(values)} numbers behind the class; give 4")
    else:
        if len(values) > 4:
            findings.repairs[KEYPOINTS if has_keypoints else SCORES] += 1
        x, y, width, height = values[:4]
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if box[2] <= box[0] or box[3] <= box[1]:
        raise UserError(f"{where}: {line.strip()!r:.80}: the box is empty; remove it")
    return names[int(label)], box
