"""Open what a user named as shards: find its index or make one, and say how its tars are read.

Shards that another tool made have no index: they are scanned on first use. The index of remote
shards is kept in the cache's folder, and so is that of a pattern or of a folder that is read-only.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from common.errors import UserError
from common.files import write_bytes
from pretrain.data.index import (
    SAMPLE_DTYPE,
    ShardPart,
    load_table,
    parse_index,
    read_index,
    scan_file,
    scan_shard,
    write_index,
)
from pretrain.data.random_numbers import stable_hash
from pretrain.data.sources.cache import (
    NUM_FETCHERS,
    CacheOptions,
    RemoteShard,
    ShardCache,
    make_folder,
)
from pretrain.data.sources.locations import Location, expand, join, list_tars, parse
from pretrain.data.sources.remote import (
    RemoteFile,
    displayed,
    look_at_all,
    read_if_there,
    read_small,
)

_MAX_SCANS = 8  # local tars scanned side by side
_T = TypeVar("_T")


# -- tars by number -------------------------------------------------------------------------------


class LocalTars:
    """Tars on the local disk. They travel to workers by pickling, as `RemoteTars` do."""

    is_remote = False

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def open(self, number: int) -> int:
        """A file descriptor that the caller closes; raises OSError."""
        return os.open(self._paths[number], os.O_RDONLY)

    def name(self, number: int) -> str:
        """What to call a tar in messages."""
        return str(self._paths[number])


class RemoteTars:
    """Tars that pass through the cache."""

    is_remote = True

    def __init__(self, shards: list[RemoteShard], options: CacheOptions, remedy: str) -> None:
        self._shards, self._options, self._remedy = shards, options, remedy
        self.cache = ShardCache(options, remedy)

    def open(self, number: int) -> int:
        """A file descriptor of the shard in the cache, fetched first if need be; raises UserError.

        The caller closes it.
        """
        return self.cache.open(self._shards[number])

    def name(self, number: int) -> str:
        """The URL, and where the copy lies."""
        shard = self._shards[number]
        return f"{displayed(shard.url)} (copy: {self.cache.path(shard)})"

    def ensure(self, numbers: list[int]) -> None:
        """Fetch what is missing; raises UserError."""
        self.cache.ensure([self._shards[number] for number in numbers])

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTars, (self._shards, self._options, self._remedy)


@dataclass
class Source:
    """An opened source.

    Attributes:
        name: What the user called it, without secrets.
        folder: Where the tars are, if they are in one local folder; else where the index is.
        index_folder: Where index.json and samples.npy are.
        tars: The tars.
        index: index.json.
    """

    name: str
    folder: Path
    index_folder: Path
    tars: LocalTars | RemoteTars
    index: dict[str, Any] = field(repr=False)


def open_source(spec: str | Path, options: CacheOptions) -> Source:
    """Find the index of a source, or make it, and check that the shards are there.

    Raises:
        UserError: If anything is missing, damaged, stale, or not allowed.
    """
    location = parse(spec)
    return _open_remote(location, options) if location.is_remote else _open_local(location, options)


# -- local tars -----------------------------------------------------------------------------------


def _open_local(location: Location, options: CacheOptions) -> Source:
    if location.is_folder:
        folder = index_folder = Path(location.text)
        if not (folder / "index.json").exists():
            index_folder = _index_local(expand(folder), folder, options.place, folder.name)
        index = _read_whole_index(index_folder)
        paths = [folder / shard["name"] for shard in index["shards"]]
    else:
        paths = [Path(path) for path in expand(location.text)]
        folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        index_folder = _index_local(paths, None, options.place, location.text)
        index = _read_whole_index(index_folder)

    def stale(path: Path, what: str) -> UserError:
        return UserError(
            f"{path}: {what}: the index is stale; delete {index_folder / 'index.json'} to index "
            "the tars again"
        )

    # Every shard must be there in the size that the index says, and in a folder no other one.
    for shard, path in zip(index["shards"], paths, strict=True):
        size = _size_of(path)
        if size < shard["bytes"]:
            raise UserError(
                f"{path}: shard is cut short, {size:,} of {shard['bytes']:,} bytes; copy or make "
                "it again"
            )
        if size > shard["bytes"]:
            raise stale(path, f"{size:,} bytes instead of {shard['bytes']:,}")
    if location.is_folder:
        for path in sorted({*folder.glob("*.tar")} - {*paths}):
            raise stale(path, "a shard that the index does not know")
    return Source(location.text, folder, index_folder, LocalTars(paths), index)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(
            f"{path}: shard is missing ({error.strerror}); copy it back, correct the pattern, or "
            "make the shards again with tools/make_shards.py"
        ) from None


def _read_whole_index(folder: Path) -> dict[str, Any]:
    index = read_index(folder)
    load_table(folder, index)
    return index


def _index_local(
    tars: Sequence[str | Path], folder: Path | None, cache_folder: Path, name: str
) -> Path:
    """Index local tars on first use.

    Args:
        tars: Their paths, in the order of the index.
        folder: Where the index belongs, if it can be written.
        cache_folder: The cache's folder, for other indexes.
        name: What the progress bar calls them.
    Returns:
        The folder of the index; in the cache it depends on the tars' paths, sizes and times.
    Raises:
        UserError: If one is missing or damaged, or none holds a picture.
    """
    paths = [Path(tar) for tar in tars]
    target = folder if folder is not None and _is_writable(folder) else None
    if target is None:
        parts: list[int | str] = []
        for path in paths:
            parts += [str(path.resolve()), _size_of(path), path.stat().st_mtime_ns]
        target = cache_folder / "indexes" / stable_hash(*parts).hex()
    if not (target / "index.json").exists():
        make_folder(target)
        _scan_all(scan_file, paths, target, name, min(_MAX_SCANS, os.cpu_count() or 1))
    return target


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
            return True
    except OSError:
        return False


def _scan_all(
    scan: Callable[[_T], ShardPart], shards: Sequence[_T], target: Path, name: str, num_threads: int
) -> None:
    """Scan all shards side by side and write the index; after a failure no further scan begins."""
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(scan, shard) for shard in shards]
        try:
            bar = tqdm(futures, desc=f"indexing {name}", unit="shard")
            parts = [future.result() for future in bar]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if not any(len(part.table) for part in parts):
        raise UserError(
            f"{name}: {len(parts)} tars without a single picture; are they WebDataset shards?"
        )
    write_index(target, parts, classes=None, options={"external": True})


# -- remote tars ----------------------------------------------------------------------------------


def _open_remote(location: Location, options: CacheOptions) -> Source:
    name, cache = displayed(location.text), ShardCache(options)
    index_folder = _fetch_index(location, cache) if location.is_folder else None
    if index_folder is not None:
        index = _read_whole_index(index_folder)
        urls = [join(location.text, shard["name"]) for shard in index["shards"]]
        remedy = "upload the shards and index.json of one run of tools/make_shards.py again"
    else:
        patience = options.patience
        urls = (
            list_tars(location, patience) if location.is_folder else expand(location.text, patience)
        )
        if location.scheme == "pipe":
            files = [RemoteFile(url, None, "") for url in urls]
        else:
            files = look_at_all(urls, patience)
        index_folder = _index_remote(files, cache, name)
        index = _read_whole_index(index_folder)
        remedy = f"run again: the shards are indexed anew (or delete {index_folder})"
    shards = [
        RemoteShard(url, shard["bytes"], shard["sha256"])
        for url, shard in zip(urls, index["shards"], strict=True)
    ]
    cache.check_bound([shard.size for shard in shards])
    tars = RemoteTars(shards, options, remedy)
    return Source(name, index_folder, index_folder, tars, index)


def _index_remote(files: list[RemoteFile], cache: ShardCache, name: str) -> Path:
    """Index shards behind URLs or commands: each passes through the cache once.

    A killed run goes on where it was. Of several processes one works, the others wait.

    Args:
        files: The shards, in the order of the index.
        cache: Where they pass through.
        name: What the progress bar calls them.
    Returns:
        The folder of the index; it depends on the shards' URLs, sizes and versions.
    Raises:
        UserError: If one cannot be fetched or is damaged, or none holds a picture.
    """
    key = stable_hash(*(f"{file.url}\n{file.size}\n{file.version}" for file in files)).hex()
    target = cache.folder / "indexes" / key

    def scan(file: RemoteFile) -> ShardPart:
        saved = target / "parts" / stable_hash(file.url, file.version).hex()
        if (known := ShardPart.load(saved)) is not None:
            return known
        descriptor, size, sha256 = cache.fetch_unknown(file)
        with os.fdopen(descriptor, "rb") as stream:
            entries, skipped = scan_shard(displayed(file.url), stream)
        base = displayed(file.url).rpartition("/")[2] or "shard.tar"
        part = ShardPart.of(base, entries, skipped, size, sha256)
        part.save(saved)
        return part

    with cache.lock(f"index-{key}"):
        if not (target / "index.json").exists():
            make_folder(target / "parts")
            _scan_all(scan, files, target, name, NUM_FETCHERS)
            shutil.rmtree(target / "parts")
    return target


def _fetch_index(location: Location, cache: ShardCache) -> Path | None:
    """Bring index.json and its table into the cache; None if the folder has no index.json.

    The index is fetched at every opening. Its shards are looked at when this version of it is
    seen for the first time; later each is checked when it is fetched.
    """
    url, patience = join(location.text, "index.json"), cache.options.patience
    data = read_if_there(url, patience)
    if data is None:
        return None
    key = hashlib.sha256(location.text.encode() + b"\n" + data).hexdigest()
    target = cache.folder / "indexes" / key
    with cache.lock(f"index-{key}"):
        if (target / "index.json").exists():
            return target
        make_folder(target)
        index = parse_index(data, displayed(url))
        table_url = join(location.text, index["samples"])
        limit = index["num_samples"] * SAMPLE_DTYPE.itemsize + 4096  # a header is 128 bytes
        table = read_small(table_url, patience, limit)
        if hashlib.sha256(table).hexdigest() != index["samples_sha256"]:
            raise UserError(
                f"{displayed(table_url)}: its SHA-256 is not the one in index.json: one of them is "
                "stale; upload both again"
            )
        write_bytes(target / index["samples"], table)
        urls = [join(location.text, shard["name"]) for shard in index["shards"]]
        for shard, file in zip(index["shards"], look_at_all(urls, patience), strict=True):
            if file.size is not None and file.size != shard["bytes"]:
                raise UserError(
                    f"{displayed(file.url)}: {file.size:,} bytes instead of {shard['bytes']:,}: "
                    "the shard was cut short or changed, or index.json is stale; upload both again"
                )
        write_bytes(target / "index.json", data)
    return target
