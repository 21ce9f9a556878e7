"""From the bytes of a picture to uint8 RGB pixels: exact, or fast for training.

One decision for all programs. Grey, palette, CMYK and 16-bit pictures become 8-bit RGB;
transparency is dropped, not composed; an EXIF orientation is not applied.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # 10,000 x 10,000; a larger picture is taken for a decompression bomb
Encoded = bytes | memoryview  # a picture in its file format
_FOUR_COLOURS = ("CMYK", "YCCK")  # Pillow knows which of them are inverted
_HUFFMAN_FRAMES = (0xC0, 0xC1)  # sequential, whose rows follow each other in the file
_TABLES = (0xC4, 0xC8, 0xCC)  # markers among those of frames that are none
_SCAN, _END, _RESTARTS = 0xDA, 0xD9, 0xDD
_BLOCKS = 16  # rows that are decoded together in most files
_LEFT_OVER = "extraneous bytes before marker 0xd9"  # libjpeg, of data between the rows and the end


class BadPicture(ValueError):
    """A picture that cannot be used; the message names it and the reason."""


def decode(data: Encoded, *, where: str) -> np.ndarray:
    """Decode JPEG, PNG, WebP and whatever else Pillow reads.

    Args:
        data: The encoded picture.
        where: What to call the picture in an error.
    Returns:
        uint8 [height, width, 3], RGB, contiguous.
    Raises:
        BadPicture: If the picture does not decode, is cut short, or is larger than MAX_PIXELS.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(int(width), int(height), where)
            if colorspace not in _FOUR_COLOURS:
                return simplejpeg.decode_jpeg(data, "RGB")  # accurate DCT, as Pillow's
        except BadPicture:
            raise
        except ValueError:
            pass  # damaged a little or a lot: Pillow forgives stray bytes, but not a missing end
        return _decode_pillow(data, where)
    _check_size(*_size(io.BytesIO(data), where), where)
    # The formats in which OpenCV is faster than Pillow and agrees with it: PNG and WebP.
    if data[:8] == b"\x89PNG\r\n\x1a\n" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        import cv2  # so that a command line answers --help without it

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # Pillow says more
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None:
            return image
    return _decode_pillow(data, where)


@dataclass(frozen=True)
class Header:
    """What a picture's header says.

    Attributes:
        height: In pixels.
        width: In pixels.
        is_fast: True for JPEGs that libjpeg-turbo can turn into RGB: grey and colour, not CMYK.
    """

    height: int
    width: int
    is_fast: bool


def read_header(data: Encoded, *, where: str) -> Header:
    """Size of a picture without decoding it.

    Args:
        data: The encoded picture.
        where: What to call the picture in an error.
    Raises:
        BadPicture: If there is no header, or it states more than MAX_PIXELS pixels.
    """
    is_fast = False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        is_fast = colorspace not in _FOUR_COLOURS
    except ValueError:  # another format, or damaged
        width, height = _size(io.BytesIO(data), where)
    _check_size(int(width), int(height), where)
    return Header(int(height), int(width), is_fast)


def decode_fast(
    data: Encoded, header: Header, reduction: int, *, where: str, num_rows: int | None = None
) -> tuple[np.ndarray, int]:
    """Decode for training: JPEGs with libjpeg-turbo's fastest settings, and smaller on request.

    The fast DCT and the unsmoothed chroma cost little; docs/augmentation.md gives the figures.
    Other formats are decoded whole, as `decode` does.

    Args:
        data: The encoded picture.
        header: From `read_header`.
        reduction: 1, 2, 4 or 8: JPEGs come out so many times smaller, sides rounded up.
        where: What to call the picture in an error.
        num_rows: How many rows of the whole picture are needed, from the top; all if None.
    Returns:
        uint8 [h, w, 3], RGB, at least the rows needed, and how many times smaller it is:
        `reduction`, or 1.
    Raises:
        BadPicture: If the picture does not decode or is cut short.
    """
    if header.is_fast:
        size = (header.height, header.width)
        if num_rows is not None:
            image = decode_upper_rows(data, size, num_rows, reduction)
            if image is not None:
                return image, reduction
        try:
            return decode_fastest(data, size, reduction), reduction
        except ValueError:
            pass  # damaged a little or a lot: Pillow decides
    return decode(data, where=where), 1


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height that a picture file's header states; an EXIF orientation is not applied.

    Raises:
        BadPicture: If it is no picture.
    """
    try:
        with open(path, "rb") as file:
            return _size(file, str(path))
    except OSError as error:
        raise BadPicture(f"{path}: cannot be read ({error.strerror or error})") from error


def _size(file: IO[bytes], where: str) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as picture:
                return picture.size
        except Image.DecompressionBombError as error:
            raise BadPicture(f"{where}: {error}") from error
        except Exception as error:  # Pillow raises many kinds, OSError and SyntaxError among them
            raise BadPicture(f"{where}: does not decode, no picture ({_short(error)})") from error


def _decode_pillow(data: Encoded, where: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as picture:
                if picture.mode.startswith("I;16"):
                    return np.repeat(
                        (np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2
                    )
                return np.array(picture.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds, OSError and SyntaxError among them
        raise BadPicture(f"{where}: does not decode ({_short(error)})") from error


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise BadPicture(
            f"{where}: {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded: "
            "shrink the picture"
        )
    if width < 1 or height < 1:
        raise BadPicture(f"{where}: {width} x {height} pixels")


def _short(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


# -- JPEGs fast: the whole picture, or its upper rows alone ----------------------------------------


def decode_fastest(
    data: bytes | bytearray | memoryview,
    size: tuple[int, int],
    reduction: int,
    buffer: np.ndarray | None = None,
) -> np.ndarray:
    """Decode a whole JPEG with the fast DCT and the unsmoothed chroma.

    Args:
        data: A JPEG that libjpeg-turbo can turn into RGB.
        size: Height and width in pixels, from its header.
        reduction: 1, 2, 4 or 8: decode so many times smaller, sides rounded up.
        buffer: Where to write the pixels; new memory if none.
    Returns:
        uint8 [h, w, 3], RGB.
    Raises:
        ValueError: If libjpeg warns or fails; what could be decoded is in the buffer.
    """
    height, width = size
    return simplejpeg.decode_jpeg(
        data,
        "RGB",
        fastdct=True,
        fastupsample=True,
        min_height=-(-height // reduction),
        min_width=-(-width // reduction),
        min_factor=reduction,
        buffer=buffer,
    )


def decode_upper_rows(
    data: bytes | bytearray | memoryview, size: tuple[int, int], num_rows: int, reduction: int
) -> np.ndarray | None:
    """Decode the upper rows by a copy whose header gives a smaller height.

    libjpeg stops after these rows, looks for the end marker and warns of what it passed over. That
    warning must be the first and only one: a file cut short anywhere, or damaged in these rows,
    gives another and is left to the caller, who decodes the whole.

    Args:
        data: A JPEG that libjpeg-turbo can turn into RGB.
        size: Height and width in pixels, from its header.
        num_rows: Rows needed.
        reduction: 1, 2, 4 or 8: decode so many times smaller, sides rounded up.
    Returns:
        uint8 [h, w, 3], RGB: at least the rows needed, equal to those of `decode_fastest`. None if
        nothing can be saved, or the file is not such that its rows can be decoded alone.
    """
    height, width = size
    num_rows = -(-num_rows // _BLOCKS) * _BLOCKS
    at = _place_of_height(data) if num_rows < height else None
    if at is None or int.from_bytes(data[at : at + 2], "big") != height:
        return None
    lower = bytearray(data)
    lower[at : at + 2] = num_rows.to_bytes(2, "big")
    image = np.empty((-(-num_rows // reduction), -(-width // reduction), 3), np.uint8)
    try:
        decode_fastest(lower, (num_rows, width), reduction, image)
    except ValueError as error:  # raised after the rows were written
        return image if str(error).endswith(_LEFT_OVER) else None
    return None


def _place_of_height(data: bytes | bytearray | memoryview) -> int | None:
    """Where the header has the height; None unless all rows follow each other in one scan.

    So progressive files, those of several scans, and those with restart markers are left out: what
    libjpeg says of the data behind the rows would then say too little.
    """
    at, place, num_colours = 2, None, 0
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _HUFFMAN_FRAMES:
            place, num_colours = at + 5, data[at + 9]
        elif marker == _SCAN:
            is_one_scan = place is not None and data[at + 4] == num_colours
            return place if is_one_scan else None
        elif marker in (_RESTARTS, _END) or (0xC0 <= marker <= 0xCF and marker not in _TABLES):
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
