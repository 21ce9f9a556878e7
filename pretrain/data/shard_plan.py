"""Which picture goes into which shard under which key: a function of pictures and options."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pretrain.data.order import stable_hash
from pretrain.data.picture_bytes import shrink_ratio
from pretrain.errors import UserError

_UNSAFE = re.compile(r"[^A-Za-z0-9_/+=-]")
_MAX_KEY_LENGTH = 90  # with a suffix, a plain tar header holds 100 characters
_OVERHEAD = 2048  # bytes of tar headers and padding per sample, at most


@dataclass(frozen=True)
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
        shard_size_mb: A shard is closed at about this size (10^6 bytes), planned from the sources'
            sizes.
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
        if self.max_samples_per_shard < 1:
            raise UserError(f"{self.max_samples_per_shard} samples per shard: must be at least 1")
        if not self.shard_size_mb > 0:
            raise UserError(f"shard size {self.shard_size_mb} MB: must be above 0")
        if self.resize_short is not None and self.resize_short < 1:
            raise UserError(f"short side {self.resize_short}: must be at least 1 pixel")
        if not 1 <= self.quality <= 100:
            raise UserError(f"JPEG quality {self.quality}: must be from 1 to 100")


@dataclass(frozen=True)
class ShardPlan:
    """One shard to make.

    Attributes:
        name: File name of the tar.
        pictures: What goes in, in this order.
        keys: WebDataset key of each.
        fingerprint: Hash of all that decides the shard's bytes, as far as names and sizes tell.
        estimated_bytes: About how large the tar becomes.
    """

    name: str
    pictures: tuple[SourcePicture, ...]
    keys: tuple[str, ...]
    fingerprint: str
    estimated_bytes: int


def make_plan(pictures: Sequence[SourcePicture], options: ShardOptions) -> list[ShardPlan]:
    """Divide pictures into shards.

    Args:
        pictures: With unique names; their order does not matter.
        options: How shards are made.
    Raises:
        UserError: If there is no picture, or a name occurs twice.
    """
    if not pictures:
        raise UserError("no pictures to pack")
    ordered = sorted(pictures, key=lambda picture: picture.name)
    keys = dict(zip((p.name for p in ordered), make_keys([p.name for p in ordered]), strict=True))
    if options.shuffle_seed is not None:
        seed = options.shuffle_seed
        ordered.sort(key=lambda picture: stable_hash("shard order", seed, picture.name))
    sizes = [_file_size(picture.path) for picture in ordered]
    ratio = shrink_ratio([p.path for p in ordered], options.resize_short, options.quality)
    plans, start, total = [], 0, 0
    for end in range(len(ordered) + 1):
        size = int(sizes[end] * ratio) + _OVERHEAD if end < len(ordered) else 0
        full = end - start >= options.max_samples_per_shard or (
            end > start and total + size > options.shard_size_mb * 1e6
        )
        if full or (end == len(ordered) and end > start):
            number = len(plans)
            plans.append(
                _plan_shard(number, ordered[start:end], sizes[start:end], keys, options, total)
            )
            start, total = end, 0
        total += size
    return plans


def _plan_shard(
    number: int,
    pictures: list[SourcePicture],
    sizes: list[int],
    keys: dict[str, str],
    options: ShardOptions,
    estimated_bytes: int,
) -> ShardPlan:
    digest = hashlib.sha256(repr(sorted(asdict(options).items())).encode())
    for picture, size in zip(pictures, sizes, strict=True):
        parts = stable_hash(picture.name, picture.label, size)
        digest.update(parts)
    return ShardPlan(
        name=f"shard-{number:06d}.tar",
        pictures=tuple(pictures),
        keys=tuple(keys[picture.name] for picture in pictures),
        fingerprint=digest.hexdigest(),
        estimated_bytes=estimated_bytes,
    )


def make_keys(names: Sequence[str]) -> list[str]:
    """WebDataset keys for relative paths: the path without its suffix, in safe characters.

    A name that had to be changed or shortened, or whose key another one would share (a.jpg and
    a.png), gets a hash of the whole name appended.

    Raises:
        UserError: If a name occurs twice.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    plain = [_UNSAFE.sub("_", stem) for stem in stems]
    shared = Counter(
        key.lower() for key in plain
    )  # also told apart where a file system ignores case
    keys = []
    for name, stem, key in zip(names, stems, plain, strict=True):
        if (
            key != stem
            or len(key) > _MAX_KEY_LENGTH
            or shared[key.lower()] > 1
            or key.startswith("/")
        ):
            tail = key.strip("/")[-(_MAX_KEY_LENGTH - 17) :].lstrip("/")
            key = f"{tail}-{stable_hash(name, num_bytes=8).hex()}"
        keys.append(key)
    if len(set(keys)) != len(keys):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{twice}: listed twice; each picture may occur once")
    return keys


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # told as unreadable when its turn comes
