"""Samples by number: one shard set, chosen samples of it, or several sets mixed by weight.

All three read as `Samples`. Each sample lies in a tar of a `ShardIndex`, which reads it by its
place; the other two only translate numbers.
"""

import hashlib
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, printable, require
from pretrain.data.cache import CacheOptions, touch
from pretrain.data.index import NO_LABEL, sample_hash, scan_shard
from pretrain.data.order import SourceSizes
from pretrain.data.random_numbers import stable_hash
from pretrain.data.sources import Source, open_source

_MAX_OPEN_FILES = 64  # per process; a shuffle window touches a handful of shards at a time
_MAX_NAMED_SHARDS = 8  # whose keys are kept in memory
_TOUCH_SECONDS = 1.0  # between two marks in the cache that an open shard is used
_TAR_BLOCK = 512
_MAX_CLASSES = 10_000  # without names and in a set with fewer samples


class Samples:
    """Samples by number. By default a method calls that of the sets that hold the samples.

    Attributes:
        num_samples: How many there are.
        classes: Class names, or None.
        samples: Table with one row per sample (SAMPLE_DTYPE), indexed by numbers or slices.
        left_out: Files of the tars of other tools that are no samples: [{"file", "reason"}]; what
            was packed here was bounded.
        sources: Sizes and weights for the order of an epoch.
        is_remote: True if shards pass through the cache.
        fingerprint: Hash of what the samples are, wherever they lie.
    """

    num_samples: int
    classes: list[str] | None
    samples: Any
    left_out: list[dict[str, Any]]
    sources: list[SourceSizes]
    is_remote: bool
    fingerprint: str

    def places(self, sample_ids: np.ndarray) -> list[tuple["ShardIndex", np.ndarray, np.ndarray]]:
        """For each set that holds some samples: itself, their positions here, their numbers there.

        Args:
            sample_ids: int64 [n].
        Raises:
            IndexError: If there is no such sample.
        """
        raise NotImplementedError

    @property
    def labels(self) -> np.ndarray:
        """Labels of all samples, int64 [num_samples]; -1 where there is none."""
        return self.samples[:]["label"].astype(np.int64)

    def read_many(self, sample_ids: Sequence[int] | np.ndarray) -> list[memoryview]:
        """The encoded pictures of some samples, in the order of `sample_ids`, not copied.

        They are announced to the system, then read shard by shard in the order of their place.

        Args:
            sample_ids: Numbers of samples [n]; one may come twice.
        Raises:
            UserError: If a shard has changed or vanished since it was opened.
        """
        pictures = [memoryview(b"")] * len(sample_ids)
        for index, rows, own in self.places(np.asarray(sample_ids, np.int64)):
            for row, data in zip(rows.tolist(), index.read_many(own), strict=True):
                pictures[row] = data
        return pictures

    def read_bytes(self, i: int) -> bytes:
        """The encoded picture of sample `i`; raises as `read_many`."""
        return bytes(self.read_many([i])[0])

    def fetch(self, sample_ids: Sequence[int] | np.ndarray) -> None:
        """Make sure that the shards of these samples are in the cache; local ones are here already.

        Shards that the cache cannot hold together are left to their readers.

        Raises:
            UserError: If a shard cannot be fetched.
        """
        for index, _, own in self.places(np.asarray(sample_ids, np.int64)):
            index.fetch(own)

    def key_name(self, i: int) -> str:
        """WebDataset key of sample `i`; reads the headers of its shard once."""
        ((index, _, own),) = self.places(np.array([i]))
        return index.key_name(int(own[0]))

    def describe(self, i: int) -> str:
        """What to call sample `i` in a message: its number, key, shard and place."""
        ((index, _, own),) = self.places(np.array([i]))
        return index.describe(int(own[0]))


class ShardIndex(Samples):
    """The samples of a shard set.

    Attributes:
        name: What the user called the set, without passwords and tokens.
        folder: Where the tars are; if they are not in one local folder, where the index is.
        shard_names: File names of the shards.
        shard_sizes: Number of samples of each shard.
        shard_bytes: Bytes of each shard's tar.
        options: What the set was made with; {"external": True} if another tool made it.
        skipped: What was left out when the set was made, and with "kept" what is missing of its
            samples: [{"file", "reason"}].
        samples: Memory-mapped.
    """

    def __init__(self, source: Source) -> None:
        index = source.index
        self._source, self.name, self.folder = source, source.name, source.folder
        self.num_samples = index["num_samples"]
        self.classes = index["classes"]
        self.skipped: list[dict[str, Any]] = index["skipped"]
        self.shard_names: list[str] = [shard["name"] for shard in index["shards"]]
        self.shard_sizes: list[int] = [shard["num_samples"] for shard in index["shards"]]
        self.shard_bytes: list[int] = [shard["bytes"] for shard in index["shards"]]
        self.sources = [SourceSizes(self.shard_sizes)]
        self.options: dict[str, Any] = index["options"]
        is_external = bool(self.options.get("external"))
        self.left_out = [one for one in self.skipped if is_external and "kept" not in one]
        self.samples: np.ndarray = np.load(source.index_folder / index["samples"], mmap_mode="r")
        self.is_remote = source.cache is not None
        hashes = [index["samples_sha256"], *(shard["sha256"] for shard in index["shards"])]
        self.fingerprint = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        self._files: OrderedDict[int, int] = OrderedDict()
        self._used: dict[int, float] = {}  # shard: when its use was last marked in the cache
        self._files_owner, self._swept = os.getpid(), time.monotonic()
        self._names: dict[int, dict[tuple[int, int], str]] = {}  # by offset and hash, per shard

    @classmethod
    def open(cls, path: str | Path, cache: CacheOptions | None = None) -> "ShardIndex":
        """Open a shard set and check that every shard is there in the size the index gives.

        Tars without index.json (made by webdataset or tar) are indexed on first use.

        Args:
            path: A folder with index.json or with tars, a pattern of tars, a URL of either, or
                ``pipe:`` commands (docs/shards.md).
            cache: Where remote shards are kept; by default in the user's cache folder.
        Raises:
            UserError: If the folder, the index or a shard is missing, their sizes differ, or a
                server cannot be read.
        """
        return cls(open_source(path, cache or CacheOptions()))

    def read_many(self, sample_ids: Sequence[int] | np.ndarray) -> list[memoryview]:
        """See `Samples`."""
        ids = np.asarray(sample_ids, np.int64)
        rows = self.samples[ids]
        order = np.lexsort((rows["offset"], rows["shard"]))
        columns = (order, ids[order], *(rows[name][order] for name in ("shard", "offset", "size")))
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        if hasattr(os, "posix_fadvise"):
            for _, _, shard, offset, size in places:
                start, num_bytes = offset - _TAR_BLOCK, size + _TAR_BLOCK
                try:
                    file = self._file(shard)
                    os.posix_fadvise(file, start, num_bytes, os.POSIX_FADV_WILLNEED)
                except OSError:
                    continue  # what fails here is reported when it is read
        pictures = [memoryview(b"")] * len(ids)
        for k, i, shard, offset, size in places:
            pictures[k] = self._read(i, shard, offset, size)
        self._sweep()
        return pictures

    def fetch(self, sample_ids: Sequence[int] | np.ndarray) -> None:
        """See `Samples`."""
        if self._source.cache is not None:
            shards = dict.fromkeys(self.samples["shard"][np.asarray(sample_ids, np.int64)].tolist())
            self._source.cache.ensure([self._source.shards[number] for number in shards])

    def key_name(self, i: int) -> str:
        """See `Samples`."""
        shard = int(self.samples[i]["shard"])
        if shard not in self._names:
            with os.fdopen(self._source.open(shard), "rb") as stream:
                entries, _ = scan_shard(self._source.name_of(shard), stream)
            if len(self._names) >= _MAX_NAMED_SHARDS:
                self._names.clear()
            names = {(entry.offset, sample_hash(entry.name)): entry.name for entry in entries}
            self._names[shard] = names
        place = int(self.samples[i]["offset"]), int(self.samples[i]["key"])
        return self._names[shard].get(place, f"sample-{i}")

    def describe(self, i: int) -> str:
        """See `Samples`."""
        row = self.samples[i]
        tar = self._source.name_of(int(row["shard"]))
        try:
            key = f" {self.key_name(i)!r}"
        except (UserError, OSError):
            key = ""
        return f"sample {i}{key} in {tar} at byte {row['offset']}"

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
            raise UserError(f"{self.describe(i)}: cannot be read ({error.strerror})") from error
        if len(data) < _TAR_BLOCK + size or not _header_fits(data, size):
            index = self._source.index_folder / "index.json"
            copy = "delete the copy to fetch it again, or " if self.is_remote else ""
            raise UserError(
                f"{self.describe(i)}: the shard does not hold what the index says; it was changed "
                f"or cut short: {copy}make it again, or delete {index} to index it again"
            )
        return memoryview(data)[_TAR_BLOCK:]

    def _file(self, shard: int) -> int:
        """The descriptor of a shard, opened if need be."""
        if self._files_owner != os.getpid():  # a forked worker leaves its parent's files alone
            self._files, self._files_owner = OrderedDict(), os.getpid()
        now = time.monotonic()
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = self._source.open(shard)
            self._used[shard] = now
        elif self.is_remote and now - self._used[shard] > _TOUCH_SECONDS:
            touch(self._files[shard])  # the least recently used goes first
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


class Subset(Samples):
    """Chosen samples of a shard set, numbered anew in the order of their numbers there.

    Keys stay those of the samples, so that each is augmented as in the whole set.

    Args:
        parent: The whole set.
        sample_ids: int64 [n], the chosen ones, each once.
    Attributes:
        sample_ids: int64 [n], ascending: the number in the whole set of each sample here.
    """

    def __init__(self, parent: ShardIndex, sample_ids: np.ndarray) -> None:
        self.parent = parent
        self.sample_ids = np.unique(np.asarray(sample_ids, np.int64))
        assert len(self.sample_ids) == len(sample_ids), "a sample is chosen twice"
        self.name, self.classes, self.left_out = parent.name, parent.classes, parent.left_out
        self.num_samples, self.is_remote = len(self.sample_ids), parent.is_remote
        self.samples = parent.samples[self.sample_ids]
        counts = np.bincount(self.samples["shard"]).tolist()
        self.sources = [SourceSizes([count for count in counts if count])]
        self.fingerprint = stable_hash(parent.fingerprint, self.sample_ids.tobytes().hex()).hex()

    def places(self, sample_ids: np.ndarray) -> list[tuple[ShardIndex, np.ndarray, np.ndarray]]:
        """See `Samples`."""
        return [(self.parent, np.arange(len(sample_ids)), self.sample_ids[sample_ids])]


class Mixture(Samples):
    """Samples of several shard sets under one row of numbers.

    Keys of all but the first set are mixed with the set's number, so that pictures of the same name
    in two sets are augmented independently. Labels are kept only if all sets have the same classes.

    Args:
        sets: In the order of their sample numbers.
        weights: For each set, how often each of its samples comes per epoch; above 0.
    """

    def __init__(self, sets: Sequence[ShardIndex], weights: Sequence[float]) -> None:
        self.sets = list(sets)
        sizes = [one.num_samples for one in sets]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_samples = int(self._first[-1])
        self.left_out = [item for one in sets for item in one.left_out]
        pairs = list(zip(sets, weights, strict=True))
        self.sources = [SourceSizes(one.shard_sizes, weight) for one, weight in pairs]
        self.has_common_classes = all(one.classes == sets[0].classes for one in sets)
        self.classes = sets[0].classes if self.has_common_classes else None
        self.is_remote = any(one.is_remote for one in sets)
        parts = [f"{one.fingerprint} {float(weight)!r}" for one, weight in pairs]
        self.fingerprint = stable_hash(*parts).hex()
        self.samples = _MixedTable(self)

    def places(self, sample_ids: np.ndarray) -> list[tuple[ShardIndex, np.ndarray, np.ndarray]]:
        """See `Samples`."""
        wrong = (sample_ids < 0) | (sample_ids >= self.num_samples)
        if wrong.any():
            raise IndexError(f"sample {sample_ids[wrong][0]} of {self.num_samples}")
        which = np.searchsorted(self._first, sample_ids, side="right") - 1
        places = []
        for number in np.unique(which).tolist():
            rows = np.flatnonzero(which == number)
            places.append((self.sets[number], rows, sample_ids[rows] - self._first[number]))
        return places


class _MixedTable:
    """The table of a mixture, one part per set; nothing is copied until rows are read."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __getitem__(self, which: Any) -> np.ndarray:
        mixture = self._mixture
        ids = np.arange(mixture.num_samples)[which] if isinstance(which, slice) else which
        row_ids = np.atleast_1d(np.asarray(ids, np.int64))
        table = np.empty(len(row_ids), mixture.sets[0].samples.dtype)
        for index, rows, own in mixture.places(row_ids):
            part = index.samples[own]
            if number := mixture.sets.index(index):
                salt = np.frombuffer(stable_hash("source", number, num_bytes=8), "<u8")
                part["key"] ^= salt[0]
            if not mixture.has_common_classes:
                part["label"] = NO_LABEL
            table[rows] = part
        return table if np.ndim(ids) else table[0]


def open_samples(
    spec: str | Sequence[str] | Mapping[str, float], cache: CacheOptions | None = None
) -> Samples:
    """Open one shard set, or several as a mixture.

    Args:
        spec: What `ShardIndex.open` takes; a list of such; or a mapping from such to weights. As
            ``DataConfig`` lets it pass.
        cache: Where remote shards are kept; all sets share it.
    Raises:
        UserError: All that `ShardIndex.open` refuses.
    """
    if isinstance(spec, str):
        return ShardIndex.open(spec, cache)
    weights = dict(spec) if isinstance(spec, Mapping) else dict.fromkeys(spec, 1.0)
    sets = [ShardIndex.open(name, cache) for name in weights]
    if list(weights.values()) == [1.0]:
        return sets[0]
    return Mixture(sets, list(weights.values()))


def num_classes(samples: Samples, what: str) -> int:
    """How many classes the labels of a set may name: the named ones, or the largest label and one.

    Args:
        samples: The set.
        what: To call it in messages.
    Raises:
        UserError: If unnamed labels are so large that they are no class numbers.
    """
    if samples.classes:
        return len(samples.classes)
    most, limit = int(samples.labels.max(initial=-1)), max(samples.num_samples, _MAX_CLASSES)
    require(
        most < limit,
        f"{what}: label {most} among {samples.num_samples} samples: labels are class numbers 0, 1, "
        f".., here below {limit}; correct the .cls files, or make the shards again",
    )
    return most + 1


def open_labelled(sets: Mapping[str, str], cache: CacheOptions | None = None) -> list[ShardIndex]:
    """Open shard sets for an evaluation: each sample has a label, and all have the same classes.

    Args:
        sets: By the option that names each one, what `ShardIndex.open` takes.
        cache: Where remote shards are kept.
    Raises:
        UserError: If a set is empty, a sample has no label, or the classes differ.
    """
    indexes = [ShardIndex.open(path, cache) for path in sets.values()]
    first = indexes[0]
    for option, index in zip(sets, indexes, strict=True):
        num, unlabelled = index.num_samples, int((index.labels < 0).sum())
        lacks = f"{option} {index.name}: {unlabelled} of {num} samples have no label"
        remedy = "make the shards of class folders with make_shards.py --labels folders"
        require(unlabelled == 0 < num, f"{lacks}; {remedy}")
        num_classes(index, f"{option} {index.name}")
        if left_out := index.left_out:
            some = f"{len(left_out)} files of its tars are no samples, as {left_out[0]['file']}"
            text = f"warning: {option} {index.name}: {some}: {left_out[0]['reason']}"
            print(printable(text), file=sys.stderr)
        different = sorted(set(index.classes or []) ^ set(first.classes or []))
        require(
            index.classes == first.classes,
            f"{option} {index.name}: other classes than {next(iter(sets))} {first.name} "
            f"({', '.join(different[:3]) or 'another order'}); make both of the same class folders",
        )
    return indexes
