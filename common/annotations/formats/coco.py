"""COCO's layout: one JSON file of pictures, categories and boxes for each list.

ROOT/annotations/instances_train2017.json, ROOT/train2017/*.jpg; the same with val2017.

A list NAME of another set is annotations/instances_NAME.json or annotations/NAME.json (CVAT),
NAME.json (Label Studio), or a JSON file in a folder NAME (Roboflow). Pictures are looked for in
ROOT/NAME, ROOT/images/NAME, ROOT/images, beside the JSON file, and in ROOT.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.annotations import checks, record
from common.annotations.lists import assemble
from common.errors import UserError
from common.files import open_regular, read_json

_OFFICIAL_SPLIT = re.compile(r"coco_(20\d\d)_([a-z]+)")
_MAX_AREA = 1e10  # square pixels: pycocotools ignores objects above it
_MAX_EMPTY = 1 / 1000  # share of objects with an empty box; COCO's own lists hold some
_OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
_HEAD = 1 << 16  # bytes by which a file is known
_BEGINNING = re.compile(
    rb"(\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\s*\{\s*"
    rb'"(info|licenses|images|annotations|categories|type|contributor|year)"'
)
GROUPS = "categories without objects that group others: left out"
ELSEWHERE = "pictures whose path is of another place: found by the file's name"
HOLDS = "COCO's JSON, as annotations/instances_train2017.json, result.json, train/NAME.json"


def recognises(root: Path) -> bool:
    """Whether there is a JSON file of annotations or a folder of COCO's pictures."""
    return bool(_json_files(root)) or any(
        (root / name).is_dir() for name in ("train2017", "val2017")
    )


def read(root: Path, choice: record.SetChoice) -> record.LabelledSet:
    """Read and check the chosen lists; see `record.FORMATS`.

    Masks are not used. Crowds are left out of the training list, as Detectron2 does; they stay
    in the test list, where the evaluation ignores them. Pictures and classes are in the order
    of COCO's numbers, unless the choice orders the classes. The metric is COCO's.
    """
    if choice.metric_year is not None:
        raise UserError(f"{root}: a COCO folder has COCO's metric; leave --metric-year out")
    files, found = _json_files(root), checks.Findings(choice.max_left_out)
    categories: dict[str, dict[str, bool]] = {}

    def load(name: str) -> record.LabelledSplit:
        path, places = _find_list(root, files, name)
        categories[name], pictures = read_instances(path, *places, exif=choice.exif, findings=found)
        for other, classes in categories.items():
            if [*classes] != [*categories[name]]:
                raise UserError(f"{root}: {name} and {other} have different categories")
        return record.LabelledSplit(places[0], name, pictures)

    def stated() -> tuple[str, ...]:
        names = next(iter(categories.values()))
        kept = tuple(x for x in names if any(own[x] for own in categories.values()))
        found.ignored[GROUPS] += len(names) - len(kept)
        return kept

    usual = (_usual(choice.usual_train, "train2017"), _usual(choice.usual_test, "val2017"))
    is_told = (choice.usual_train or "").startswith("coco_")
    data = assemble(
        root, list(files), load, choice, found,
        stated=stated,
        usual=usual if usual[1] in files and (usual[0] in files or is_told) else None,
        metric_year=None,
    )  # fmt: skip
    return replace(data, train=tuple(x.where(lambda item: not item.crowd) for x in data.train))


def _usual(name: str | None, default: str) -> str:
    """The list that a Detectron2 config names: coco_2014_train is train2014."""
    match = _OFFICIAL_SPLIT.fullmatch(name or "")
    return f"{match[2]}{match[1]}" if match else default


def _json_files(root: Path) -> dict[str, list[Path]]:
    """Lists and their files: all in ROOT/annotations, those of annotations in ROOT and below it."""
    own = root / "annotations"
    tables = sorted(path for path in own.glob("*.json") if not path.name.startswith("."))
    if any(path.name.startswith("instances_") for path in tables):  # others are of other tasks
        tables = [path for path in tables if not path.name.startswith(_OTHER_TASKS)]
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for path in (*tables, *filter(_holds_annotations, sorted(root.glob("*.json")))):
        found[path.stem.removeprefix("instances_")].append(path)
    for path in sorted(root.glob("*/*.json")):
        if path.parent != own and _holds_annotations(path):
            found[path.parent.name].append(path)
    return dict(found)


def _holds_annotations(path: Path) -> bool:
    """Whether the beginning of a JSON file is one of COCO's annotations."""
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
    except (OSError, UserError):
        return False
    if path.name.startswith(".") or path.parent.name == "__MACOSX":
        return False
    is_whole = len(head) < _HEAD
    text = head.replace(b"\0", b"")  # UTF-16 or UTF-32
    needed = (b'"images"', b'"annotations"') if is_whole else ()
    return _BEGINNING.match(text) is not None and all(key in text for key in needed)


def _find_list(root: Path, files: Mapping[str, list[Path]], name: str) -> tuple[Path, list[Path]]:
    """The file of a list, and the folders in which its pictures may be."""
    if name not in files:
        needed, there = root / f"annotations/instances_{name}.json", ", ".join(files) or "none"
        raise UserError(
            f"{needed}: no such file; lists there: {there}; see --train-split, --test-split, "
            "--eval-split"
        )
    path, *others = files[name]
    if others:
        raise UserError(
            f"{path} and {others[0]} are both of a list {name!r}; join them, or move one away"
        )
    places = [root / name, root / "images" / name, root / "images", path.parent / "images",
              path.parent, root]  # fmt: skip
    return path, list(dict.fromkeys(place for place in places if place.is_dir()))


def read_instances(
    path: Path, *folders: Path, exif: str = "auto", findings: checks.Findings | None = None
) -> tuple[dict[str, bool], tuple[record.PictureRecord, ...]]:
    """Read and check the boxes of a list; masks are not used, boxes are not rounded.

    Args:
        path: instances_NAME.json. Its ids are all numbers, or all text.
        folders: Hold the pictures; the first that has one counts.
        exif: See `SetChoice`.
        findings: Repairs and what is left out are counted here; None: nothing is left out.

    Returns:
        Class names in the order of COCO's numbers, each with False if it has no objects and groups
        others, as Roboflow's first category does; and the pictures in the order of their numbers.

    Raises:
        UserError: If the file does not hold what it must, with up to ten faults together.
    """
    is_strict = findings is None
    findings = findings or checks.Findings()
    content = read_json(path, remedy="export it again")
    labels = {
        row["id"]: record.checked_class_name(row.get("name"), f"{path}: category {row['id']!r}")
        for row in sorted(_rows(path, content, "categories"), key=lambda row: row["id"])
    }
    if len(set(labels.values())) < len(labels):
        raise UserError(f"{path}: names a category twice; give each once")
    images = sorted(_rows(path, content, "images"), key=lambda row: row["id"])
    annotations = _rows(path, content, "annotations")
    used = [row.get("category_id") for row in annotations]
    above = [row.get("supercategory") for row in content["categories"]
             if row.get("supercategory") != row.get("name")]  # fmt: skip
    is_class = {label: label not in above or key in used for key, label in labels.items()}

    # Pictures first: boxes are checked against them.
    pictures: dict[int | str, tuple[Path, checks.Frame]] = {}
    ids_of: dict[Path, int | str] = {}
    for row in images:
        where = f"{path}: picture {row['id']!r:.60}"
        with findings.leaving_out(checks.PICTURE):
            file = _file(folders, row.get("file_name"), where, findings)
            if file in ids_of:
                raise UserError(f"{where}: names {file.name}, as {ids_of[file]!r} does; keep one")
            ids_of[file] = row["id"]
            width, height = (checks.number(row.get(side) or 0) for side in ("width", "height"))
            frame = checks.read_frame(file, (width, height), exif, where, findings)
            pictures[row["id"]] = (file, frame)

    # Objects. An empty box is left out if there are few, else the file is wrong.
    objects: dict[int | str, list[record.ObjectRecord]] = {row["id"]: [] for row in images}
    empty, reach = [], 0.0
    for row in annotations:
        where, image = f"{path}: annotation {row.get('id')!r:.60}", row.get("image_id")
        with findings.leaving_out(checks.OBJECT):
            if type(image) not in (int, str) or image not in objects:
                raise UserError(
                    f"{where} is of a picture that it does not list, image_id {image!r:.60}; add "
                    "the picture or remove the annotation"
                )
            item, where = _object(row, labels, where, findings)
            x0, y0, x1, y1 = item.box
            reach = max(reach, x1, y1)
            if x1 <= x0 or y1 <= y0:
                empty.append(f"{where} is empty; remove the annotation")
            elif image in pictures:
                box = checks.placed(item.box, pictures[image][1], where, findings)
                objects[image].append(replace(item, box=box))
    if 0 < reach <= 1:
        raise UserError(
            f"{path}: all boxes are within 0 to 1, as shares of the picture would be: export it "
            "with boxes in pixels"
        )
    if len(empty) > _MAX_EMPTY * len(annotations):
        for message in empty:
            findings.leave_out(UserError(message), checks.OBJECT)
    elif empty:
        findings.ignored[checks.EMPTY] += len(empty)
    if is_strict:
        findings.raise_faults()
    records = []
    for row in images:
        if row["id"] in pictures:
            (file, frame), own = pictures[row["id"]], objects[row["id"]]
            text = repr((row["id"], row["file_name"], file.stat().st_size, own))
            digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
            size = frame.width, frame.height
            records.append(record.PictureRecord(str(row["id"]), file, *size, tuple(own), digest))
    return is_class, tuple(records)


def _rows(path: Path, content: Any, key: str) -> list[dict[str, Any]]:
    """A list of objects; their ids are all whole numbers or all text, and differ.

    Annotations need none.
    """
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path}: is no COCO annotation of instances: {key!r} must be a list of objects; "
            "export it again"
        )
    ids = [row.get("id") for row in rows if key != "annotations" or row.get("id") is not None]
    kinds = {type(value) for value in ids}
    if len(kinds) > 1 or not kinds <= {int, str}:
        examples = ", ".join(f"{next(x for x in ids if type(x) is kind)!r:.40}" for kind in kinds)
        raise UserError(
            f"{path}: {key} have the ids {examples}: give whole numbers to all, or text to all"
        )
    twice, count = Counter(ids).most_common(1)[0] if ids else (None, 0)
    if count > 1:
        raise UserError(f"{path}: has {count} {key} of the id {twice!r:.60}; give each its own")
    return rows


def _file(folders: Sequence[Path], name: Any, where: str, findings: checks.Findings) -> Path:
    """A picture's file; one elsewhere, as on the server of Label Studio, is found by its name."""
    if not isinstance(name, str):
        raise UserError(f"{where}: file_name {name!r:.120}: give the name of a file")
    clean = name.replace("\\", "/")
    for place in dict.fromkeys((clean, clean.partition("?")[0].rpartition("/")[2])):
        for folder in folders if not checks.leads_out(place) else ():
            if (file := checks.find_file(folder / place)) is not None:
                findings.repairs[ELSEWHERE] += place != clean
                return file
    fault = f"no such picture, {name!r:.120} in {folders[0]}; add it"
    if checks.leads_out(clean):
        fault = f"file_name {name!r:.120} leads out of {folders[0]}; give one within"
    raise checks.Unusable(checks.PICTURE, f"{where}: {fault}")


def _object(
    row: dict[str, Any], labels: dict[int | str, str], where: str, findings: checks.Findings
) -> tuple[record.ObjectRecord, str]:
    """One object, its box as it stands there, and where it is, for messages."""
    category, bbox, area = row.get("category_id"), row.get("bbox"), row.get("area")
    if not bbox and (polygons := _polygons(row.get("segmentation"))):
        x, y = polygons[::2], polygons[1::2]
        bbox = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
        findings.repairs[checks.POLYGONS] += 1
    if type(category) not in (int, str) or category not in labels:
        raise checks.Unusable(
            checks.UNKNOWN,
            f"{where}: category_id {category!r:.60} is none of the categories; add it",
        )
    values = [checks.number(value) for value in bbox] if isinstance(bbox, list) else []
    where += f": bbox {bbox!r:.120}"
    if len(values) != 4 or not all(map(math.isfinite, values)) or min(values[2:]) < 0:
        is_mask = not bbox and isinstance(row.get("segmentation"), dict)
        more = "; boxes of run-length masks: pycocotools.mask.toBbox gives them" if is_mask else ""
        raise UserError(f"{where}: give x, y, width >= 0, height >= 0{more}")
    if area is not None and not 0 <= checks.number(area) <= _MAX_AREA:
        raise UserError(f"{where}: area {area!r:.60}: give square pixels, or leave it out")
    if row.get("iscrowd") not in (None, 0, 1):
        raise UserError(f"{where}: iscrowd {row['iscrowd']!r:.60}: give 0 or 1")
    x, y, width, height = values
    item = record.ObjectRecord(
        labels[category],
        (x, y, x + width, y + height),
        crowd=bool(row.get("iscrowd")),
        area=checks.number(area) if area else None,
    )
    return item, where


def _polygons(segmentation: Any) -> list[float]:
    """All corners, x and y in turn; empty if there are none, or they are no numbers."""
    parts = segmentation if isinstance(segmentation, list) else []
    values = [checks.number(x) for part in parts if isinstance(part, list) for x in part]
    return values if len(values) % 2 == 0 and all(map(math.isfinite, values)) else []
