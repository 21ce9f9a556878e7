"""Check a VOC devkit in detail before anything is trained on it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from common.errors import UserError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
_MAX_SHOWN = 10
_FLAGS = ("truncated", "difficult")  # Detectron2's evaluator reads them as integers
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class VocReport:
    """What a check of a devkit found.

    Attributes:
        splits: Number of pictures of each list, as {"VOC2007/train": n}.
        class_counts: Number of objects of each class.
        difficult_counts: How many of them are marked difficult.
        problems: One message each, naming the file and the remedy; empty means that all is well.
        notes: Oddities that do no harm, such as corners with decimals.
    """

    splits: dict[str, int] = field(default_factory=dict)
    class_counts: dict[str, int] = field(default_factory=dict)
    difficult_counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems

    def require(self) -> None:
        """Stop if something is wrong.

        Raises:
            UserError: With the first problems, one per line.
        """
        if self.problems:
            more = len(self.problems) - _MAX_SHOWN
            rest = [f"... and {more} more"] if more > 0 else []
            raise UserError("\n".join(self.problems[:_MAX_SHOWN] + rest))


def voc_years(root: Path) -> list[Path]:
    """The VOC folders of a devkit, sorted: those below it, or itself; empty if it is none."""
    if (root / "ImageSets").is_dir() and (root / "JPEGImages").is_dir():
        return [root]
    return sorted(
        path
        for path in root.glob("VOC*")
        if path.is_dir() and ((path / "ImageSets").is_dir() or (path / "JPEGImages").is_dir())
    )


def read_split(year: Path, split: str) -> list[str]:
    """Picture names of ImageSets/Main/SPLIT.txt.

    Raises:
        UserError: If the list is missing, empty, or names a picture twice.
    """
    file = year / "ImageSets/Main" / f"{split}.txt"
    try:
        lines = [
            line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except FileNotFoundError:
        there = ", ".join(sorted(p.stem for p in file.parent.glob("*.txt"))) or "none"
        raise UserError(f"{file}: missing; lists that are there: {there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); unpack the set again") from error
    names = [line[0] for line in lines if len(line) == 1 or line[1] != "-1"]
    if not names:
        raise UserError(
            f"{file}: lists no picture; put one picture name per line, without .jpg, or choose "
            "another split"
        )
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{file}: lists {name!r} {count} times; keep one of the lines")
    return names


def check_voc(
    devkit: str | Path,
    classes: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    tolerance_px: int = 0,
) -> VocReport:
    """Check layout, lists, annotations and pictures of a devkit.

    Args:
        devkit: Folder that holds VOC2007 or the like, or such a folder itself.
        classes: Known class names; the 20 of VOC if none.
        splits: Lists to check; all of ImageSets/Main that are not per class if none.
        tolerance_px: How far a box may reach beyond its picture. 1 is meant for the official sets:
            a few of their boxes do, and missing flags are then notes, not problems.
    Returns:
        Every problem found, each once, however many lists name the picture.
    """
    report = VocReport()
    root = Path(devkit)
    years = voc_years(root)
    if not years:
        report.problems.append(
            f"{root}: is no VOC devkit; it must hold VOC2007 (or another year) with "
            "JPEGImages, Annotations and ImageSets/Main"
        )
    for year in years:
        names = _check_lists(year, splits, report)
        for name in sorted(names):
            _check_picture(year, name, frozenset(classes or VOC_CLASSES), report, tolerance_px)
    report.class_counts = dict(sorted(report.class_counts.items()))
    report.difficult_counts = dict(sorted(report.difficult_counts.items()))
    return report


def _check_lists(year: Path, splits: Sequence[str] | None, report: VocReport) -> set[str]:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        if not (year / folder).is_dir():
            report.problems.append(
                f"{year / folder}: missing; a VOC folder needs it, unpack the set again"
            )
    found = sorted(
        file.stem for file in (year / "ImageSets/Main").glob("*.txt") if "_" not in file.stem
    )
    if not found and splits is None and (year / "ImageSets/Main").is_dir():
        report.problems.append(
            f"{year / 'ImageSets/Main'}: holds no lists; write train.txt and test.txt there"
        )
    names: set[str] = set()
    for split in found if splits is None else splits:
        try:
            listed = read_split(year, split)
        except UserError as error:
            report.problems.append(str(error))
            continue
        report.splits[f"{year.name}/{split}"] = len(listed)
        names.update(listed)
    return names


def _check_picture(
    year: Path, name: str, classes: frozenset[str], report: VocReport, tolerance_px: int
) -> None:
    picture, annotation = year / "JPEGImages" / f"{name}.jpg", year / "Annotations" / f"{name}.xml"
    size = _picture_size(picture, report)
    if not annotation.exists():
        report.problems.append(
            f"{annotation}: missing, though a list names it; add it or take {name!r} off the list"
        )
        return
    try:
        tree = ElementTree.parse(annotation).getroot()
    except (ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
        report.problems.append(
            f"{annotation}: is not well-formed XML ({error}); repair it or take {name!r} off the "
            "list"
        )
        return
    written = _written_size(tree)
    if written is None:
        report.problems.append(
            f"{annotation}: <size> lacks a whole width and height; add those of {picture.name}"
        )
    elif size is not None and written != size:
        report.problems.append(
            f"{annotation}: <size> says {written[0]} x {written[1]}, but {picture.name} is "
            f"{size[0]} x {size[1]}; correct the size, and the boxes if the picture was scaled"
        )
    bounds = size or written
    for number, node in enumerate(tree.findall("object"), start=1):
        _check_object(annotation, number, node, bounds, classes, report, tolerance_px)


def _picture_size(picture: Path, report: VocReport) -> tuple[int, int] | None:
    if not picture.exists():
        report.problems.append(
            f"{picture}: missing, though a list names it; add it or take the name off the list"
        )
        return None
    try:
        with Image.open(picture) as image:
            return image.size
    except Exception as error:  # Pillow raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        report.problems.append(
            f"{picture}: is no picture that can be read ({reason}); copy it again"
        )
        return None


def _written_size(tree: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = int(tree.findtext("size/width", "")), int(tree.findtext("size/height", ""))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _check_object(
    file: Path,
    number: int,
    node: ElementTree.Element,
    bounds: tuple[int, int] | None,
    classes: frozenset[str],
    report: VocReport,
    tolerance_px: int,
) -> None:
    name = (node.findtext("name") or "").strip()
    where = f"{file}: object {number} ({name or 'no name'})"
    if name in classes:
        report.class_counts[name] = report.class_counts.get(name, 0) + 1
        if (node.findtext("difficult") or "").strip() == "1":
            report.difficult_counts[name] = report.difficult_counts.get(name, 0) + 1
    else:
        known = ", ".join(sorted(classes))
        report.problems.append(
            f"{where}: unknown class; known are: {known}. Correct the name or add the class"
        )
    # The evaluator reads them, training does not; nothing is known to lack them in a test list.
    lacking = report.notes if tolerance_px else report.problems
    for flag in _FLAGS:
        if (node.findtext(flag) or "").strip() not in ("0", "1"):
            lacking.append(f"{where}: <{flag}> must be 0 or 1; write 0 if it is not known")
    if node.find("pose") is None:
        lacking.append(f"{where}: lacks <pose>, which the evaluator reads; write Unspecified")
    _check_box(where, node, bounds, report, tolerance_px)


def _check_box(
    where: str,
    node: ElementTree.Element,
    bounds: tuple[int, int] | None,
    report: VocReport,
    tolerance_px: int,
) -> None:
    texts = [(node.findtext(f"bndbox/{corner}") or "").strip() for corner in _CORNERS]
    try:
        xmin, ymin, xmax, ymax = (float(text) for text in texts)
    except ValueError:
        report.problems.append(
            f"{where}: <bndbox> needs numbers for {', '.join(_CORNERS)}; it has {texts}"
        )
        return
    box = f"box ({', '.join(texts)})"
    low, over = 1 - tolerance_px, tolerance_px
    if not (xmin < xmax and ymin < ymax):  # also catches NaN
        report.problems.append(
            f"{where}: {box} is empty or turned round; xmin < xmax and ymin < ymax must hold"
        )
    elif bounds is not None and (
        min(xmin, ymin) < low or xmax > bounds[0] + over or ymax > bounds[1] + over
    ):
        report.problems.append(
            f"{where}: {box} reaches outside the picture, {bounds[0]} x {bounds[1]}; corners "
            "count from 1 "
            "and are part of the box: clip or correct them"
        )
    elif not all(value == int(value) for value in (xmin, ymin, xmax, ymax)):
        report.notes.append(
            f"{where}: {box} has decimals; the evaluator takes whole numbers, round it in a test "
            "list"
        )
