"""What every format checks and repairs: a picture's size and orientation, and the boxes on it.

Faults are collected, so that one message names several; repairs are counted, so that they are said.
Pictures and annotations are found here too, and which belong together.
"""

import contextlib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from common.annotations.record import Box
from common.errors import UserError
from common.files import walk
from common.pictures import MIRRORED, PICTURE_SUFFIXES, UPSIDE_DOWN, BadPicture, read_shape

MAX_FAULTS = 10  # that one message names
_BEYOND = 1.0  # pixels: tools that count corners from 0 or to W + 1 reach so far outside
_LEAST_INSIDE = 0.1  # share of a box that is clipped; of others the picture or the unit is wrong
TURNED = "pictures annotated as they are stored: boxes turned by the EXIF orientation"
AMBIGUOUS = (
    "pictures whose EXIF orientation keeps their size: boxes taken as of the upright picture; "
    "--exif stored says otherwise"
)
UPRIGHT = "pictures with an EXIF orientation: boxes taken as shares of the upright picture"
NO_SIZE = "annotations without a size: the picture's taken"
CLIPPED = "boxes up to 1 pixel outside their picture: clipped"
CUT = "boxes that reach further outside their picture: clipped"
POLYGONS = "polygons: their boxes taken"
TWICE = "objects marked twice, same class and box: VOC's metric finds one of them; remove the other"
EMPTY = "objects with an empty box: left out"
NOT_CHOSEN = "objects of other classes than --classes: left out"
UNLABELLED = "pictures without an annotation: left out"

# What is left out up to --max-left-out.
PICTURE, ANNOTATION = "pictures that are missing or unreadable", "annotations that cannot be used"
OBJECT, OUTSIDE = "objects whose values cannot be used", "boxes outside their picture"
UNKNOWN = "objects of unknown classes"
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Unusable(UserError):
    """A fault of one picture or object; `kind` is what is counted if it is left out."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Findings:
    """What was repaired and left out while a set was read.

    Attributes:
        max_left_out: How many faulty pictures and objects are left out; one more is an error.
        faults: A line for each of them.
        left_out: Their numbers by kind.
        repairs: Numbers of repairs by kind.
        ignored: Numbers of what a user or the format wants left out; not bounded.
    """

    def __init__(self, max_left_out: int = 0) -> None:
        self.max_left_out = max_left_out
        self.faults: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()

    def leave_out(self, error: UserError, kind: str) -> None:
        """Count a picture or object that cannot be used; `kind` if the error does not say it."""
        self.faults.append(str(error))
        self.left_out[error.kind if isinstance(error, Unusable) else kind] += 1

    @contextlib.contextmanager
    def leaving_out(self, kind: str) -> Iterator[None]:
        """Leave out what is refused within, see `leave_out`."""
        try:
            yield
        except UserError as error:
            self.leave_out(error, kind)

    def usable(
        self, kind: str, items: Iterable[_Item], read: Callable[[_Item], _Made]
    ) -> tuple[_Made, ...]:
        """What is read of each item; items that are refused are left out, see `leave_out`."""
        made = []
        for item in items:
            with self.leaving_out(kind):
                made.append(read(item))
        return tuple(made)

    def lines(self) -> list[str]:
        """The first ten faults, and how many more there are."""
        more = len(self.faults) - MAX_FAULTS
        return [*self.faults[:MAX_FAULTS], *[f"and {more} more"] * (more > 0)]

    def raise_faults(self) -> None:
        """Refuse a set in which too much must be left out.

        Raises:
            UserError: With a line for each of up to ten faults.
        """
        count, lines = len(self.faults), self.lines()
        if count > self.max_left_out:
            what = "leaves it out" if count == 1 else f"leaves out all {count}"
            raise UserError("\n".join(lines) + f" (--max-left-out {count} {what})")

    def all_left_out(self) -> dict[str, int]:
        """Numbers by kind of everything that was left out, bounded or not."""
        return dict(self.ignored + self.left_out)


@dataclass(frozen=True)
class Frame:
    """A picture as its boxes see it.

    Attributes:
        width: Of the upright picture.
        height: Of the upright picture.
        orientation: EXIF's number, by which boxes turn; 1: they are upright.
    """

    width: int
    height: int
    orientation: int = 1

    @property
    def annotated_size(self) -> tuple[int, int]:
        """Width and height of the picture on which the boxes were drawn."""
        is_swapped = self.orientation >= 5
        return (self.height, self.width) if is_swapped else (self.width, self.height)


def read_frame(
    file: Path, size: tuple[float, float] | None, exif: str, where: object, findings: Findings
) -> Frame:
    """Compare a picture with the size that its annotation gives.

    Args:
        file: The picture; its header is read.
        size: Width and height in the annotation; zeros: not given. None: of a format that has none.
        exif: See `SetChoice.exif`.
        where: The annotation, for messages.
        findings: Repairs are counted here.

    Raises:
        UserError: If the picture is none, or has another size.
    """
    try:
        shape = read_shape(file)
    except BadPicture as error:
        raise Unusable(PICTURE, f"{error}; replace the picture") from error
    upright, stored = (shape.width, shape.height), shape.stored_size[::-1]
    orientation = shape.orientation
    if size is None:
        if orientation > 1:
            findings.repairs[TURNED if exif == "stored" else UPRIGHT] += 1
        return Frame(*upright, orientation if exif == "stored" else 1)
    if not any(size):
        findings.repairs[NO_SIZE] += 1
    allowed = {upright, stored} if exif == "auto" else {stored}
    if any(size) and size not in allowed:
        real = " or ".join(f"{width} x {height}" for width, height in sorted(allowed))
        turned = f" (EXIF orientation {orientation})" if orientation > 1 else ""
        raise UserError(
            f"{where}: its size is {size[0]:g} x {size[1]:g} pixels, but {file.name} has {real}"
            f"{turned}; correct the size and the boxes"
        )
    if orientation == 1:
        return Frame(*upright)
    if exif == "stored" or (any(size) and size != upright):
        findings.repairs[TURNED] += 1
        return Frame(*upright, orientation)
    if not any(size) or upright == stored:
        findings.repairs[AMBIGUOUS] += 1
    return Frame(*upright)


def placed(box: Box, frame: Frame, where: str, findings: Findings, *, clips: bool = True) -> Box:
    """A box on the upright picture, inside it.

    Args:
        box: (x0, y0, x1, y1) in continuous pixel coordinates of the annotation, finite.
        frame: The picture.
        where: Picture and object, for messages.
        findings: Repairs are counted here.
        clips: Whether what lies outside is cut off; else a pixel outside stays, more is refused.

    Raises:
        UserError: If it lies outside or nearly so, or is empty.
    """
    width, height = frame.annotated_size
    x0, y0, x1, y1 = box
    over = max(-x0, -y0, x1 - width, y1 - height)
    clipped = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    sides = clipped[2] - clipped[0], clipped[3] - clipped[1]
    is_inside = min(sides) > 0
    if is_inside and over > _BEYOND:  # shares, so that nothing overflows
        inside = sides[0] / (x1 - x0) * (sides[1] / (y1 - y0))
        is_inside = clips and inside >= _LEAST_INSIDE
    if not is_inside:
        raise Unusable(
            OUTSIDE, f"{where} lies outside the picture of {width} x {height} pixels; clip it"
        )
    if over > 0 and clips:
        findings.repairs[CLIPPED if over <= _BEYOND else CUT] += 1
        box = clipped
    return turned(box, frame)


def turned(box: Box, frame: Frame) -> Box:
    """A box of the stored picture on the upright one (EXIF 2.3, tag Orientation)."""
    x0, y0, x1, y1 = box
    if frame.orientation >= 5:
        x0, y0, x1, y1 = y0, x0, y1, x1
    if frame.orientation in MIRRORED:
        x0, x1 = frame.width - x1, frame.width - x0
    if frame.orientation in UPSIDE_DOWN:
        y0, y1 = frame.height - y1, frame.height - y0
    return x0, y0, x1, y1


def find_file(path: Path) -> Path | None:
    """A file, also if its name has accents composed otherwise (NFC, NFD); None if there is none."""
    names = (path.name, *(unicodedata.normalize(form, path.name) for form in ("NFC", "NFD")))
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # too long, holds a zero byte
            if (file := path.with_name(name)).is_file():
                return file
    return None


def composed(text: str) -> str:
    """A name with its accents composed, as lists and files come from different systems."""
    return unicodedata.normalize("NFC", text)


def leads_out(name: str) -> bool:
    """Whether a name of a list or an annotation is no path below a folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not path.parts


class FolderFiles:
    """The pictures below a folder, the files of one suffix that annotate them, and the others.

    Paths are relative to the folder.
    """

    def __init__(self, root: Path, suffix: str) -> None:
        """List the folder once."""
        self.root = root
        self.pictures: list[PurePosixPath] = []
        self.annotations: list[PurePosixPath] = []
        self.others: list[PurePosixPath] = []
        for file in walk(root):
            path = PurePosixPath(file.relative_to(root).as_posix())
            if path.suffix.lower() in PICTURE_SUFFIXES:
                self.pictures.append(path)
            elif path.suffix.lower() == suffix:
                self.annotations.append(path)
            else:
                self.others.append(path)
        self._folders = {picture.parent for picture in self.pictures}
        self._by_name: defaultdict[str, list[PurePosixPath]] = defaultdict(list)
        for picture in self.pictures:
            for key in (picture.stem, picture.name):
                self._by_name[composed(key)].append(picture)

    def picture_of(self, annotation: PurePosixPath, told: str = "") -> list[PurePosixPath]:
        """The pictures that an annotation can belong to; one if it is clear.

        Args:
            annotation: a/b.xml: b.jpg in the same folder, or the nearest if that has no pictures.
            told: File name in the annotation; it decides between pictures, or is all there is.
        """
        told = told.replace("\\", "/").rpartition("/")[2].strip()
        named = [self._by_name.get(composed(name), []) for name in (annotation.stem, told)]
        if annotation.parent in self._folders:
            named = [[x for x in own if x.parent == annotation.parent] for own in named]
        named = named[0] or named[1]

        def likeness(picture: PurePosixPath) -> tuple[int, bool]:
            return (
                num_common(picture.parts[:-1], annotation.parts[:-1]),
                composed(picture.name) == composed(told),
            )

        best = max(map(likeness, named), default=None)
        return [picture for picture in dict.fromkeys(named) if likeness(picture) == best]


def num_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """How many folders two paths share at their beginning, and at their end after these."""
    start = _num_equal(a, b)
    return start + _num_equal(a[start:][::-1], b[start:][::-1])


def _num_equal(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """How many parts are equal before the first two that differ."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def written_number(text: str) -> float:
    """Digits as float; NaN for what is none, also for 1_000."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def number(value: Any) -> float:
    """A JSON number as float; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
