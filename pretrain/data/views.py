"""From the bytes of a picture to uint8 views: decoding, random resized crops, centre crops.

Only geometry happens here, on the CPU; colours are changed in `augment`, in batches, on the device.
"""

import io
import math
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # 10,000 x 10,000; a larger picture is taken for a decompression bomb
RATIO = (3 / 4, 4 / 3)  # aspect ratios of random resized crops, as in torchvision
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # bad pictures are told here
_CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop


class BadSample(ValueError):
    """A picture that cannot be used; the message names it and the reason."""


def decode(data: bytes, *, where: str) -> np.ndarray:
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


def _decode_jpeg(data: bytes, where: str) -> np.ndarray:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(width), int(height), where)
        if colorspace not in ("CMYK", "YCCK"):
            return simplejpeg.decode_jpeg(data, "RGB")  # accurate DCT, as Pillow's
    except BadSample:
        raise
    except ValueError:
        pass  # damaged a little or a lot: Pillow forgives stray bytes, but not a missing end
    return _decode_pillow(data, where)


def _decode_other(data: bytes, where: str) -> np.ndarray:
    _check_size(*_size(data, where), where)
    if _cv2_reads(data):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None:
            return image
    return _decode_pillow(data, where)


def _cv2_reads(data: bytes) -> bool:
    """True for the formats in which OpenCV is faster than Pillow and agrees with it."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _size(data: bytes, where: str) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return picture.size
        except Image.DecompressionBombError as error:
            raise BadSample(f"{where}: {error}") from error
        except Exception as error:  # Pillow raises many kinds, OSError and SyntaxError among them
            raise BadSample(f"{where}: not a picture that can be read ({_short(error)})") from error


def _decode_pillow(data: bytes, where: str) -> np.ndarray:
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


def draw_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Box of a random resized crop, drawn as torchvision's RandomResizedCrop does.

    Args:
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
        rng: Source of the draws.
        scale: Range of the area, as a share of the picture's.
        ratio: Range of width / height, drawn uniformly in its logarithm.
    Returns:
        top, left, height, width in pixels; inside the picture.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    draws = rng.random((_CROP_ATTEMPTS, 4)).tolist()
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(log_low + ratio_draw * (log_high - log_low))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    return _fallback_box(height, width, ratio)


def _fallback_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest centred box whose aspect ratio is within `ratio`."""
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        crop_width = min(width, max(1, round(height * ratio[1])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = RATIO,
    flip_probability: float = 0.5,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """One random resized crop, flipped left to right with a probability.

    Args:
        image: uint8 [height, width, 3].
        rng: Source of the draws; always the same number of them.
        size: Side of the view in pixels.
        scale: Range of the crop's area, as a share of the picture's.
        ratio: Range of the crop's width / height.
        flip_probability: Probability of a horizontal flip.
        out: Where to write the view; a new array if none.
    Returns:
        uint8 [size, size, 3].
    """
    top, left, height, width = draw_crop_box(image.shape[0], image.shape[1], rng, scale, ratio)
    crop = image[top : top + height, left : left + width]
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    if rng.random() < flip_probability:
        return cv2.flip(resize(crop, size, size), 1, dst=out)
    return resize(crop, size, size, out)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Central square of 7/8 of the short side (256 -> 224 in the usual protocol), resized.

    Args:
        image: uint8 [height, width, 3].
        size: Side of the result in pixels.
    Returns:
        uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * 7 / 8))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)


def resize(image: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resize without much aliasing at nearly the cost of bilinear interpolation.

    Each side is halved by averaging (exact, vectorised in OpenCV) until less than a factor of two
    is left; the rest is bilinear. To halve exactly, up to one pixel per halving is cut off at the
    right and below.

    Args:
        image: uint8 [h, w, 3]; a slice is fine.
        height: New height in pixels.
        width: New width in pixels.
        out: Where to write the result, contiguous; a new array if none.
    Returns:
        uint8 [height, width, 3].
    """
    out = np.empty((height, width, 3), np.uint8) if out is None else out
    while image.shape[0] >= 2 * height or image.shape[1] >= 2 * width:
        fy, fx = 1 + (image.shape[0] >= 2 * height), 1 + (image.shape[1] >= 2 * width)
        half_height, half_width = image.shape[0] // fy, image.shape[1] // fx
        whole = image[: fy * half_height, : fx * half_width]
        # On one axis alone area averaging is slow in OpenCV; bilinear at exactly 1/2 is the same.
        kind = cv2.INTER_AREA if fx == fy else cv2.INTER_LINEAR
        image = cv2.resize(whole, (half_width, half_height), interpolation=kind)
    return cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
