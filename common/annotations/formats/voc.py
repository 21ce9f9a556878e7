"""PASCAL VOC's layout: lists of pictures, and one XML file of objects for each picture.

ROOT/VOC2007/{ImageSets/Main/LIST.txt, Annotations/ID.xml, JPEGImages/ID.jpg}

The folder is a VOC devkit (VOC2007/ and/or VOC2012/), or a set made by tools/make_dataset.py, whose
dataset.json says the classes, the lists and the metric.
"""

import codecs
import contextlib
import hashlib
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.annotations import checks, record
from common.annotations.lists import assemble
from common.errors import UserError, unknown
from common.files import decode_text, read_json, read_record_or_none, read_regular, read_text, walk
from common.pictures import PICTURE_SUFFIXES

# The twenty names of the PASCAL VOC challenges 2007 to 2012, in their official order.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
# Pictures of PASCAL's own lists: host.robots.ox.ac.uk/pascal/VOC/voc20{07,12}/dbstats.html
OFFICIAL_COUNTS = {"VOC2007/trainval": 5_011, "VOC2012/trainval": 11_540, "VOC2007/test": 4_952}
UNLISTED = "annotations of pictures in no list: left out"
_OFFICIAL_SPLIT = re.compile(r"voc_(2007|2012)_(\w+)")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MAX_XML_BYTES = 4 << 20  # some 8,000 objects
_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")
# Windows programs call by the older names the wider sets, which hold all of theirs.
_CODECS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}
# Others of Python's codecs are no encodings of texts, such as rot13, or interpret them.
_TEXT_CODEC = re.compile(
    r"(utf-(8|16|32)|iso|cp|gb|shift_|euc_|koi8|mac-|big5|ascii|tis|hz|johab).*"
)
_QUOTED = re.compile(r'".+"')
_NOT_SAID = ("", "unspecified", "unknown", "none", "null")
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True}


HOLDS = "VOC2007/ImageSets/Main or VOC2012/ImageSets/Main, or a dataset.json beside them"


# -- sets -----------------------------------------------------------------------------------------


def recognises(root: Path) -> bool:
    """Whether there is a dataset.json with classes or a VOC folder."""
    card = read_record_or_none(root / "dataset.json", {"classes": list})
    return card is not None or bool(_devkit_folders(root))


def read(root: Path, choice: record.SetChoice) -> record.LabelledSet:
    """Read and check the chosen lists; see `record.FORMATS`.

    Classes: the choice, else dataset.json, else the 20 VOC names in PASCAL's own set, else
    those that occur. The metric of PASCAL's own VOC2007 is the 11-point AP, that of any other
    set the area.
    """
    path = root / "dataset.json"
    description: dict[str, Any] = _read_description(path) if path.exists() else {}
    year = description.get("metric_year") or None
    if year not in (None, 2007, 2012):
        raise UserError(f"metric year {year}: give 2007 (11-point AP) or 2012 (area)")

    # PASCAL's own set has its own classes, metric and tolerance.
    classes = choice.classes or tuple(description.get("classes", ()))
    if not classes and _has_official_list(root):
        classes = VOC_CLASSES
    is_official = classes == VOC_CLASSES and description.get("kind", "voc") == "voc"
    stated = description.get("classes") or (VOC_CLASSES if is_official else None)
    findings = checks.Findings(choice.max_left_out)
    own = description.get("splits")
    spellings = _spellings(root, own if isinstance(own, dict) else {})
    if not is_official:
        findings.ignored[UNLISTED] += sum(map(_num_unlisted, _devkit_folders(root)))

    # Lists that are not guessed: dataset.json's; else the config's or the challenge's.
    config = (choice.usual_train or "", choice.usual_test or "")
    is_told = [one.startswith("voc_") for one in config]
    train = config[0] if is_told[0] else "voc_2007_trainval"
    test = config[1] if is_told[1] else "voc_2007_test"
    if description:
        train, test = (train, test) if is_official else ("train", "test")
        train = description.get("train_split") or train
        test = description.get("test_split") or test
    has_usual = (
        bool(description)
        or {*train.split("+"), test} <= spellings.keys()
        or (is_official and any(is_told))
    )

    def spelt(lists: str) -> str:
        return "+".join(spellings.get(name, name) for name in lists.split("+"))

    choice = replace(
        choice,
        train_split=choice.train_split and spelt(choice.train_split),
        test_split=choice.test_split and spelt(choice.test_split),
    )

    def load(name: str) -> record.LabelledSplit:
        folder, own_name = _find_list(root, name)
        reading = {"exif": choice.exif, "is_official": is_official, "findings": findings}
        finder = PictureFinder(folder)
        pictures = findings.usable(
            checks.ANNOTATION,
            read_list(folder, own_name),
            lambda image_id: read_picture(folder, image_id, stated, finder, **reading),
        )
        return record.LabelledSplit(folder, own_name, pictures)

    data = assemble(
        root,
        sorted(set(spellings.values())),
        load,
        choice,
        findings,
        stated=lambda: stated,
        usual=(spelt(train), spelt(test)) if has_usual else None,
        names_unused=not (description or is_official),
        says_roles=bool(description),
        metric_year=year,
        name=description.get("name") and str(description["name"]),
    )
    is_2007 = is_official and "2012" not in data.test.folder.name
    return replace(data, metric_year=data.metric_year or (2007 if is_2007 else 2012))


def _has_official_list(root: Path) -> bool:
    """Whether a list has as many pictures as PASCAL's own."""
    for folder in _devkit_folders(root):
        for path in record.list_file(folder, "x").parent.glob("*.txt"):
            count = OFFICIAL_COUNTS.get(f"{folder.name}/{path.stem}")
            if count is not None and count == len(read_text(path).split()):
                return True
    return False


def _num_unlisted(folder: Path) -> int:
    """Number of annotations of pictures that are in no list."""
    place, listed = folder / "Annotations", set()
    for name in list_names(folder):
        with contextlib.suppress(UserError):  # told if the list is used
            names = read_list(folder, name, class_wise=True)
            listed |= {checks.composed(str(place / one)) for one in names}
    files = (file for file in walk(place) if file.suffix.lower() == ".xml")
    return sum(checks.composed(str(file.with_suffix(""))) not in listed for file in files)


def _read_description(path: Path) -> dict[str, Any]:
    """What dataset.json says of classes, lists and metric."""
    content = read_json(path, remedy="make the data set again")
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise UserError(f"{path}: has no list 'classes'; make the data set again")
    for key in ("train_split", "test_split"):
        if not isinstance(content.get(key), str | None):
            raise UserError(f"{path}: {key} {content[key]!r:.60}: give lists joined by +")
    classes = [record.checked_class_name(x, str(path)) for x in content["classes"]]
    if len(set(classes)) != len(classes) or not classes:
        raise UserError(f"{path}: classes {', '.join(classes)!r} must be different and not none")
    return content | {"classes": classes}


def _devkit_folders(root: Path) -> list[Path]:
    """VOC folders with lists: the folder itself, those in it, and those in ROOT/VOCdevkit."""
    folders = [*year_folders(root), *year_folders(root / "VOCdevkit")]
    return [folder for folder in folders if record.list_file(folder, "x").parent.is_dir()]


def _spellings(root: Path, own: Collection[str]) -> dict[str, str]:
    """Lists of pictures by all their names: train and voc_2007_train, which means the first one
    unless two years have it.

    Class-wise lists are left out, as cat_train beside train, but for those that are in `own`.
    """
    names = [(folder, name) for folder in _devkit_folders(root) for name in list_names(folder)]
    count = Counter(name for _, name in names)
    spellings = {}
    for folder, name in names:
        if name.rpartition("_")[2] not in count.keys() - {name} or name in own:
            official = f"voc_{folder.name.removeprefix('VOC')}_{name}"
            spellings[official] = official if count[name] > 1 else name
            if count[name] == 1:
                spellings[name] = name
    return spellings


def official_name(split: record.LabelledSplit) -> str:
    """By which name a list of a set, of any format, is asked for."""
    official = f"voc_{split.folder.name.removeprefix('VOC')}_{split.name}"
    return _spellings(split.folder.parent, [split.name]).get(official, split.name)


def _find_list(root: Path, split: str) -> tuple[Path, str]:
    """Where a list is: "train" -> (ROOT/VOC2007, "train"), "voc_2012_val" -> (.../VOC2012, "val").

    Raises:
        UserError: If there is no such list, or several and the name does not say which.
    """
    match = _OFFICIAL_SPLIT.fullmatch(split)
    name = match[2] if match else split
    folders = _devkit_folders(root)
    if match:
        folders = [folder for folder in folders if folder.name == f"VOC{match[1]}"]
    holders = [folder for folder in folders if record.list_file(folder, name).is_file()]
    if not holders:
        there = sorted(f"{folder.name}/{x}" for folder in folders for x in list_names(folder))
        year = match[1] if match else 2007
        needed = record.list_file(folders[0] if folders else root / f"VOC{year}", name)
        raise UserError(
            f"{needed}: no such list; lists there: {', '.join(there[:20]) or 'none'}; "
            "the config and --train-split, --test-split say which are read"
        )
    if len(holders) > 1:
        years = f"{holders[0].name} and in {holders[1].name}"
        raise UserError(f"list {split!r} is in {years}; say voc_2007_{name} or voc_2012_{name}")
    return holders[0], name


# -- lists ----------------------------------------------------------------------------------------


def year_folders(root: Path) -> list[Path]:
    """The VOC folders of a devkit, sorted: those below it, or itself; empty if it is none."""
    if (root / "ImageSets").is_dir() and (root / "JPEGImages").is_dir():
        return [root]
    return sorted(
        path
        for path in root.glob("VOC*")
        if path.is_dir() and ((path / "ImageSets").is_dir() or (path / "JPEGImages").is_dir())
    )


def list_names(folder: Path) -> list[str]:
    """Names of the lists of a VOC folder."""
    return sorted(path.stem for path in record.list_file(folder, "x").parent.glob("*.txt"))


class PictureFinder:
    """Finds the pictures of JPEGImages by their name in a list; a folder is listed once.

    A name may come with or without suffix. Its accents may be composed or not (NFC, NFD): lists
    and files often come from different systems.
    """

    def __init__(self, folder: Path) -> None:
        """Of a VOC folder; nothing is read."""
        self.root = folder / "JPEGImages"
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def find(self, image_id: str) -> list[Path]:
        """The picture; or none, or several that the name could mean."""
        place = self.root / image_id
        if place.parent not in self._listed:
            by_stem: defaultdict[str, list[Path]] = defaultdict(list)
            with contextlib.suppress(OSError, ValueError):
                for file in map(Path, sorted(os.scandir(place.parent), key=os.fspath)):
                    if file.suffix.lower() in PICTURE_SUFFIXES:
                        by_stem[checks.composed(file.stem)].append(file)
            self._listed[place.parent] = by_stem
        files = self._listed[place.parent].get(checks.composed(place.name), [])
        if not files and (stem := self.without_suffix(image_id)) != image_id:
            suffix = place.suffix.lower()
            return [file for file in self.find(stem) if file.suffix.lower() == suffix]
        return [file for file in files if file.stem == place.name] or files

    def without_suffix(self, image_id: str) -> str:
        """A name of a list as the annotation has it: a.jpg is a, unless there is an a.jpg.jpg."""
        stem, suffix = os.path.splitext(image_id)
        place = self.root / image_id
        by_stem = self._listed.get(place.parent, {})
        is_whole = checks.composed(place.name) in by_stem
        return image_id if is_whole or suffix.lower() not in PICTURE_SUFFIXES else stem

    def require(self, image_id: str) -> Path:
        """The picture.

        Raises:
            UserError: If there is none, or several.
        """
        files = self.find(image_id)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise checks.Unusable(
                checks.PICTURE,
                f"{self.root}: {image_id!r} may be each of {names}; keep one of them",
            )
        if not files or not files[0].is_file():
            path = self.root / f"{image_id}.jpg"
            raise checks.Unusable(
                checks.PICTURE, f"{path}: no such picture, but a list names it; add it"
            )
        return files[0]


def read_list(folder: Path, name: str, *, class_wise: bool = False) -> list[str]:
    """Picture names of a list, each once and without suffix; they may hold spaces.

    Args:
        folder: VOC2007 or the like.
        name: Of the list.
        class_wise: Whether a list such as aeroplane_train serves, whose lines end in 1, 0 or -1,
            those of actions after the number of an object; the pictures with -1 are left out.

    Raises:
        UserError: If the list is missing or empty, names a picture twice, or leads out of the
            folder.
    """
    path, finder = record.list_file(folder, name), PictureFinder(folder)
    if not path.is_file():
        raise UserError(f"{path}: no such list; lists there: {', '.join(list_names(folder)[:20])}")
    names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    for num_columns in (2, 3):
        rows = [line.rsplit(maxsplit=num_columns - 1) for line in names]
        if (
            not any(map(finder.find, names))
            and all(len(row) == num_columns and row[-1] in ("-1", "0", "1") for row in rows)
            and all(part.isdecimal() for row in rows for part in row[1:-1])
            and any(finder.find(row[0]) for row in rows)
        ):
            if not class_wise:
                raise UserError(f"{path}: line {names[0]!r} must hold one picture name alone")
            names = list(dict.fromkeys(row[0] for row in rows if row[-1] != "-1"))
            break
    # CVAT quotes names with spaces.
    names = [line[1:-1] if _QUOTED.fullmatch(line) and not finder.find(line) else line
             for line in names]  # fmt: skip
    names = [finder.without_suffix(line) for line in names]
    if not names:
        raise UserError(f"{path}: the list is empty; put one picture name a line, without .jpg")
    for line in names:
        if checks.leads_out(line) or "\0" in line:
            raise UserError(f"{path}: {line!r:.120} leads out of {finder.root}; give a name in it")
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: {twice!r} is listed {count} times; keep one of the lines")
    return names


# -- annotations ----------------------------------------------------------------------------------


def read_picture(
    folder: Path,
    image_id: str,
    classes: Collection[str] | None,
    finder: PictureFinder | None = None,
    **reading: Any,
) -> record.PictureRecord:
    """Read Annotations/ID.xml and the header of the picture.

    Args:
        folder: VOC2007 or the like.
        image_id: Name without suffix.
        classes: Names that may occur; None: any.
        finder: Of the pictures in `folder`.
        reading: What else `read_objects` takes.

    Raises:
        UserError: If a file is missing or unreadable, or its content would mislead training.
    """
    path = record.annotation_file(folder, image_id)
    path = checks.find_file(path) or checks.find_file(path.with_name(f"{path.stem}.XML")) or path
    tree = parse_annotation(path)
    file = (finder or PictureFinder(folder)).require(image_id)
    return read_objects(path, tree, file, image_id, classes, **reading)


Parsed = tuple[bytes, ElementTree.Element]  # the bytes of an XML file and its elements


def read_objects(
    path: Path,
    parsed: Parsed,
    file: Path,
    image_id: str,
    classes: Collection[str] | None,
    *,
    exif: str = "auto",
    is_official: bool = False,
    findings: checks.Findings | None = None,
) -> record.PictureRecord:
    """The objects of an annotation, for its picture.

    Args:
        path: Of the annotation.
        parsed: From `parse_annotation`.
        file: The picture.
        image_id: Its name without suffix.
        classes: Names that may occur; None: any.
        exif: See `SetChoice`.
        is_official: PASCAL's own set: nothing is clipped, so that figures compare with others'. A
            few of its boxes reach a pixel beyond their picture.
        findings: Repairs and objects left out are counted here; None: nothing is left out.

    Raises:
        UserError: If the content would mislead training.
    """
    is_strict = findings is None
    findings = findings or checks.Findings()
    content, tree = parsed
    size = tuple(
        _number(path, tree, place) if (tree.findtext(place) or "").strip() else 0.0
        for place in ("size/width", "size/height")
    )
    frame = checks.read_frame(file, (size[0], size[1]), exif, path, findings)
    num_own, num_boxes = 0, sum(1 for _ in tree.iter("bndbox"))
    for element in tree.findall("object"):
        num_own += len(element.findall("bndbox"))
    if num_boxes - num_own > len(tree.findall("object/part/bndbox")):
        raise UserError(f"{path}: has a <bndbox> that is in no <object> of <annotation>; move it")
    own_boxes, objects = [], []
    for number, element in enumerate(tree.findall("object"), start=1):
        where = f"{path}: object {number}"
        with findings.leaving_out(checks.OBJECT):
            item, where = _read_object(where, element, classes)
            own_boxes.append(item.box)
            box = checks.placed(item.box, frame, where, findings, clips=not is_official)
            objects.append(replace(item, box=box))
    if num_twice := len(objects) - len({(item.class_name, item.box) for item in objects}):
        findings.repairs[checks.TWICE] += num_twice
    if is_strict:
        findings.raise_faults()
    digest = hashlib.sha256(content + f"{image_id}{file.stat().st_size}".encode())
    boxes = [item.box for item in objects]
    if boxes != own_boxes or len(boxes) < num_own:
        digest.update(repr(boxes).encode())
    return record.PictureRecord(
        image_id, file, frame.width, frame.height, tuple(objects), digest.hexdigest()
    )


def _read_object(
    where: str, element: ElementTree.Element, classes: Collection[str] | None
) -> tuple[record.ObjectRecord, str]:
    """One object, its box as it stands there, and where it is, for messages."""
    name = record.checked_class_name(element.findtext("name"), where)
    where += f" ({name})"
    if classes is not None and name not in classes:
        raise checks.Unusable(
            checks.UNKNOWN, f"{where}: {unknown(f'class {name!r}', name, classes)}; see --classes"
        )
    if (num_boxes := len(element.findall("bndbox"))) != 1:
        raise UserError(f"{where}: has {num_boxes} <bndbox>; give it one, an object for each")
    xmin, ymin, xmax, ymax = (_number(where, element, f"bndbox/{key}") for key in _CORNERS)
    where += f": box ({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
    if xmax < xmin or ymax < ymin:
        raise UserError(f"{where} is empty or turned round; exchange its corners")
    item = record.ObjectRecord(
        name,
        (xmin - 1.0, ymin - 1.0, xmax, ymax),
        difficult=_flag(where, element, "difficult"),
        truncated=_flag(where, element, "truncated"),
    )
    return item, where


def parse_annotation(path: Path) -> Parsed:
    """Bytes and elements of a VOC annotation in the encoding that it names.

    Python's parser knows no encoding of several bytes but UTF-8 and UTF-16, so text is decoded
    here. Entities are refused: they can expand without bound.

    Raises:
        UserError: If it is missing, unreadable, or no VOC annotation.
    """
    try:
        content = read_regular(path, _MAX_XML_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation, but a list names it; add it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    text = decode_text(content, path, encoding=_encoding(path, content)).lstrip()
    if "<!ENTITY" in text or "<!DOCTYPE" in text:
        raise UserError(f"{path}: defines a document type or entities; write the text in full")
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: not readable as XML ({error}); write it again") from None
    for element in tree.iter():  # without namespaces
        element.tag = element.tag.rpartition("}")[2]
    if tree.tag != "annotation":
        raise UserError(f"{path}: holds <{tree.tag:.40}>, not VOC's <annotation>; export it as VOC")
    return content, tree


def _encoding(path: Path, content: bytes) -> str:
    """The codec for what an XML file declares, without regard to byte order marks."""
    declared = _DECLARATION.match(content.removeprefix(codecs.BOM_UTF8))
    if declared is None:
        return "utf-8"
    name = declared[1].decode()
    try:
        codec = codecs.lookup(name).name
    except LookupError:
        codec = ""
    if not _TEXT_CODEC.fullmatch(codec):
        raise UserError(f"{path}: declares the encoding {name!r:.40}, unknown; save it as UTF-8")
    # In UTF-16 the declaration would not have been found: programs that write UTF-8 say so, too.
    return "utf-8" if codec.startswith(("utf-16", "utf-32")) else _CODECS.get(codec, codec)


def _number(where: object, element: ElementTree.Element, field: str) -> float:
    text = (element.findtext(field) or "").strip()
    value = checks.written_number(text)
    if not math.isfinite(value):
        raise UserError(f"{where}: <{field}> holds {text!r:.60}; write a number")
    return value


def _flag(where: str, element: ElementTree.Element, field: str) -> bool:
    """A mark that is 0 or 1; 0 if it is not there or says nothing."""
    text = (element.findtext(field) or "").strip().lower()
    if text in _NOT_SAID:
        return False
    if text not in _FLAGS:
        raise UserError(f"{where}: <{field}> holds {text!r:.60}; write 0 or 1")
    return _FLAGS[text]
