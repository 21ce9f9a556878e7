"""Pictures and shards for the golden gates: the same pixels on every machine."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tools.make_shards import main as make_shards


def pixels(seed: int, height: int, width: int, *, noise: int = 24) -> np.ndarray:
    """uint8 [height, width, 3]: soft colours under a fine texture, in integer arithmetic alone."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3))
    soft = np.einsum("yi,xj,ijc->yxc", _weights(height), _weights(width), coarse) >> 16
    texture = rng.integers(-noise, noise + 1, (height, width, 1))
    return np.clip(soft + texture, 0, 255).astype(np.uint8)


def _weights(size: int) -> np.ndarray:
    """int64 [size, 5]: weights of linear interpolation between 5 points, in 256ths."""
    place = np.arange(size) * 4 * 256 // size
    weights = np.zeros((size, 5), np.int64)
    weights[np.arange(size), place // 256] = 256 - place % 256
    weights[np.arange(size), place // 256 + 1] = place % 256
    return weights


def png(image: np.ndarray) -> bytes:
    """PNG of uint8 [h, w, 3], at most 64 KiB, stored without compression.

    What a compressor writes depends on its version, and these bytes must not.
    """
    height, width = image.shape[:2]
    lines = np.insert(image.reshape(height, 3 * width), 0, 0, axis=1).tobytes()  # no filter
    length = struct.pack("<HH", len(lines), len(lines) ^ 0xFFFF)
    stored = b"\x78\x01\x01" + length + lines + struct.pack(">I", zlib.adler32(lines))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    contents = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + stored, b"IEND"):
        contents += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return contents


def encode(image: np.ndarray, kind: str, **options: object) -> bytes:
    """A picture in another format, by Pillow; its bytes may differ between versions."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A plain tar, members in the order given."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


CLASSES = ("blue", "green", "red")
CLASS_SHARE = 0.25  # how much of a picture its class decides: neither all nor none is recognised


def labelled_shards(folder: Path, *, num: int, seed: int) -> Path:
    """Pack `num` pictures of three classes, by tools/make_shards.py, 10 in a tar."""
    random = np.random.default_rng(seed)
    for i in range(num):
        height, width = 40 + i % 20, 60 - i % 20
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(float)
        colour = np.eye(3)[i % 3] * 255
        picture = (1 - CLASS_SHARE) * picture + CLASS_SHARE * colour
        path = folder / "pictures" / CLASSES[i % 3] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), picture.round().astype(np.uint8))
    shards = folder / "shards"
    options = ["--max-samples-per-shard", "10", "--num-workers", "1", "--labels", "folders"]
    assert make_shards([str(folder / "pictures"), str(shards), *options]) == 0
    return shards
