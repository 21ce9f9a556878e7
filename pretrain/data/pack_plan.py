"""Which picture goes into which shard under which key: a function of pictures and options."""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import simplejpeg

from common.errors import UserError, at_least, positive, require
from common.pictures import BadPicture, decode
from pretrain.data.random_numbers import stable_hash

MAX_FILE_BYTES = 2**30  # far above any picture of MAX_PIXELS pixels that is compressed
_KEPT = {  # what may be stored as it is, by its suffix
    "jpg": re.compile(rb"\xff\xd8"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
_RATIO_SAMPLES = 16  # pictures that are shrunk on trial to plan the sizes of shards
_UNSAFE = re.compile(r"[^A-Za-z0-9_/+=-]")
_MAX_KEY_LENGTH = 90  # with a suffix, a plain tar header holds 100 characters
_OVERHEAD = 2048  # bytes of tar headers and padding per sample, at most
_STAT_THREADS = 16  # a network file system answers many at once
_STAT_CHUNK = 4096  # files per thread and turn
_MORE_SHARDS = 12  # attempts, each with a percent more shards, to keep all below their limits


def prepare(path: str, resize_short: int | None, quality: int) -> tuple[str, bytes]:
    """Read, check and perhaps shrink a picture.

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
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise BadPicture(f"{path}: not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadPicture(f"{path}: {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadPicture(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise BadPicture(f"{path}: is empty (0 bytes)")
    image = decode(data, where=path)
    import cv2  # not needed to parse a command line

    height, width = image.shape[:2]
    if resize_short is not None and min(height, width) > resize_short:
        scale = resize_short / min(height, width)
        size = max(resize_short, round(width * scale)), max(resize_short, round(height * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # area averaging
        return "jpg", simplejpeg.encode_jpeg(small, quality, "RGB", "420", fastdct=False)
    for suffix, first_bytes in _KEPT.items():
        if first_bytes.match(data):
            return suffix, data
    return "png", cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


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


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """A picture to pack.

    Attributes:
        path: Where the file is.
        name: Its path relative to the source, with slashes; the sample's key is made of it.
        label: Class number, -1 for none.
    """

    path: str
    name: str
    label: int = -1


@dataclass(frozen=True)
class ShardOptions:
    """How shards are made; everything here changes their bytes.

    Attributes:
        max_samples_per_shard: Most samples in one shard.
        shard_size_mb: Most bytes in one shard (10^6), judged by the sources' sizes; a single
            larger picture gets a shard of its own.
        resize_short: Shrink pictures to this short side in pixels; None keeps the bytes as they
            are.
        quality: JPEG quality of shrunk pictures.
        shuffle_seed: Seed of the order of samples over all shards; None keeps the order of names.
    """

    max_samples_per_shard: int = 1000
    shard_size_mb: float = 256.0
    resize_short: int | None = None
    quality: int = 90
    shuffle_seed: int | None = 0

    def __post_init__(self) -> None:
        at_least(self, "shards", max_samples_per_shard=1, resize_short=1)
        positive(self, "shards", "shard_size_mb")
        require(1 <= self.quality <= 100, f"JPEG quality {self.quality}: must be from 1 to 100")


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to make.

    Attributes:
        name: File name of the tar.
        pictures: What goes in, in this order.
        keys: WebDataset key of each.
        fingerprint: Hash of all that decides the shard's bytes, judged by names and sizes.
        estimated_bytes: About how large the tar becomes.
    """

    name: str
    pictures: tuple[SourcePicture, ...]
    keys: tuple[str, ...]
    fingerprint: str
    estimated_bytes: int


def make_plan(pictures: Sequence[SourcePicture], options: ShardOptions) -> list[ShardPlan]:
    """Divide pictures into shards of nearly equal size.

    Args:
        pictures: With unique names; their order does not matter.
        options: How shards are made.
    Raises:
        UserError: If there is no picture, or a name occurs twice.
    """
    require(bool(pictures), "no pictures to pack")
    ordered = sorted(pictures, key=lambda picture: picture.name)
    keys = make_keys([picture.name for picture in ordered])
    if options.shuffle_seed is not None:  # over all shards, by hashes of the names
        hashes = [stable_hash("shard order", options.shuffle_seed, p.name) for p in ordered]
        first, second = np.frombuffer(b"".join(hashes), dtype=">u8").reshape(-1, 2).T
        order = np.lexsort((second, first)).tolist()
        ordered, keys = [ordered[i] for i in order], [keys[i] for i in order]
    sizes = _file_sizes([picture.path for picture in ordered])
    ratio = shrink_ratio([p.path for p in ordered], options.resize_short, options.quality)
    stored = (sizes * ratio).astype(np.int64) + _OVERHEAD
    plans, option_bytes = [], repr(sorted(asdict(options).items())).encode()
    for number, (start, end) in enumerate(pairwise(split_evenly(stored, options))):
        own, digest = ordered[start:end], hashlib.sha256(option_bytes)
        for picture, size in zip(own, sizes[start:end].tolist(), strict=True):
            digest.update(stable_hash(picture.name, picture.label, size))
        name, num_bytes = f"shard-{number:06d}.tar", int(stored[start:end].sum())
        own_keys = tuple(keys[start:end])
        plans.append(ShardPlan(name, tuple(own), own_keys, digest.hexdigest(), num_bytes))
    return plans


def split_evenly(stored_bytes: np.ndarray, options: ShardOptions) -> list[int]:
    """Where shards begin and end, so that all are about equally full and none is over a limit.

    A sample fills a shard by the larger of its share of the bytes and of the number allowed. That
    many shards as all samples together fill are taken, and their bounds are put at equal steps of
    the filling. Where chance still lifts a shard over a limit a few more shards are taken; where
    that does not help (pictures that are not much smaller than a shard) such a shard is halved.

    Args:
        stored_bytes: int64 [n] bytes that each sample takes, in order; n > 0.
        options: The two limits.
    Returns:
        Bounds 0 = b_0 < b_1 < .. < n; shard k holds samples b_k to b_(k+1) - 1.
    """
    limit = options.shard_size_mb * 1e6
    filling = np.maximum(stored_bytes / limit, 1 / options.max_samples_per_shard)
    filled = np.cumsum(filling)  # one after the other, so the same on every machine; sum() is not
    middle, total = filled - filling / 2, float(filled[-1])
    num_shards, bounds = max(1, int(np.ceil(total - 1e-6))), [0]
    for _ in range(_MORE_SHARDS):
        number = np.floor(middle * (num_shards / total))
        bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(filling)]
        if not _too_full(bounds, stored_bytes, limit, options.max_samples_per_shard):
            return bounds
        num_shards += max(1, num_shards // 100)
    while full := _too_full(bounds, stored_bytes, limit, options.max_samples_per_shard):
        halves = [(bounds[k] + bounds[k + 1]) // 2 for k in full]
        bounds = sorted([*bounds, *halves])
    return bounds


def _too_full(bounds: list[int], stored_bytes: np.ndarray, limit: float, most: int) -> list[int]:
    """Numbers of the shards above a limit that could be made smaller."""
    counts = np.diff(bounds)
    totals = np.add.reduceat(stored_bytes, bounds[:-1])
    return np.flatnonzero((counts > most) | ((totals > limit) & (counts > 1))).tolist()


def _file_sizes(paths: list[str]) -> np.ndarray:
    """Bytes of each file, int64; 0 for one that is not there: reported when its turn comes."""

    def size_of(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return 0

    def sizes_of(start: int) -> np.ndarray:
        chunk = paths[start : start + _STAT_CHUNK]
        return np.fromiter(map(size_of, chunk), np.int64, len(chunk))

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return np.concatenate(list(pool.map(sizes_of, range(0, len(paths), _STAT_CHUNK))))


def make_keys(names: Sequence[str]) -> list[str]:
    """WebDataset keys for relative paths: the path without its suffix, in safe characters.

    A name that had to be changed or shortened, or whose key another one would share (a.jpg and
    a.png), gets a hash of the whole name appended.

    Raises:
        UserError: If a name occurs twice.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    plain = [_UNSAFE.sub("_", stem) for stem in stems]
    shared = Counter(key.lower() for key in plain)  # must differ where file systems ignore case
    keys = []
    for name, stem, key in zip(names, stems, plain, strict=True):
        is_changed = key != stem or len(key) > _MAX_KEY_LENGTH or key.startswith("/")
        if is_changed or shared[key.lower()] > 1:
            tail = key.strip("/")[-(_MAX_KEY_LENGTH - 17) :].lstrip("/")
            key = f"{tail}-{stable_hash(name, num_bytes=8).hex()}"
        keys.append(key)
    if len(set(keys)) != len(keys):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{twice}: listed twice; each picture may occur once")
    return keys
