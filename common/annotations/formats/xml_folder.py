"""Pictures and VOC's XML anywhere in a folder: LabelImg, Roboflow's and Label Studio's exports.

ROOT/a.jpg and ROOT/a.xml, at any depth, or in folders of their own. An annotation belongs to the
picture of its name in the same folder; if that holds no pictures, in the nearest one. Folders
called train, valid or val, and test, are lists.
"""

from pathlib import Path, PurePosixPath

from common.annotations import checks, record
from common.annotations.formats import voc
from common.annotations.lists import assemble, by_role, list_reader
from common.errors import UserError
from common.files import walk

HOLDS = "pictures and VOC's XML files, side by side or in folders of their own"


def recognises(root: Path) -> bool:
    """Whether there is an XML file, and no VOC devkit."""
    return not voc.recognises(root) and any(x.suffix.lower() == ".xml" for x in walk(root))


def read(root: Path, choice: record.SetChoice) -> record.LabelledSet:
    """Read and check the chosen lists; see `record.FORMATS`.

    Classes are those that occur, sorted, unless the choice says them. Pictures without an
    annotation are left out: nobody has labelled them yet.
    """
    files, findings = checks.FolderFiles(root, ".xml"), checks.Findings(choice.max_left_out)
    pairs: dict[str, tuple[PurePosixPath, voc.Parsed]] = {}
    for path in files.annotations:
        with findings.leaving_out(checks.ANNOTATION):
            parsed = voc.parse_annotation(root / path)
            found = files.picture_of(path, parsed[1].findtext("filename") or "")
            picture = _one(root / path, found)
            if picture in pairs:
                raise UserError(f"{root / path}: is of {picture}, as {pairs[picture][0]} is; "
                                "keep one of them")  # fmt: skip
            pairs[picture] = path, parsed
    if num_without := len(files.pictures) - len(pairs):
        findings.ignored[checks.UNLABELLED] += num_without
    names = {x: (*PurePosixPath(x).parts[:-1], *path.parts[:-1])
             for x, (path, _) in sorted(pairs.items())}  # fmt: skip
    lists = by_role(names, findings)

    def read_picture(name: str) -> record.PictureRecord:
        path, parsed = pairs[name]
        reading = {"exif": choice.exif, "findings": findings}
        return voc.read_objects(root / path, parsed, root / name, name, None, **reading)

    load = list_reader(root, lists, read_picture, findings)
    return assemble(root, list(lists), load, choice, findings)


def _one(annotation: Path, pictures: list[PurePosixPath]) -> str:
    """The picture of an annotation.

    Raises:
        UserError: If there is none, or several.
    """
    if len(pictures) == 1:
        return pictures[0].as_posix()
    fault = f"its picture {annotation.stem} is not there; add it"
    if pictures:
        fault = f"may be of each of {', '.join(map(str, pictures[:4]))}; keep one of them"
    raise checks.Unusable(checks.PICTURE, f"{annotation}: {fault}")
