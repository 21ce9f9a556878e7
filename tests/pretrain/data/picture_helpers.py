"""Small pictures and shard sets for the tests of the data side."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from hypothesis import settings
from PIL import Image

from pretrain.data.loader import ViewBatch
from pretrain.data.pack import ShardOptions, SourcePicture, write_shards
from pretrain.data.shards import ShardIndex

NUM_PICTURES = 40
seeded = settings(deadline=None, derandomize=True)  # on a busy machine any example may be slow


def smooth_picture(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [height, width, 3] with soft structure, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def write_pictures(folder: Path, num: int = NUM_PICTURES, num_classes: int = 2) -> list[Path]:
    """Class folders with JPEG pictures of several sizes."""
    files = []
    for i in range(num):
        file = folder / f"class-{i % num_classes}" / f"picture-{i:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(smooth_picture(i, 40 + i % 40, 90 - i % 40), quality=90))
        files.append(file)
    return files


def sources(folder: Path) -> list[SourcePicture]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    classes = sorted({path.parent.name for path in files})
    return [
        SourcePicture(str(p), p.relative_to(folder).as_posix(), classes.index(p.parent.name))
        for p in files
    ]


def pack_pictures(
    folder: Path, num: int = NUM_PICTURES, classes=("class-0", "class-1"), per_shard=10, broken=()
) -> Path:
    """Shards of soft pictures, the classes in turn; those of the numbers `broken` do not decode."""
    pictures = []
    for i in range(num):
        path = folder / f"picture-{i:03d}.jpg"
        data = encode(smooth_picture(i, 40 + i % 20, 60 - i % 20), quality=95)
        path.write_bytes(data[:200] if i in broken else data)
        pictures.append(SourcePicture(str(path), path.name, i % len(classes) if classes else -1))
    options = ShardOptions(max_samples_per_shard=per_shard)
    names = list(classes) if classes else None
    write_shards(pictures, folder / "shards", options=options, classes=names, max_bad=len(broken))
    return folder / "shards"


def damage(folder: Path, *numbers: int) -> None:
    """Overwrite pictures of a shard set with zeros."""
    index = ShardIndex.open(folder)
    for number in numbers:
        row = index.samples[number]
        with open(folder / index.shard_names[int(row["shard"])], "r+b") as stream:
            stream.seek(int(row["offset"]))
            stream.write(bytes(int(row["size"])))


def same(one: Sequence[ViewBatch], other: Sequence[ViewBatch]) -> bool:
    """Whether batches are equal, bit by bit."""

    def parts(batch: ViewBatch) -> list[torch.Tensor]:
        small = [] if batch.small_views is None else [batch.small_views]
        names = ("views", "sample_hashes", "sample_ids", "repeats", "labels")
        return [getattr(batch, name) for name in names] + small

    return len(one) == len(other) and all(
        torch.equal(x, y)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(parts(a), parts(b), strict=True)
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_tar(path: Path, files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> str:
    """A tar as another tool would make it; its path as text."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)
