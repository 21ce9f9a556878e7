"""Samples of WebDataset shards by number: the index, its checks, random access inside tars."""

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from pretrain.data.index import NO_LABEL, scan_shard
from pretrain.data.sources.cache import CacheOptions
from pretrain.data.sources.opening import Source, open_source

_MAX_OPEN_FILES = 64  # per process; a shuffle window touches a handful of shards at a time
_TOUCH_SECONDS = 1.0  # how often the cache hears that an open shard is used
_TAR_BLOCK = 512


class ShardIndex:
    """The samples of a shard set, by number.

    Attributes:
        name: What the user called the set, without passwords and tokens.
        folder: Where the tars are; if they are not in one local folder, where the index is.
        num_samples: Number of samples.
        shard_names: File names of the shards.
        shard_sizes: Number of samples of each shard.
        shard_bytes: Bytes of each shard's tar.
        options: What the set was made with; {"foreign": True} if another tool made it.
        classes: Class names, or None.
        samples: Memory-mapped table, one row per sample (SAMPLE_DTYPE).
        skipped: What was left out when the index was made: [{"file", "reason"}].
    """

    def __init__(self, source: Source) -> None:
        index = source.index
        self._source, self._tars = source, source.tars
        self.name, self.folder = source.name, source.folder
        self.num_samples: int = index["num_samples"]
        self.classes: list[str] | None = index["classes"]
        self.skipped: list[dict[str, str]] = index["skipped"]
        self.shard_names: list[str] = [shard["name"] for shard in index["shards"]]
        self.shard_sizes: list[int] = [shard["num_samples"] for shard in index["shards"]]
        self.shard_bytes: list[int] = [shard["bytes"] for shard in index["shards"]]
        self.options: dict[str, Any] = index["options"]
        self.samples: np.ndarray = np.load(source.index_folder / index["samples"], mmap_mode="r")
        self._files: OrderedDict[int, int] = OrderedDict()
        self._used: dict[int, float] = {}  # shard: when the cache heard of its use
        self._files_owner, self._swept = os.getpid(), time.monotonic()
        self._names: dict[int, dict[int, str]] = {}

    @classmethod
    def open(cls, path: str | Path, cache: CacheOptions | None = None) -> "ShardIndex":
        """Open a shard set and check that every shard is there in the size the index gives.

        Tars without index.json (made by webdataset or tar) are indexed on first use.

        Args:
            path: A folder with index.json or with tars, a pattern of tars, a URL of either, or
                ``pipe:`` commands (docs/sources.md).
            cache: Where remote shards are kept; by default in the user's cache folder.
        Raises:
            UserError: If the folder, the index or a shard is missing, their sizes differ, or a
                server cannot be read.
        """
        return cls(open_source(path, cache or CacheOptions()))

    @property
    def is_remote(self) -> bool:
        """True if the shards pass through the cache."""
        return self._tars.is_remote

    @property
    def fingerprint(self) -> str:
        """Hash of what the samples and the bytes of their shards are, wherever they lie."""
        index = self._source.index
        hashes = [index["samples_sha256"], *(shard["sha256"] for shard in index["shards"])]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        """Labels of all samples, int64 [num_samples]; -1 where there is none."""
        return self.samples["label"].astype(np.int64)

    @property
    def has_labels(self) -> bool:
        """True if every sample has a label."""
        return self.num_samples > 0 and bool((self.samples["label"] != NO_LABEL).all())

    def read_bytes(self, i: int) -> bytes:
        """The encoded picture of sample `i`.

        Raises:
            UserError: If the shard has changed or vanished since it was opened.
        """
        row = self.samples[i]
        data = self._read(i, int(row["shard"]), int(row["offset"]), int(row["size"]))
        self._sweep()
        return bytes(data)

    def read_many(self, sample_ids: Sequence[int] | np.ndarray) -> list[memoryview]:
        """The encoded pictures of some samples, in the order asked for, not copied.

        They are read shard by shard in the order of their place, after the system was told of all.

        Args:
            sample_ids: Numbers of samples [n]; one may come twice.
        Raises:
            UserError: As `read_bytes`.
        """
        ids = np.asarray(sample_ids, dtype=np.int64)
        rows = self.samples[ids]
        order = np.lexsort((rows["offset"], rows["shard"]))
        columns = (order, ids[order], *(rows[name][order] for name in ("shard", "offset", "size")))
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        if hasattr(os, "posix_fadvise"):
            for _, _, shard, offset, size in places:
                self._announce(shard, offset, size)
        found = [memoryview(b"")] * len(ids)
        for k, i, shard, offset, size in places:
            found[k] = self._read(i, shard, offset, size)
        self._sweep()
        return found

    def fetch(self, sample_ids: Sequence[int] | np.ndarray) -> None:
        """Make sure that the shards of these samples are in the cache; local ones are here already.

        Shards that the cache cannot hold together are left to their readers.

        Raises:
            UserError: If a shard cannot be fetched.
        """
        if self.is_remote:
            shards = self.samples["shard"][np.asarray(sample_ids, dtype=np.int64)]
            self._tars.ensure([int(shard) for shard in dict.fromkeys(shards.tolist())])

    def key_name(self, i: int) -> str:
        """WebDataset key of sample `i`; reads the headers of its shard once."""
        shard = int(self.samples[i]["shard"])
        if shard not in self._names:
            with os.fdopen(self._tars.open(shard), "rb") as stream:
                entries, _ = scan_shard(self._tars.name(shard), stream)
            if len(self._names) > 8:
                self._names.clear()
            self._names[shard] = {entry.offset: entry.name for entry in entries}
        return self._names[shard].get(int(self.samples[i]["offset"]), f"sample-{i}")

    def describe(self, i: int) -> str:
        """What to call sample `i` in a message: its number, key, shard and place."""
        row = self.samples[i]
        try:
            key = f" {self.key_name(i)!r}"
        except (UserError, OSError):
            key = ""
        return f"sample {i}{key} in {self._tars.name(int(row['shard']))} at byte {row['offset']}"

    def close(self) -> None:
        """Close the open shards; they open again when needed."""
        if self._files_owner == os.getpid():
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files_owner"):  # not if opening it failed
            self.close()

    def _read(self, i: int, shard: int, offset: int, size: int) -> memoryview:
        try:
            data = os.pread(self._file(shard), _TAR_BLOCK + size, offset - _TAR_BLOCK)
        except OSError as error:
            raise UserError(
                f"{self.describe(i)}: cannot be read ({error.strerror}); is the disk still there?"
            ) from error
        if len(data) < _TAR_BLOCK + size or not _header_fits(data, size):
            raise UserError(
                f"{self.describe(i)}: the shard does not hold what the index says; it was changed "
                f"or cut short: {self._remedy()}"
            )
        return memoryview(data)[_TAR_BLOCK:]

    def _remedy(self) -> str:
        path = self._source.index_folder / "index.json"
        if self.is_remote:
            return f"delete the copy to fetch it again; if that changes nothing, delete {path} too"
        return f"make the shard again, or delete {path} to index the tars again"

    def _announce(self, shard: int, offset: int, size: int) -> None:
        """Tell the system that a sample will be read; what fails here is told when it is read."""
        start, size = offset - _TAR_BLOCK, size + _TAR_BLOCK
        try:
            os.posix_fadvise(self._file(shard), start, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            return

    def _file(self, shard: int) -> int:
        if self._files_owner != os.getpid():  # a forked worker leaves its parent's files alone
            self._files, self._files_owner = OrderedDict(), os.getpid()
        now = time.monotonic()
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = self._tars.open(shard)
            self._used[shard] = now
        elif self.is_remote and now - self._used[shard] > _TOUCH_SECONDS:
            self._tars.touch(self._files[shard])
            self._used[shard] = now
        self._files.move_to_end(shard)
        return self._files[shard]

    def _sweep(self) -> None:
        """Close shards that the cache has thrown out: their bytes lie on the disk uncounted."""
        now = time.monotonic()
        if not self.is_remote or now - self._swept < _TOUCH_SECONDS:
            return
        self._swept = now
        for shard, file in list(self._files.items()):
            if os.fstat(file).st_nlink == 0:
                os.close(self._files.pop(shard))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self._source,)


def _header_fits(data: bytes, size: int) -> bool:
    """True if the tar header before the picture gives the picture's size."""
    field = data[124:136]
    if field[0] & 0x80:  # base-256, for members of 8 GiB and more
        return int.from_bytes(field[1:], "big") == size
    try:
        return int(field.strip(b" \0") or b"0", 8) == size
    except ValueError:
        return False
