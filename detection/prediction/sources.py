"""Pictures to predict on: files, folders, globs and the frames of videos, opened by content."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.annotations.write import safe_name
from common.errors import UserError, printable
from common.files import open_regular, read_regular
from common.picture_files import SourceFile, in_threads
from common.pictures import MAX_FILE_BYTES, PICTURE_SUFFIXES, BadPicture, decode, read_shape

_SUFFIXES = PICTURE_SUFFIXES | {".heic", ".heif"}
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # in a ftyp box
_VIDEO_STARTS = (b"\x1aE\xdf\xa3", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"OggS", b"FLV", b"0&\xb2u")


@dataclass(frozen=True)
class OpenedPicture:
    """A picture, upright.

    Attributes:
        path: Of its file.
        pixels: uint8 [height, width, 3], RGB.
        data: The file's bytes; None for a frame.
        frame: Number in a video, from 0; None for a file.
    """

    path: Path
    pixels: np.ndarray
    data: bytes | None = None
    frame: int | None = None


Opened = OpenedPicture | BadPicture | None
"""None: a file in a folder that is no picture and does not claim to be one."""


def holds_predictions(folder: Path) -> bool:
    """Whether a folder is what tools/predict.py wrote; its pictures have boxes drawn on them."""
    return (folder / "predictions.json").is_file()


def open_all(files: Sequence[SourceFile], every: int, num_threads: int) -> Iterator[Opened]:
    """Open files in their order, a few ahead in threads.

    Args:
        files: From `common.picture_files.find_files`.
        every: Take every so many frames of a video.
        num_threads: That decode.

    Yields:
        One for each file, at least one for each video.
    """
    for opened in in_threads(_open, files, num_threads):
        if isinstance(opened, Path):
            yield from _frames(opened, every)
        else:
            yield opened


def _open(file: SourceFile) -> Opened | Path:
    """What a file holds; the path of a video, whose frames are read one after another."""
    path = file.path
    try:
        with open_regular(path) as stream:
            start = stream.read(16)
        if _is_video(start):
            return path
        try:
            read_shape(path)
        except BadPicture:
            if file.is_named or path.suffix.lower() in _SUFFIXES:
                raise
            return None
        data = read_regular(path, MAX_FILE_BYTES)
        return OpenedPicture(path, decode(data, where=str(path)), data)
    except OSError as error:
        return BadPicture(f"{path}: cannot be read ({error.strerror or error})")
    except (BadPicture, UserError) as error:
        return BadPicture(str(error))


def _is_video(start: bytes) -> bool:
    """Whether a file of these first bytes is a video: MP4, MOV, AVI, Matroska, WebM, MPEG, .."""
    if start[4:8] == b"ftyp":
        return start[8:12] not in _PICTURE_BRANDS
    is_avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    return is_avi or start.startswith(_VIDEO_STARTS)


def _frames(path: Path, every: int) -> Iterator[Opened]:
    """Every so many frames of a video, turned as its file says."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    video, number = cv2.VideoCapture(os.fspath(path)), 0
    try:
        while video.grab():
            if number % every == 0:
                is_whole, frame = video.retrieve()
                if is_whole:
                    pixels = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                    yield OpenedPicture(path, pixels, frame=number)
                else:
                    yield BadPicture(f"{path}: frame {number} does not decode")
            number += 1
        expected = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        video.release()
    # Files without an index state no number, or a negative one; the others may be off by a few.
    if number == 0 or number < 0.95 * expected - 5:
        stated = f" of {expected}" if expected > 0 else ""
        yield BadPicture(f"{path}: a video of which {number}{stated} frames decode; repair it")


def name_of(picture: OpenedPicture, taken: set[str]) -> str:
    """A file name without suffix for what is written of a picture; no two are the same.

    A frame is VIDEO-000123.

    Args:
        picture: The picture.
        taken: Names given so far, in lower case; the new one is added.
    """
    frame = "" if picture.frame is None else f"-{picture.frame:06d}"
    name = safe_name(f"{printable(picture.path.stem)[:120]}{frame}", taken)
    taken.add(name.lower())
    return name
