"""Fashion-MNIST out of Debian's package: grey pictures of clothes, 28 x 28 pixels."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import cv2
import numpy as np

from common.errors import UserError, require
from pipeline.datasets import packages

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "t_shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle_boot",
)  # fmt: skip
NUM_TRAIN, NUM_TEST = 60_000, 10_000
LICENCE = "MIT (Zalando SE)"
_FOLDER = "usr/share/datasets/fashion-mnist/"
SYSTEM = Path("/")  # where an installed package lies


def check_counts(num_pool: int, num_probe_train: int, num_probe_val: int) -> None:
    """Refuse numbers of pictures that there are not.

    Raises:
        UserError: Naming the option.
    """
    for option, count, there in (
        ("--num-pool", num_pool, NUM_TRAIN),
        ("--num-probe-train", num_probe_train, NUM_TRAIN),
        ("--num-probe-val", num_probe_val, NUM_TEST),
    ):
        require(
            len(CLASSES) <= count <= there,
            f"{option} is {count}: give {len(CLASSES)} to {there:,}",
        )


def write_pictures(
    out: Path, num_pool: int, num_probe_train: int, num_probe_val: int, seed: int
) -> None:
    """Write OUT/pool/*.png, OUT/probe/{train,val}/<class>/*.png.

    The pool and probe/train are drawn from the 60,000 training pictures (a labelled one may lie in
    the pool too, without its label), probe/val from the 10,000 test pictures.

    Raises:
        UserError: If the package cannot be had.
    """
    files = read_files()
    (train, train_labels), (test, test_labels) = (
        [read_idx(files[f"{part}-{kind}-ubyte.gz"]) for kind in ("images-idx3", "labels-idx1")]
        for part in ("train", "t10k")
    )
    generator = np.random.default_rng(seed)
    (out / "pool").mkdir(parents=True)
    for number, index in enumerate(generator.permutation(len(train))[:num_pool]):
        _write(out / "pool" / f"{number:06d}.png", train[index])
    for part, images, labels, count in (
        ("train", train, train_labels, num_probe_train),
        ("val", test, test_labels, num_probe_val),
    ):
        for name in CLASSES:
            (out / "probe" / part / name).mkdir(parents=True)
        # Drawn at random, of every class as many as of the others.
        by_class = [generator.permutation(np.flatnonzero(labels == c)) for c in range(len(CLASSES))]
        rounds = max(map(len, by_class))
        drawn = [indices[k] for k in range(rounds) for indices in by_class if k < len(indices)]
        for number, index in enumerate(drawn[:count]):
            folder = out / "probe" / part / CLASSES[labels[index]]
            _write(folder / f"{number:06d}.png", images[index])


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
    cache = Path(os.environ.get("FA_CACHE") or ROOT / ".cache") / "fashion_mnist"
    try:
        source = SYSTEM if (SYSTEM / _FOLDER).is_dir() else packages.newest(cache, PACKAGE)
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


def _write(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image):
        raise OSError(f"{path}: cannot be written")
