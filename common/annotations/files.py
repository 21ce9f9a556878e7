"""Pictures and annotations at any place below a folder, and which belong together."""

from collections import defaultdict
from pathlib import Path, PurePosixPath

from common.annotations.checks import composed
from common.files import walk
from common.pictures import PICTURE_SUFFIXES


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
