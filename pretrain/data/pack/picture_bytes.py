"""The bytes of a picture as they go into a shard: kept as they are, shrunk, or re-encoded."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from common.pictures import BadPicture, decode

MAX_FILE_BYTES = 2**30  # far above any picture of MAX_PIXELS pixels that is compressed
_RATIO_SAMPLES = 16  # pictures that are shrunk on trial to plan the sizes of shards


def stored_suffix(data: bytes) -> str | None:
    """Suffix under which these bytes may be stored as they are; None if they must be re-encoded."""
    if data[:2] == b"\xff\xd8":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def prepare(path: str, resize_short: int | None, quality: int) -> tuple[str, bytes]:
    """Read, check and if asked shrink a picture.

    Every picture is decoded, so that a shard never holds one that does not decode.

    Args:
        path: The file.
        resize_short: Short side in pixels; smaller pictures keep their bytes. None: never shrink.
        quality: JPEG quality of shrunk pictures.
    Returns:
        Suffix and bytes. Formats other than JPEG, PNG and WebP become PNG.
    Raises:
        BadPicture: If the file cannot be read, is empty, no plain file or larger than
            MAX_FILE_BYTES, or does not decode.
    """
    data = _read(path)
    image = decode(data, where=path)
    if resize_short is not None and min(image.shape[:2]) > resize_short:
        return "jpg", _encode_jpeg(shrink(image, resize_short), quality)
    suffix = stored_suffix(data)
    if suffix is not None:
        return suffix, data
    return "png", cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def _read(path: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise BadPicture(f"{path}: not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadPicture(
                f"{path}: {status.st_size:,} bytes, more than the {MAX_FILE_BYTES:,} that are read"
            )
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadPicture(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise BadPicture(f"{path}: is empty (0 bytes)")
    return data


def shrink(image: np.ndarray, short_side: int) -> np.ndarray:
    """Shrink uint8 [h, w, 3] to a short side, by area averaging."""
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420", fastdct=False)


def shrink_ratio(paths: Sequence[str], resize_short: int | None, quality: int) -> float:
    """Stored bytes per source byte, measured on some pictures evenly spread over `paths`."""
    if resize_short is None:
        return 1.0
    before = after = 0
    for path in paths[:: max(1, len(paths) // _RATIO_SAMPLES)][:_RATIO_SAMPLES]:
        try:
            after += len(prepare(path, resize_short, quality)[1])
            before += Path(path).stat().st_size
        except BadPicture:
            continue
    return after / before if before else 1.0
