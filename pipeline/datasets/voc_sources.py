"""Where a VOC set comes from: the official tars, or folders that hold what they hold."""

import hashlib
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from common.errors import UserError

# MD5 of the official archives, as torchvision lists them.
OFFICIAL_TARS = {
    "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
    "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
    "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
}
OFFICIAL_NAMES = ", ".join(OFFICIAL_TARS)
_PARTS = ("Annotations", "JPEGImages", "ImageSets/Main")
_YEAR = re.compile(r"VOC\d{4}")
_CHUNK_BYTES = 1 << 20


def take(source: Path, devkit: Path) -> list[str]:
    """Put the annotations, pictures and lists of a source into a devkit.

    Args:
        source: A tar (may be compressed), or a folder with VOC2007 or the like at most three deep,
            or a VOC folder itself (then it becomes VOC2007 unless its name says otherwise).
        devkit: Files go to devkit/VOC2007/JPEGImages and so on; those of a folder as hard links
            where the file system has them.

    Returns:
        Names of the VOC folders that were found.

    Raises:
        UserError: If the source is missing, damaged, holds no VOC set, or a file that differs from
            one of the same name that is there already.
    """
    if source.is_dir():
        return _take_folder(source, devkit)
    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; give the official tars ({OFFICIAL_NAMES}) or "
            "folders that hold VOC2007 and VOC2012"
        )
    return _take_tar(source, devkit)


def damaged_archive(source: Path) -> str | None:
    """What is wrong with an archive that has an official name; None if nothing, or no such name."""
    expected = OFFICIAL_TARS.get(source.name)
    if expected is None or not source.is_file():
        return None
    digest = hashlib.md5(usedforsecurity=False)
    with open(source, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() == expected:
        return None
    return (
        f"{source}: is not the official archive of that name (MD5 {digest.hexdigest()} instead of "
        f"{expected}, {source.stat().st_size} bytes); download it again"
    )


def _take_tar(source: Path, devkit: Path) -> list[str]:
    found: set[str] = set()
    seen: list[str] = []
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                if len(seen) < 5:
                    seen.append(member.name)
                place = _place(PurePosixPath(member.name))
                if place is None or member.isdir():
                    continue
                if not member.isreg() or ".." in place.parts:
                    raise UserError(
                        f"{source}: {member.name} is a link or a device, or points outside the "
                        "archive; the official archives hold no such thing: this is none of them"
                    )
                found.add(place.parts[0])
                if (devkit / place).exists():
                    file = archive.extractfile(member)
                    assert file is not None
                    _check_same(devkit / place, file.read(), source)
                    continue
                named = member.replace(name=str(place), deep=False)
                archive.extract(named, devkit, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(_unreadable(source, error)) from error
    if not found:
        raise UserError(f"{source}: {_why_no_voc(seen)}")
    return sorted(found)


def _place(name: PurePosixPath) -> PurePosixPath | None:
    """VOC2007/JPEGImages/x.jpg of an archive's member, however deep; None if it is not needed."""
    parts = name.parts
    years = [i for i, part in enumerate(parts) if _YEAR.fullmatch(part)]
    if not years:
        return None
    place = PurePosixPath(*parts[years[0] :])
    inner = "/".join(place.parts[1:])
    if place.name.startswith("._") or not inner.startswith(tuple(f"{p}/" for p in _PARTS)):
        return None
    return place


def _unreadable(source: Path, error: Exception) -> str:
    if source.suffix.lower() == ".zip":
        return f"{source}: is a zip; unpack it and give the folder"
    return (
        f"{source}: cannot be read to its end as a tar ({error}); it is cut short or no tar: "
        "download it again, or give the unpacked folder"
    )


def _why_no_voc(names: list[str]) -> str:
    """What is there instead of a VOC set."""
    shown = ", ".join(names[:5]) or "nothing"
    if any("VOCcode" in name for name in names):
        return f"is the devkit's program code, without pictures; give {OFFICIAL_NAMES}"
    if any(name.endswith(".json") for name in names) or any("instances_" in n for n in names):
        return f"looks like a COCO set (found {shown}), not VOC: one XML file a picture is needed"
    return (
        f"holds no VOC set (found {shown}); there must be a folder VOC2007 or VOC2012 with "
        "JPEGImages, Annotations and ImageSets/Main"
    )


def _take_folder(source: Path, devkit: Path) -> list[str]:
    years = _year_folders(source)
    if not years:
        names = sorted(
            str(path.relative_to(source)) for path in [*source.glob("*"), *source.glob("*/*.json")]
        )
        tars = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
        if tars:
            raise UserError(
                f"{source}: holds archives, not an unpacked set; give them by name: "
                + " ".join(str(source / name) for name in tars)
            )
        raise UserError(f"{source}: {_why_no_voc(names)}")
    for name, folder in years:
        for part in _PARTS:
            for file in _files(folder / part):
                place = devkit / name / part / file.relative_to(folder / part)
                if place.exists():
                    _check_same(place, file.read_bytes(), source)
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(file, place)
    return sorted({name for name, _ in years})


def _year_folders(source: Path) -> list[tuple[str, Path]]:
    """(VOC2007, path) of every VOC folder at or below a folder."""
    if (source / "JPEGImages").is_dir() or (source / "Annotations").is_dir():
        name = source.resolve().name
        return [(name if _YEAR.fullmatch(name) else "VOC2007", source)]
    found = []
    for pattern in ("VOC*", "*/VOC*", "*/*/VOC*"):
        found += [
            (path.name, path)
            for path in sorted(source.glob(pattern))
            if _YEAR.fullmatch(path.name) and path.is_dir()
        ]
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Plain files directly in a folder; hidden ones are left out."""
    if folder.is_dir():
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_file() and not entry.name.startswith("."):
                yield Path(entry.path)


def _link_or_copy(file: Path, place: Path) -> None:
    try:
        if file.is_symlink():
            raise OSError("the link, not the file, would be linked")
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def _check_same(place: Path, content: bytes, source: Path) -> None:
    """A file may come twice, if it is the same."""
    if place.read_bytes() != content:
        raise UserError(
            f"{source}: its {'/'.join(place.parts[-3:])} differs from the one that an earlier "
            "source has brought; the sources are of different sets or editions: give one of them"
        )
