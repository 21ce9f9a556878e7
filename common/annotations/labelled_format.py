"""Labelled data sets of any format: recognised, read and checked before any work.

A format is one module of `common/annotations/formats`; its name on a command line is the name of
the module.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from common.annotations.record import LabelledSet, SetChoice
from common.errors import UserError
from common.registry import Registry


class LabelledFormat(ABC):
    """How one kind of tools stores labelled pictures."""

    holds: ClassVar[str]  # what a folder of this format holds, for messages

    @classmethod
    @abstractmethod
    def recognises(cls, root: Path) -> bool:
        """Whether a folder looks like this format; reads no annotation."""

    @classmethod
    @abstractmethod
    def read(cls, root: Path, choice: SetChoice) -> LabelledSet:
        """Read and check every annotation of the chosen lists.

        Raises:
            UserError: For what is wrong with the folder or the choice.
        """


FORMATS = Registry("common.annotations.formats", LabelledFormat)


def read_set(root: Path, choice: SetChoice | None = None) -> LabelledSet:
    """Read and check a labelled data set of any format.

    Args:
        root: Its folder.
        choice: Format, lists, classes and metric; default: what the set itself says.

    Raises:
        UserError: If the folder is of no format or of several, or something in it is wrong.
    """
    root, choice = Path(root), choice or SetChoice()
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; give a data set made by tools/make_dataset.py, a VOC devkit "
            "or a COCO folder"
        )
    names = FORMATS.names() if choice.format is None else [choice.format]
    matching = [name for name in names if FORMATS[name].recognises(root)]
    if not matching:
        listed = "; ".join(f"{name}: {FORMATS[name].holds}" for name in names)
        raise UserError(f"{root}: holds no labelled set; give a folder with one ({listed})")
    if len(matching) > 1:
        raise UserError(f"{root}: looks like {' and '.join(matching)}; choose one with --format")
    return FORMATS[matching[0]].read(root, choice)


def check_same_classes(root: Path, own: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a set whose classes are not those that are needed, in any order.

    Raises:
        UserError: Naming the differences.
    """
    unknown, missing = sorted(set(own) - set(needed)), sorted(set(needed) - set(own))
    if unknown or missing:
        raise UserError(
            f"{root}: its class names are not {', '.join(needed)}"
            + (f"; only in the set: {', '.join(unknown)}" if unknown else "")
            + (f"; missing in the set: {', '.join(missing)}" if missing else "")
            + "; rename the classes in the annotations, or choose a set with the same ones"
        )
