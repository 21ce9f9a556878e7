"""From the bytes of a picture to uint8 RGB pixels: exact, or fast for training.

One decision for all programs. Grey, palette, CMYK and 16-bit pictures become 8-bit RGB; those of
32 bits are refused, since nothing says which value is white. Transparency is dropped, not composed;
of several frames or pages the first is taken. Pictures are upright: turned as their EXIF
orientation says, as browsers and Pillow's `ImageOps.exif_transpose` do; one that is damaged or
unknown counts as 1. What a file may cost, in time and memory, is bounded before it is decoded.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from common.errors import UserError
from common.files import open_regular, read_or_refuse

MAX_PIXELS = 100_000_000  # 10,000 x 10,000; a larger picture is taken for a decompression bomb
MAX_FILE_BYTES = 2**29  # far above any picture of MAX_PIXELS pixels that is compressed
Encoded = bytes | memoryview  # a picture in its file format
_FOUR_COLOURS = ("CMYK", "YCCK")  # Pillow knows which of them are inverted
# What is read, whatever the suffix says. Others start programs (EPS) or are known by suffix alone.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000")
_FIRST_BYTES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8|BM....\0\0\0\0|P[1-6]\s+[0-9#]|II[*+]\0"
    rb"|MM\0[*+]|....ftypavi[fs]|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
PICTURE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm"),
        *(".pnm", ".tif", ".tiff", ".avif", ".jp2"),
    }
)
_OTHER_SUFFIXES = (".xml", ".txt", ".json", ".csv", ".cls", ".html")  # not worth to open a file
_HEAVY = ("AVIF", "JPEG2000")  # take twice the memory of others while they are decoded
_HUFFMAN_FRAMES = (0xC0, 0xC1)  # sequential, whose rows follow each other in the file
# Other frames, the end, restarts: markers of files whose upper rows are not decoded alone.
_WHOLE_ONLY = frozenset(b"\xc2\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf\xd9\xdd")
_SCAN = 0xDA
_SCAN_START, _PADDING = b"\xff\xda", re.compile(rb"\xff+")
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_APP1 = 0xE1  # holds EXIF or XMP
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([0-9])')  # Pillow's pattern
_ORIENTATION = 0x112  # EXIF's tag
_INTEGERS = {3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4}  # EXIF types of whole numbers, their bytes
MIRRORED = (2, 3, 6, 7)  # orientations that turn columns round, after a change of places
UPSIDE_DOWN = (3, 4, 7, 8)  # those that turn rows round
_USUAL_HEADER, _MAX_HEADER = 1 << 16, 1 << 24  # bytes before the pixels
_MAX_SCANS = 64  # of a JPEG; encoders write ten
_MAX_TEXTS, _MAX_VALUES = 100, 1 << 20  # compressed texts of a PNG; values of one TIFF field
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types
_BAND = 1 << 22  # pixels that Pillow converts at a time
_BLOCKS = 16  # rows that are decoded together in most files
_LEFT_OVER = "extraneous bytes before marker 0xd9"  # libjpeg, of data between the rows and the end


class BadPicture(ValueError):
    """A picture that cannot be used; the message names it and the reason."""


def read_file(path: str | Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        BadPicture: If it cannot be read, is empty, no plain file or larger than MAX_FILE_BYTES.
    """
    try:
        data = read_or_refuse(path, MAX_FILE_BYTES)
    except UserError as error:
        raise BadPicture(str(error)) from error
    if not data:
        raise BadPicture(f"{path}: is empty (0 bytes)")
    return data


def is_picture_file(path: Path) -> bool:
    """Whether a file is a picture by its suffix, or by its first bytes if that says nothing."""
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES or suffix in _OTHER_SUFFIXES:
        return suffix in PICTURE_SUFFIXES
    try:
        with open_regular(path) as file:
            return _FIRST_BYTES.match(file.read(16)) is not None
    except OSError:
        return False


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
    image, orientation = _decode_stored(data, where)
    return upright(image, orientation)


def from_pillow(picture: Image.Image, *, where: str) -> np.ndarray:
    """The pixels of a picture that Pillow has opened or made, by the rules of `decode`.

    Args:
        picture: Of any mode; it is loaded.
        where: What to call it in an error.
    Returns:
        uint8 [height, width, 3], RGB, upright.
    Raises:
        BadPicture: As `decode`.
    """
    _check_size(*picture.size, where)
    if fault := _fault_of(picture):
        raise BadPicture(f"{where}: {fault}; convert it to 8 bits")
    try:
        picture.load()
        return upright(_rgb(picture), _orientation_of(picture))
    except Exception as error:  # as many kinds as there are of damaged pictures
        raise BadPicture(f"{where}: does not decode ({_short(error)})") from error


def _decode_stored(data: Encoded, where: str) -> tuple[np.ndarray, int]:
    """As `decode`, but not upright: the pixels and the orientation that is to be applied."""
    if data[:2] == _JPEG:
        header = read_header(data, where=where)
        if header.is_fast:
            # Damaged a little or a lot: Pillow forgives stray bytes, but not a missing end.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(data, "RGB"), header.orientation  # accurate DCT
        return _decode_pillow(data, where), header.orientation
    _, orientation = _open_header(io.BytesIO(data), where)
    # The formats in which OpenCV is faster than Pillow and agrees with it: PNG and WebP.
    if data[:8] == _PNG or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        import cv2  # so that a command line answers --help without it

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # Pillow says more
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None:
            return image, orientation
    return _decode_pillow(data, where), orientation


@dataclass(frozen=True)
class Header:
    """What a picture's header says.

    Attributes:
        height: In pixels, upright.
        width: In pixels, upright.
        is_fast: True for JPEGs that libjpeg-turbo can turn into RGB: grey and colour, not CMYK.
        orientation: How the pixels of `decode_fast` are to be turned: EXIF's, from 1 to 8.
        height_at: Place of the height among the bytes of a JPEG whose upper rows can be decoded
            alone; None of others. Its rows follow each other in one scan without restart markers:
            else what libjpeg says of the data behind the rows would say too little.
    """

    height: int
    width: int
    is_fast: bool
    orientation: int = 1
    height_at: int | None = None

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of what `decode_fast` gives."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    def stored_box(self, box: Sequence[int]) -> tuple[int, int, int, int]:
        """Where a box of the upright picture lies in the stored one.

        Args:
            box: Top, left, height and width in pixels.
        """
        top, left, height, width = box
        if self.orientation in MIRRORED:
            left = self.width - left - width
        if self.orientation in UPSIDE_DOWN:
            top = self.height - top - height
        return (left, top, width, height) if self.orientation >= 5 else (top, left, height, width)


def read_header(data: Encoded, *, where: str) -> Header:
    """Size of a picture without decoding it.

    Args:
        data: The encoded picture; of a JPEG, the part before its pixels is enough.
        where: What to call the picture in an error.
    Raises:
        BadPicture: If there is no header, or it states more than MAX_PIXELS pixels.
    """
    if data[:2] != _JPEG:
        shape, orientation = _open_header(io.BytesIO(data), where)
        return Header(shape.height, shape.width, is_fast=False, orientation=orientation)
    (orientation, height_at), is_fast = _check_jpeg(data, where), False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        is_fast = colorspace not in _FOUR_COLOURS
    except ValueError:  # damaged
        shape, _ = _open_header(io.BytesIO(data), where)
        height, width = shape.stored_size
    _check_size(int(width), int(height), where)
    if orientation >= 5:
        height, width = width, height
    return Header(int(height), int(width), is_fast, orientation, height_at)


def decode_fast(
    data: Encoded, header: Header, reduction: int, *, where: str, num_rows: int | None = None
) -> tuple[np.ndarray, int]:
    """Decode for training: JPEGs with libjpeg-turbo's fastest settings, and smaller on request.

    The fast DCT and the unsmoothed chroma cost little; docs/augmentation.md gives the figures.
    Other formats are decoded whole. Pixels are as stored, so that a crop of the upright picture is
    `upright(image[stored_box], header.orientation)`, and only the crop is turned.

    Args:
        data: The encoded picture.
        header: From `read_header`.
        reduction: 1, 2, 4 or 8: JPEGs come out so many times smaller, sides rounded up.
        where: What to call the picture in an error.
        num_rows: How many rows of the stored picture are needed, from the top; all if None.
    Returns:
        uint8 [h, w, 3], RGB, at least the rows needed, and how many times smaller it is:
        `reduction`, or 1.
    Raises:
        BadPicture: If the picture does not decode or is cut short.
    """
    if header.is_fast:
        if num_rows is not None:
            image = decode_upper_rows(data, header, num_rows, reduction)
            if image is not None:
                return image, reduction
        with contextlib.suppress(ValueError):  # damaged a little or a lot: Pillow decides
            return decode_fastest(data, header.stored_size, reduction), reduction
    return _decode_stored(data, where)[0], 1


def fault_of(path: str | Path) -> str | None:
    """What is wrong with a picture file, None if nothing.

    All of its data is read, a JPEG at an eighth of its size.
    """
    try:
        data = read_file(path)
        decode_fast(data, read_header(data, where=str(path)), 8, where=str(path))
    except BadPicture as error:
        return str(error)
    return None


def read_shape(path: Path) -> Header:
    """Size of a picture file, from its header alone, and EXIF's orientation.

    Raises:
        BadPicture: If it is no picture, or states more than MAX_PIXELS pixels.
    """
    where = str(path)
    try:
        with open_regular(path) as file:
            head = file.read(_USUAL_HEADER)
            if head[:2] != _JPEG:
                file.seek(0)
                return _open_header(file, where)[0]
            if len(head) == _USUAL_HEADER and _header_of(head)[0] is None:
                head += file.read(_MAX_HEADER)
    except OSError as error:
        raise BadPicture(f"{path}: cannot be read ({error.strerror or error})") from error
    return read_header(head, where=where)


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels as an EXIF orientation says.

    Args:
        image: uint8 [h, w, 3]; a slice is fine.
        orientation: From 1 to 8.
    Returns:
        uint8 [h, w, 3], or [w, h, 3] from 5 on: the same array for 1, else a new one.
    """
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    rows = -1 if orientation in UPSIDE_DOWN else 1
    columns = -1 if orientation in MIRRORED else 1
    return np.ascontiguousarray(image[::rows, ::columns])


def _open_header(file: IO[bytes], where: str) -> tuple[Header, int]:
    """Shape by Pillow, and the orientation that its pixels still need: it turns TIFFs itself."""
    _check_tiff(file, where)
    exif = _check_png(file, where)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=_FORMATS) as picture:
                fault, is_heavy = _fault_of(picture), picture.format in _HEAVY
                is_heavy |= picture.format == "WEBP" and getattr(picture, "is_animated", False)
                width, height = picture.size
                if exif is not None:
                    picture.info["exif"] = exif
                is_tiff, orientation = picture.format == "TIFF", _orientation_of(picture)
                is_upright = is_tiff and _ORIENTATION in getattr(picture, "tag_v2", ())
        except Image.DecompressionBombError as error:
            raise BadPicture(f"{where}: {error}; shrink the picture") from error
        except Exception as error:  # Pillow raises many kinds, OSError and SyntaxError among them
            raise BadPicture(f"{where}: does not decode, no picture ({_short(error)})") from error
    _check_size(width, height, where, MAX_PIXELS // 2 if is_heavy else MAX_PIXELS)
    if fault:
        raise BadPicture(f"{where}: {fault}; convert it to 8 bits")
    if orientation >= 5 and not is_upright:
        width, height = height, width
    found = Header(height, width, is_fast=False, orientation=orientation)
    return found, 1 if is_tiff else orientation


def _fault_of(picture: Image.Image) -> str | None:
    """Why values cannot be turned into 8 bits; None if they can."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        return "has values of 32 bits, and nothing says which is white"
    if picture.mode.startswith("I;16") and isinstance(picture, TiffImageFile):
        bits, photometric = picture.tag_v2.get(258, (16,))[0], picture.tag_v2.get(262)
        if bits != 16 or photometric == 0:
            return f"has {bits}-bit values, 0 is {'white' if photometric == 0 else 'black'}"
    return None


def _orientation_of(picture: Image.Image) -> int:
    """EXIF's orientation, 1 if there is none or it is damaged; no pixel is decoded for it."""
    try:
        orientation = Image.Image.getexif(picture).get(_ORIENTATION)  # PNG's own decodes all
    except Exception:  # of damaged metadata: as many kinds as there are of damaged pictures
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _check_png(file: IO[bytes], where: str) -> bytes | None:
    """Bound what the chunks of a PNG cost.

    Returns:
        Its EXIF data, wherever they stand among the chunks: Pillow looks before the pixels alone.
    """
    file.seek(0)
    start = file.read(33)
    if len(start) < 33 or start[:8] != _PNG:
        return None
    width, height = (int.from_bytes(start[at : at + 4], "big") for at in (16, 20))
    bits = _CHANNELS.get(start[25], 4) * start[24]
    room = 2 * height * (1 + width * bits // 8) + (1 << 16)  # twice, for interlaced ones
    exif, num_texts = None, 0
    while len(start := file.read(8)) == 8 and start[4:] != b"IEND":
        length, kind = int.from_bytes(start[:4], "big"), start[4:]
        num_texts += kind in (b"zTXt", b"iTXt")
        room -= length if kind == b"IDAT" else 0
        is_long = length > _MAX_HEADER and kind not in (b"IDAT", b"fdAT")
        if is_long or num_texts > _MAX_TEXTS or room < 0:
            raise BadPicture(f"{where}: is a PNG of much more data than its pixels need")
        if kind == b"eXIf":
            exif = file.read(length)
            length = 0
        file.seek(length + 4, io.SEEK_CUR)
    return exif


def _check_tiff(file: IO[bytes], where: str) -> None:
    """Refuse a TIFF with lists that take Pillow gigabytes, such as places of a million strips."""
    file.seek(0)
    start = file.read(16)
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return
    order: Literal["little", "big"] = "little" if start[:2] == b"II" else "big"
    is_big = b"+" in start[:4]
    place, num_bytes, step = (start[8:], 8, 20) if is_big else (start[4:8], 2, 12)
    file.seek(min(int.from_bytes(place, order), MAX_FILE_BYTES))
    entries = file.read(step * min(65_535, int.from_bytes(file.read(num_bytes), order)))
    for at in range(0, len(entries) - step + 1, step):
        kind = int.from_bytes(entries[at + 2 : at + 4], order)
        count = int.from_bytes(entries[at + 4 : at + (12 if is_big else 8)], order)
        if count > _MAX_VALUES and kind not in (1, 2, 7):  # bytes and text
            raise BadPicture(f"{where}: is a TIFF with a field of {count:,} values")


def _decode_pillow(data: Encoded, where: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                _check_size(*picture.size, where)
                picture.load()
                return _rgb(picture)
    except BadPicture:
        raise
    except Exception as error:  # Pillow raises many kinds, OSError and SyntaxError among them
        raise BadPicture(f"{where}: does not decode ({_short(error)})") from error


def _rgb(picture: Image.Image) -> np.ndarray:
    """Pixels of a loaded picture, a band at a time."""
    width, height = picture.size
    image = np.empty((height, width, 3), np.uint8)
    step = max(1, _BAND // width)
    for top in range(0, height, step):
        rows = picture.crop((0, top, width, min(top + step, height)))
        if rows.mode.startswith("I"):
            image[top : top + step] = (np.asarray(rows) >> 8)[..., None]
        else:
            image[top : top + step] = np.asarray(rows.convert("RGB"))
    return image


def _check_size(width: int, height: int, where: str, most: int | None = None) -> None:
    most = MAX_PIXELS if most is None else most
    if width * height > most:
        raise BadPicture(
            f"{where}: {width} x {height} pixels, more than the {most:,} that are decoded: "
            "shrink the picture"
        )
    if width < 1 or height < 1:
        raise BadPicture(f"{where}: {width} x {height} pixels")


def _short(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


# -- the header of a JPEG: read from the bytes, since it must cost next to nothing ----------------


def _check_jpeg(data: Encoded, where: str) -> tuple[int, int | None]:
    """Bound what a JPEG costs.

    Returns:
        Its orientation, as `_orientation_of`, and `Header.height_at`.
    """
    end, is_one_scan, segments, height_at = _header_of(data)
    if (len(data) if end is None else end) >= _MAX_HEADER:
        raise BadPicture(f"{where}: more than {_MAX_HEADER:,} bytes of metadata; remove them")
    if not is_one_scan and bytes(data).count(_SCAN_START) > _MAX_SCANS:
        raise BadPicture(f"{where}: is a JPEG of more than {_MAX_SCANS} scans; save it anew")
    if not segments:
        return 1, height_at
    exif = b"".join(s[len(_EXIF) :] for s in segments if s.startswith(_EXIF))
    orientation = _exif_orientation(exif)
    if orientation is None:
        xmp = next((s for s in reversed(segments) if s.startswith(_XMP)), b"")
        match = _XMP_ORIENTATION.search(xmp)
        orientation = int(match[2]) if match else 1
    return orientation if 1 <= orientation <= 8 else 1, height_at


def _header_of(data: Encoded) -> tuple[int | None, bool, list[bytes], int | None]:
    """The part of a JPEG before its pixels.

    Returns:
        Where it ends, None if not in `data`; whether one scan has all pixels; its EXIF and XMP
        segments; and `Header.height_at`.
    """
    at, num_colours, segments, height_at, is_plain = 2, 0, [], None, True
    try:
        while data[at] == 0xFF and at < _MAX_HEADER:
            marker = data[at + 1]
            if padding := marker == 0xFF and _PADDING.match(data, at):
                at = padding.end() - 1
                continue
            if marker == _SCAN:
                is_one_scan = data[at + 4] == num_colours
                return at, is_one_scan, segments, height_at if is_one_scan and is_plain else None
            if marker == _APP1:
                segments.append(bytes(data[at + 4 : at + 2 + (data[at + 2] << 8 | data[at + 3])]))
            elif marker in _HUFFMAN_FRAMES:
                height_at, num_colours = at + 5, data[at + 9]
            elif marker in _WHOLE_ONLY:
                is_plain = False
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    except IndexError:
        return None, False, segments, None
    return at, False, segments, None  # too long, or no marker where one should be


def _exif_orientation(exif: bytes) -> int | None:
    """Orientation in the first directory of EXIF data; None if there is none."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    if exif[:2] not in (b"II", b"MM") or number(2, 2) != 42:
        return None
    start = number(4, 4)
    for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(exif) - 11), 12):
        size = _INTEGERS.get(number(entry + 2, 2))
        if number(entry, 2) == _ORIENTATION and size and 1 <= number(entry + 4, 4) <= 4 // size:
            return number(entry + 8, size)
    return None


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
    height, width = (-(-side // reduction) for side in size)
    options = {"min_height": height, "min_width": width, "min_factor": reduction, "buffer": buffer}
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, **options)


def decode_upper_rows(
    data: Encoded, header: Header, num_rows: int, reduction: int
) -> np.ndarray | None:
    """Decode the upper rows by a copy whose header gives a smaller height.

    libjpeg stops after these rows, looks for the end marker and warns of what it passed over. That
    warning must be the first and only one: a file cut short anywhere, or damaged in these rows,
    gives another and is left to the caller, who decodes the whole.

    Args:
        data: A JPEG that libjpeg-turbo can turn into RGB.
        header: From `read_header`.
        num_rows: Rows of the stored picture that are needed.
        reduction: 1, 2, 4 or 8: decode so many times smaller, sides rounded up.
    Returns:
        uint8 [h, w, 3], RGB: the rows needed, equal to those of `decode_fastest`. None if nothing
        can be saved, or the file is not such that its rows can be decoded alone.
    """
    (height, width), at = header.stored_size, header.height_at
    # A warning comes only of whole blocks that are left over.
    if at is None or -(-num_rows // _BLOCKS) * _BLOCKS >= height:
        return None
    if int.from_bytes(data[at : at + 2], "big") != height:
        return None
    upper = bytearray(data)
    upper[at : at + 2] = num_rows.to_bytes(2, "big")
    image = np.empty((-(-num_rows // reduction), -(-width // reduction), 3), np.uint8)
    try:
        decode_fastest(upper, (num_rows, width), reduction, image)
    except ValueError as error:  # raised after the rows were written
        return image if str(error).endswith(_LEFT_OVER) else None
    return None
