"""Photographs that the loader's benchmarks read: generated ones, or real ones from a folder."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from common.errors import UserError
from pretrain.data.shards import ShardIndex, ShardOptions, SourcePicture, write_shards

HEIGHT, WIDTH, QUALITY = 375, 500, 90
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def photo(seed: int) -> np.ndarray:
    """uint8 [375, 500, 3] with the falling spectrum of photographs; about 52 kB as JPEG."""
    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for cells, amplitude in ((4, 45), (8, 35), (16, 25), (32, 18), (64, 12), (128, 9), (250, 6)):
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        noise = 0.3 * noise + 0.7 * noise.mean(axis=2, keepdims=True)
        image += amplitude * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image += 3 * rng.standard_normal((HEIGHT, WIDTH, 1)).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(image: np.ndarray) -> bytes:
    """JPEG of quality 90 with halved colour planes, as cameras and ImageNet have it."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", "420")


def encoded_photos(num: int) -> list[bytes]:
    """Generated photographs as JPEGs."""
    return [encode(photo(seed)) for seed in range(num)]


def photos_of_folder(folder: Path, num: int) -> list[bytes]:
    """Real pictures, shrunk and cropped in the middle to 500 x 375, as JPEGs of quality 90.

    Pictures that are smaller are left out: enlarged ones would be too smooth. The rest come in the
    order of their names, again from the beginning where there are fewer than `num`.

    Raises:
        UserError: If the folder holds no picture that is large enough.
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if image is not None and image.shape[0] >= HEIGHT and image.shape[1] >= WIDTH:
            found.append(encode(_fitted(image)))
            if len(found) == num:
                break
    if not found:
        raise UserError(
            f"--pictures {folder}: no JPEG, PNG or WebP of at least {WIDTH} x {HEIGHT} pixels there"
        )
    return [found[number % len(found)] for number in range(num)]


def _fitted(image: np.ndarray) -> np.ndarray:
    """The middle of a picture, shrunk by area averaging until it just covers 500 x 375."""
    scale = max(HEIGHT / image.shape[0], WIDTH / image.shape[1])
    size = (max(WIDTH, round(image.shape[1] * scale)), max(HEIGHT, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    top, left = (small.shape[0] - HEIGHT) // 2, (small.shape[1] - WIDTH) // 2
    return small[top : top + HEIGHT, left : left + WIDTH]


def write_files(jpegs: Sequence[bytes], folder: Path) -> list[Path]:
    """One file for each JPEG."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(len(jpegs))]
    for path, data in zip(paths, jpegs, strict=True):
        path.write_bytes(data)
    return paths


def open_as_shards(
    files: Sequence[Path], folder: Path, num_samples: int | None = None, per_shard: int = 1000
) -> ShardIndex:
    """Shards of the files; each comes several times, under other names, to reach `num_samples`."""
    num_samples = num_samples or len(files)
    pictures = [
        SourcePicture(str(files[number % len(files)]), f"{number:07d}.jpg")
        for number in range(num_samples)
    ]
    write_shards(pictures, folder, options=ShardOptions(max_samples_per_shard=per_shard))
    return ShardIndex.open(str(folder))
