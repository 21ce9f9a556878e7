"""The data of a study: prepared once into shards, in nested parts of the pool."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common.config import check_keys
from common.errors import UserError, require
from common.files import read_json_or_none, write_json
from pipeline.datasets import packages
from pipeline.plan import flags
from pipeline.stages import digest

ROOT = Path(__file__).resolve().parents[2]
SHARES = (0.1, 0.25, 1.0)  # of the pool that studies ask for; each holds the one before
_NUMBERS = ("num_pool", "num_probe_train", "num_probe_val", "seed")
_OPTIONS = {
    "fashion_mnist": {*_NUMBERS},
    "photos": {*_NUMBERS, "arguments"},
    "shards": {"pool", "probe_train", "probe_val"},
}  # of each recipe

PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "t_shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle_boot",
)  # fmt: skip
_FOLDER = "usr/share/datasets/fashion-mnist/"
SYSTEM = Path("/")  # where an installed package lies


@dataclass(frozen=True)
class StudyData:
    """Shards, by share of the pool, and what they are as a hash.

    Attributes:
        name: Of the set in the preset.
        pools: Share -> shard sets that together hold it.
        probe_train, probe_val: Labelled shards.
        digest: Of all shards' SHA-256.
        overrides: Of the set in the preset: dotted config keys.
    """

    name: str
    pools: dict[float, tuple[Path, ...]]
    probe_train: Path
    probe_val: Path
    digest: str
    overrides: dict[str, Any]

    def check_pool(self, share: float, where: str) -> float:
        """Return the share.

        Raises:
            UserError: If the data was not split so.
        """
        if share not in self.pools:
            known = ", ".join(map(str, self.pools))
            raise UserError(f"grid {where}: data {self.name} has no pool {share}; it has {known}")
        return share


def prepare(
    name: str, options: Mapping[str, Any], out: Path, report: Callable[[str], None] = print
) -> StudyData:
    """Make the shards of a preset's set, or find them made.

    Args:
        name: Of the set.
        options: `recipe`, its options, and `overrides`.
        out: Folder of this set's files.
        report: Gets a line for each step.
    Raises:
        UserError: For unknown recipes and options, or if a step fails.
    """
    settings = dict(options)
    recipe, overrides = settings.pop("recipe"), dict(settings.pop("overrides", {}))
    if recipe not in _OPTIONS:
        raise UserError(f"data {name}: no recipe {recipe!r}; known are {', '.join(_OPTIONS)}")
    needed = _OPTIONS[recipe] if recipe == "shards" else set()
    check_keys(settings, _OPTIONS[recipe], needed, f"data {name}: recipe {recipe}")
    if recipe == "shards":
        own = settings["pool"] if isinstance(settings["pool"], dict) else {1.0: settings["pool"]}
        pools = {
            float(share): tuple(
                Path(p).resolve() for p in ([paths] if isinstance(paths, str) else paths)
            )
            for share, paths in own.items()
        }
        train, val = (Path(settings[key]).resolve() for key in ("probe_train", "probe_val"))
    else:
        stamp = {"recipe": recipe, **settings}
        if read_json_or_none(out / "data.json") != stamp:
            if (out / "data.json").exists():
                raise UserError(f"{out}: holds data made with other options; choose another --out")
            _make(recipe, settings, out, report)
            write_json(out / "data.json", stamp)
        parts = [out / f"pool-{number}" for number in range(len(SHARES))]
        pools = {share: tuple(parts[: number + 1]) for number, share in enumerate(SHARES)}
        train, val = out / "probe_train", out / "probe_val"

    # What the shards are, by the hashes in their indexes.
    hashes: dict[str, list[list[str]]] = {}
    roles = {str(share): paths for share, paths in pools.items()}
    for role, paths in (roles | {"probe_train": (train,), "probe_val": (val,)}).items():
        for path in paths:
            index = read_json_or_none(path / "index.json")
            if index is None:
                raise UserError(f"data {name}: {path}/index.json: missing; make shards there first")
            hashes.setdefault(role, []).append([shard["sha256"] for shard in index["shards"]])
    return StudyData(name, pools, train, val, digest(hashes), overrides)


def _make(
    recipe: str, settings: Mapping[str, Any], out: Path, report: Callable[[str], None]
) -> None:
    """Pictures, then shards; the pictures go when the shards are there."""
    pictures = out / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    report(f"{out.name}: making the pictures ({recipe})")
    if recipe == "fashion_mnist":
        write_pictures(pictures, **settings)
    else:  # composites of photographs; the labelled detection pictures that come along are few
        words = flags({key: settings[key] for key in _NUMBERS if key in settings})
        words += map(str, settings.get("arguments", []))
        run_tool("tools/make_dataset.py", "photos", pictures, *words)
    _split_pool(pictures / "pool")
    for part in [f"pool-{number}" for number in range(len(SHARES))]:
        words = [pictures / part, out / part, "--labels", "none", "--overwrite"]
        run_tool("tools/make_shards.py", *words)
    for part in ("train", "val"):
        words = [pictures / "probe" / part, out / f"probe_{part}", "--overwrite"]
        run_tool("tools/make_shards.py", *words)
    report(f"{out.name}: shards made")
    shutil.rmtree(pictures)


def _split_pool(pool: Path) -> None:
    """Move the pictures of the pool into pool-0, pool-1, ..: 10 %, the next 15 %, the rest.

    Names are in no order that matters (numbers of pictures drawn at random), but every k-th is
    taken all the same, so that each part looks like the whole.
    """
    rest = sorted(path for path in pool.iterdir() if path.is_file())
    total = len(rest)
    for number, share in enumerate(SHARES):
        count = round(share * total) - (total - len(rest))
        stride = len(rest) / max(count, 1)
        chosen = {rest[int(k * stride)] for k in range(count)}
        folder = pool.with_name(f"pool-{number}")
        folder.mkdir()
        for path in chosen:
            path.rename(folder / path.name)
        rest = [path for path in rest if path not in chosen]


def run_tool(script: str, *words: str | Path, where: str = "") -> None:
    """Run one of our tools.

    Raises:
        UserError: With the last line that it printed, if it fails, after `where`.
    """
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise UserError(f"{where}{script} failed: {reason.removeprefix('error: ')}")


# -- Fashion-MNIST --------------------------------------------------------------------------------


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
    (train, train_labels), (test, test_labels) = (
        [read_idx(files[f"{part}-{kind}-ubyte.gz"]) for kind in ("images-idx3", "labels-idx1")]
        for part in ("train", "t10k")
    )
    for name, count, there in (
        ("num_pool", num_pool, len(train)),
        ("num_probe_train", num_probe_train, len(train)),
        ("num_probe_val", num_probe_val, len(test)),
    ):
        possible = len(CLASSES) <= count <= there
        require(possible, f"fashion_mnist: {name} is {count}; give {len(CLASSES)} to {there:,}")
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
