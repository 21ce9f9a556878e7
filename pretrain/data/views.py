"""From the bytes of a picture to uint8 pixels: exact decoding, fast decoding, centre crops.

Random crops are in `crops`; colours are changed in `augment`, in batches on the device, or in
`photometric_uint8`, by the loader's workers.
"""

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pretrain.data.jpeg_rows import decode_fastest, decode_upper_rows

MAX_PIXELS = 100_000_000  # 10,000 x 10,000; a larger picture is taken for a decompression bomb
Encoded = bytes | memoryview  # a picture in its file format
_FOUR_COLOURS = ("CMYK", "YCCK")  # Pillow knows which of them are inverted
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # bad pictures are told here


class BadSample(ValueError):
    """A picture that cannot be used; the message names it and the reason."""


def decode(data: Encoded, *, where: str) -> np.ndarray:
    """Decode JPEG, PNG, WebP and whatever else Pillow reads.

    Grey, palette, CMYK and 16-bit pictures become 8-bit RGB; transparency is dropped, not composed;
    an EXIF orientation is not applied, as in torchvision's folders.

    Args:
        data: The encoded picture.
        where: What to call the picture in an error.
    Returns:
        uint8 [height, width, 3], RGB, contiguous.
    Raises:
        BadSample: If the picture does not decode, is cut short, or has more than MAX_PIXELS pixels.
    """
    if data[:2] == b"\xff\xd8":
        return _decode_jpeg(data, where)
    return _decode_other(data, where)


@dataclass(frozen=True)
class Header:
    """What a picture's header tells.

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
        BadSample: If there is no header, or it tells of more than MAX_PIXELS pixels.
    """
    is_fast = False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        is_fast = colorspace not in _FOUR_COLOURS
    except ValueError:  # another format, or damaged
        width, height = _size(data, where)
    _check_size(int(width), int(height), where)
    return Header(int(height), int(width), is_fast)


def decode_fast(
    data: Encoded, header: Header, reduction: int, *, where: str, num_rows: int | None = None
) -> tuple[np.ndarray, int]:
    """Decode for training: JPEGs with libjpeg-turbo's fastest settings, and smaller if asked.

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
        BadSample: If the picture does not decode or is cut short.
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


def _decode_jpeg(data: Encoded, where: str) -> np.ndarray:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(width), int(height), where)
        if colorspace not in _FOUR_COLOURS:
            return simplejpeg.decode_jpeg(data, "RGB")  # accurate DCT, as Pillow's
    except BadSample:
        raise
    except ValueError:
        pass  # damaged a little or a lot: Pillow forgives stray bytes, but not a missing end
    return _decode_pillow(data, where)


def _decode_other(data: Encoded, where: str) -> np.ndarray:
    _check_size(*_size(data, where), where)
    if _cv2_reads(data):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None:
            return image
    return _decode_pillow(data, where)


def _cv2_reads(data: Encoded) -> bool:
    """True for the formats in which OpenCV is faster than Pillow and agrees with it."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _size(data: Encoded, where: str) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return picture.size
        except Image.DecompressionBombError as error:
            raise BadSample(f"{where}: {error}") from error
        except Exception as error:  # Pillow raises many kinds, OSError and SyntaxError among them
            raise BadSample(f"{where}: does not decode, no picture ({_short(error)})") from error


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
        raise BadSample(f"{where}: does not decode ({_short(error)})") from error


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(
            f"{where}: {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded: "
            "shrink the picture"
        )
    if width < 1 or height < 1:
        raise BadSample(f"{where}: {width} x {height} pixels")


def _short(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Central square of 7/8 of the short side (256 -> 224 in the usual protocol), resized.

    Args:
        image: uint8 [height, width, 3].
        size: Side of the result in pixels.
    Returns:
        uint8 [size, size, 3].
    """
    from pretrain.data.crops import resize  # here, for it brings torch: packing does without

    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * 7 / 8))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)
