"""Fashion-MNIST out of Debian's package `dataset-fashion-mnist`, as picture files."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from common.errors import UserError
from pipeline.datasets import packages

PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "t_shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle_boot",
)  # fmt: skip
_FOLDER = "usr/share/datasets/fashion-mnist/"
SYSTEM = Path("/")  # where an installed package lies
_ROOT = Path(__file__).resolve().parents[2]


def write_pictures(
    out: Path, num_pool: int = 60_000, num_probe_train: int = 2000, num_probe_val: int = 1000,
    seed: int = 0,
) -> None:  # fmt: skip
    """Write OUT/pool/*.png, OUT/probe/{train,val}/<class>/*.png.

    The pool and probe/train are drawn from the 60,000 training pictures (a labelled one may lie in
    the pool too, without its label), probe/val from the 10,000 test pictures.

    Raises:
        UserError: If there are not so many, or the package cannot be had.
    """
    files = read_files()
    generator = np.random.default_rng(seed)
    train, test = (_read_part(files, part) for part in ("train", "t10k"))
    for name, wanted, there in (
        ("num_pool", num_pool, len(train[0])),
        ("num_probe_train", num_probe_train, len(train[0])),
        ("num_probe_val", num_probe_val, len(test[0])),
    ):
        if not len(CLASSES) <= wanted <= there:
            raise UserError(f"fashion_mnist: {name} is {wanted}; give {len(CLASSES)} to {there:,}")
    (out / "pool").mkdir(parents=True)
    for number, index in enumerate(generator.permutation(len(train[0]))[:num_pool]):
        _write(out / "pool" / f"{number:06d}.png", train[0][index])
    for name, (images, labels), count in (
        ("train", train, num_probe_train),
        ("val", test, num_probe_val),
    ):
        chosen = _balanced(labels, count, generator)
        _write_classes(out / "probe" / name, images[chosen], labels[chosen])


def _balanced(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Numbers of `count` pictures drawn at random, of every class as many as of the others."""
    by_class = [generator.permutation(np.flatnonzero(labels == c)) for c in range(len(CLASSES))]
    rounds = max(map(len, by_class))
    taken = [indices[k] for k in range(rounds) for indices in by_class if k < len(indices)]
    return np.array(taken[:count])


def _read_part(files: Mapping[str, bytes], part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, uint8 [n, 28, 28], and their class numbers, uint8 [n]."""
    kinds = ("images-idx3", "labels-idx1")
    images, labels = (read_idx(files[f"{part}-{kind}-ubyte.gz"]) for kind in kinds)
    return images, labels


def read_files() -> dict[str, bytes]:
    """The four files by name: out of the installed package, or the .deb in the cache, or fetched.

    The cache is $FA_CACHE/fashion_mnist, else .cache/fashion_mnist here.

    Raises:
        UserError: If the package cannot be had.
    """
    names = {
        f"{_FOLDER}{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    }
    chosen = os.environ.get("FA_CACHE")
    cache = (Path(chosen) if chosen else _ROOT / ".cache") / "fashion_mnist"
    try:
        if (SYSTEM / _FOLDER).is_dir():
            source = SYSTEM
        else:
            source = packages.newest(cache, PACKAGE)
            if source is None:
                packages.download([PACKAGE], cache, "31 MB")
                source = packages.newest(cache, PACKAGE)
        assert source is not None
        found = dict(packages.members(source, names))
    except UserError as error:
        raise UserError(f"Fashion-MNIST: {error}") from None
    missing = sorted(names - set(found))
    if missing:
        raise UserError(f"Fashion-MNIST: {source} does not hold {missing[0]}; fetch {PACKAGE} anew")
    return {Path(name).name: content for name, content in found.items()}


def read_idx(data: bytes) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes: uint8 [n, ..].

    Raises:
        UserError: If it is none.
    """
    try:
        raw = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise UserError(f"an IDX file is damaged ({error}); fetch the package anew") from None
    num_axes = raw[3] if len(raw) > 4 else 0
    shape = np.frombuffer(raw[4 : 4 + 4 * num_axes], dtype=">u4").astype(int)
    body = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * num_axes) if num_axes else None
    if raw[:3] != b"\0\0\x08" or body is None or body.size != np.prod(shape):
        raise UserError(
            "an IDX file is damaged (header and length disagree); fetch the package anew"
        )
    return body.reshape(shape)


def _write_classes(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        _write(folder / CLASSES[label] / f"{number:06d}.png", image)


def _write(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image):
        raise OSError(f"{path}: cannot be written")
