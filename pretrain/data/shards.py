"""Samples of WebDataset shards by number: the index, its checks, random access inside tars."""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.foreign import index_foreign
from pretrain.data.shard_job import DiskFullError
from pretrain.data.shard_verify import VerifyReport, verify_shards
from pretrain.data.shard_writer import ShardOptions, SourcePicture, WriteReport, write_shards
from pretrain.data.tar_index import NO_LABEL, SAMPLE_DTYPE, file_sha256, read_index, scan_shard
from pretrain.errors import UserError

__all__ = [
    "DiskFullError",
    "ShardIndex",
    "ShardOptions",
    "SourcePicture",
    "VerifyReport",
    "WriteReport",
    "verify_shards",
    "write_shards",
]

_MAX_OPEN_FILES = 64  # per process; a shuffle window touches a handful of shards at a time
_TAR_BLOCK = 512


class ShardIndex:
    """The samples of a shard set, by number.

    Attributes:
        folder: Where the tars are.
        num_samples: Number of samples.
        shard_sizes: Number of samples of each shard.
        classes: Class names, or None.
        samples: Memory-mapped table, one row per sample (SAMPLE_DTYPE).
        labels: int64 [num_samples]; -1 where there is none.
        skipped: What was left out when the index was made: [{"file", "reason"}].
    """

    is_remote = False

    def __init__(self, folder: Path, index_folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self._index_folder = index_folder
        self._index = index
        self.num_samples: int = index["num_samples"]
        self.classes: list[str] | None = index["classes"]
        self.skipped: list[dict[str, str]] = index["skipped"]
        self.shard_names: list[str] = [shard["name"] for shard in index["shards"]]
        self.shard_sizes: list[int] = [shard["num_samples"] for shard in index["shards"]]
        self.samples: np.ndarray = np.load(index_folder / index["samples"], mmap_mode="r")
        self._files: OrderedDict[int, int] = OrderedDict()
        self._files_owner = os.getpid()
        self._names: dict[int, dict[int, str]] = {}

    @classmethod
    def open(cls, path: str | Path) -> "ShardIndex":
        """Open a shard set and check that every shard is there in the size the index gives.

        A folder of tars without index.json (made by webdataset or tar) is indexed on first use.

        Args:
            path: Folder with index.json, or with tars.
        Raises:
            UserError: If the folder, the index or a shard is missing, or their sizes differ.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder of shards; make one with tools/make_shards.py"
            )
        index_folder = folder if (folder / "index.json").exists() else index_foreign(folder)
        index = read_index(index_folder / "index.json")
        _check_table(index_folder, index)
        _check_shards(folder, index_folder, index)
        return cls(folder, index_folder, index)

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
        offset, size = int(row["offset"]), int(row["size"])
        try:
            data = os.pread(self._file(int(row["shard"])), _TAR_BLOCK + size, offset - _TAR_BLOCK)
        except OSError as error:
            raise UserError(
                f"{self.describe(i)}: cannot be read ({error.strerror}); is the disk still there?"
            ) from error
        if len(data) < _TAR_BLOCK + size or not _header_fits(data, size):
            raise UserError(
                f"{self.describe(i)}: the shard does not hold what the index says; it was changed "
                "or cut short: "
                f"make the shard again, or delete {self._index_folder / 'index.json'} to index "
                "the tars again"
            )
        return data[_TAR_BLOCK:]

    def read_many(self, sample_ids: np.ndarray) -> list[bytes]:
        """The encoded pictures of some samples, in the order asked for."""
        return [self.read_bytes(int(i)) for i in sample_ids]

    def fetch(self, sample_ids: np.ndarray) -> None:
        """Make sure that the shards of these samples are on this machine."""

    @property
    def fingerprint(self) -> str:
        """Hash of what the samples and their shards are, wherever they lie."""
        digest = hashlib.sha256(self._index["samples_sha256"].encode())
        for shard in self._index["shards"]:
            digest.update(shard["sha256"].encode())
        return digest.hexdigest()

    def key_name(self, i: int) -> str:
        """WebDataset key of sample `i`; reads the headers of its shard once."""
        shard = int(self.samples[i]["shard"])
        if shard not in self._names:
            entries, _ = scan_shard(self.folder / self.shard_names[shard])
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
        return (
            f"sample {i}{key} in {self.folder / self.shard_names[int(row['shard'])]} at byte "
            f"{int(row['offset'])}"
        )

    def _file(self, shard: int) -> int:
        if self._files_owner != os.getpid():  # a forked worker leaves its parent's files alone
            self._files, self._files_owner = OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.folder / self.shard_names[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the open shards; they open again when needed."""
        if self._files_owner == os.getpid():
            while self._files:
                os.close(self._files.popitem()[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.folder, self._index_folder, self._index)


def _header_fits(data: bytes, size: int) -> bool:
    """True if the tar header before the picture gives the picture's size."""
    field = data[124:136]
    if field[0] & 0x80:  # base-256, for members of 8 GiB and more
        return int.from_bytes(field[1:], "big") == size
    try:
        return int(field.strip(b" \0") or b"0", 8) == size
    except ValueError:
        return False


def _check_table(folder: Path, index: dict[str, Any]) -> None:
    path = folder / index["samples"]
    remedy = "delete index.json and run again to index the tars, or make the shards again"
    if not path.exists():
        raise UserError(f"{path}: missing; {remedy}")
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error
    if table.dtype != SAMPLE_DTYPE or len(table) != index["num_samples"]:
        raise UserError(
            f"{path}: does not fit index.json ({index['num_samples']} samples); {remedy}"
        )
    if file_sha256(path) != index["samples_sha256"]:
        raise UserError(f"{path}: its SHA-256 is not the one in index.json; {remedy}")


def _check_shards(folder: Path, index_folder: Path, index: dict[str, Any]) -> None:
    for shard in index["shards"]:
        path = folder / shard["name"]
        try:
            size = path.stat().st_size
        except OSError:
            raise UserError(
                f"{path}: shard is missing; copy it back, or make the shards again with "
                "tools/make_shards.py"
            ) from None
        if size < shard["bytes"]:
            raise UserError(
                f"{path}: shard is cut short, {size:,} of {shard['bytes']:,} bytes; copy or make "
                "it again"
            )
        if size > shard["bytes"]:
            raise UserError(
                _stale(path, index_folder, f"{size:,} bytes instead of {shard['bytes']:,}")
            )
    known = {shard["name"] for shard in index["shards"]}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            raise UserError(_stale(path, index_folder, "a shard that the index does not know"))


def _stale(path: Path, index_folder: Path, what: str) -> str:
    return (
        f"{path}: {what}: the index is stale; delete {index_folder / 'index.json'} to index the "
        "tars again"
    )
