"""Open what a user named as shards: find or make its index, and say how its tars are read."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import UserError
from common.files import sha256_of, write_bytes
from pretrain.data.index import SAMPLE_DTYPE, read_index
from pretrain.data.sources import foreign
from pretrain.data.sources.cache import CacheOptions, ShardCache, Wanted, touch
from pretrain.data.sources.locations import (
    Location,
    check_name,
    expand,
    join,
    list_without_index,
    parse,
)
from pretrain.data.sources.remote import (
    BytesSink,
    Patience,
    RemoteFile,
    download,
    look,
    look_at_all,
    read_if_there,
    shown,
)

_REMEDY = "delete index.json and run again to index the tars, or make the shards again"


def check_index(index: dict[str, Any], where: str) -> None:
    """Refuse an index whose entries are missing, of another kind, or lead out of the folder.

    Raises:
        UserError: Naming the first such entry.
    """
    try:
        for shard in index["shards"]:
            check_name(shard["name"], where)
            is_hash = len(shard["sha256"]) == 64 and set(shard["sha256"]) <= set("0123456789abcdef")
            if not is_hash or int(shard["bytes"]) < 0:
                raise ValueError(f"shard {shard['name']!r}: bytes or sha256 are impossible")
        total = sum(int(shard["num_samples"]) for shard in index["shards"])
        if total != int(index["num_samples"]):
            raise ValueError(f"{total} samples in the shards, num_samples {index['num_samples']}")
        if "/" in check_name(index["samples"], where):
            raise ValueError("samples must be a file beside index.json")
        for name in ("classes", "skipped", "samples_sha256"):
            if name not in index:
                raise KeyError(name)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: damaged index ({type(error).__name__}: {error}); make the shards again"
        ) from None


def check_table(folder: Path, index: dict[str, Any]) -> None:
    """Refuse a table of samples that does not fit its index.

    Raises:
        UserError: If it is missing, unreadable, of another length, or of another hash.
    """
    path = folder / index["samples"]
    if not path.exists():
        raise UserError(f"{path}: missing; {_REMEDY}")
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    if table.dtype != SAMPLE_DTYPE or len(table) != index["num_samples"]:
        raise UserError(
            f"{path}: does not fit index.json ({index['num_samples']} samples); {_REMEDY}"
        )
    if sha256_of(path) != index["samples_sha256"]:
        raise UserError(f"{path}: its SHA-256 is not the one in index.json; {_REMEDY}")
    sizes = [shard["num_samples"] for shard in index["shards"]]
    is_inside = not len(table) or int(table["shard"].max()) < len(sizes)
    if not is_inside or (np.bincount(table["shard"], minlength=len(sizes)) != sizes).any():
        raise UserError(f"{path}: its shards are not those of index.json; {_REMEDY}")


def check_local_shards(paths: list[Path], index_folder: Path, index: dict[str, Any]) -> None:
    """Refuse shards that are missing, or of another size than the index says.

    Raises:
        UserError: Naming the first such shard.
    """
    for shard, path in zip(index["shards"], paths, strict=True):
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
            raise stale(path, index_folder, f"{size:,} bytes instead of {shard['bytes']:,}")


def check_no_others(folder: Path, index_folder: Path, index: dict[str, Any]) -> None:
    """Refuse tars in the folder that the index does not know.

    Raises:
        UserError: Naming the first such tar.
    """
    known = {shard["name"] for shard in index["shards"]}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            raise stale(path, index_folder, "a shard that the index does not know")


def stale(path: Path, index_folder: Path, what: str) -> UserError:
    """The error about an index that no longer fits its shards."""
    return UserError(
        f"{path}: {what}: the index is stale; delete {index_folder / 'index.json'} to index the "
        "tars again"
    )


class Tars(Protocol):
    """The tars of a source, by number. They travel to workers by pickling."""

    @property
    def is_remote(self) -> bool:
        """True if they must be fetched."""
        ...

    def open(self, number: int) -> int:
        """A file descriptor that the caller closes."""
        ...

    def name(self, number: int) -> str:
        """What to call a tar in messages."""
        ...

    def ensure(self, numbers: list[int]) -> None:
        """Make sure that these are on this machine."""

    def touch(self, descriptor: int) -> None:
        """Say that an open tar is being used."""


class LocalTars:
    """Tars on the local disk."""

    is_remote = False

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def open(self, number: int) -> int:
        """Open the tar; raises OSError."""
        return os.open(self._paths[number], os.O_RDONLY)

    def name(self, number: int) -> str:
        """The path."""
        return str(self._paths[number])

    def ensure(self, numbers: list[int]) -> None:
        """They are here already."""

    def touch(self, descriptor: int) -> None:
        """Nobody asks when a local tar was used."""


class RemoteTars:
    """Tars that pass through the cache."""

    is_remote = True

    def __init__(self, wanted: list[Wanted], options: CacheOptions, remedy: str) -> None:
        self._wanted, self._options, self._remedy = wanted, options, remedy
        self.cache = ShardCache(options, remedy)

    def open(self, number: int) -> int:
        """Open the shard in the cache, fetched first if need be; raises UserError."""
        return self.cache.open(self._wanted[number])

    def name(self, number: int) -> str:
        """The URL, and where the copy lies."""
        wanted = self._wanted[number]
        return f"{shown(wanted.url)} (copy: {self.cache.path(wanted)})"

    def ensure(self, numbers: list[int]) -> None:
        """Fetch what is missing; raises UserError."""
        self.cache.ensure([self._wanted[number] for number in numbers])

    def touch(self, descriptor: int) -> None:
        """The least recently used goes first."""
        touch(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTars, (self._wanted, self._options, self._remedy)


@dataclass
class Source:
    """An opened source.

    Attributes:
        name: What the user called it, without secrets.
        folder: Where the tars are, if they are in one local folder; else where the index is.
        index_folder: Where index.json and samples.npy are.
        index: index.json.
        tars: The tars.
    """

    name: str
    folder: Path
    index_folder: Path
    tars: Tars
    index: dict[str, Any] = field(repr=False)


def open_source(spec: str | Path, options: CacheOptions) -> Source:
    """Find the index of a source, or make it, and check that the shards are there.

    Raises:
        UserError: If anything is missing, damaged, stale, or not allowed.
    """
    location = parse(spec)
    if location.is_remote:
        return _open_remote(location, options)
    if location.is_folder:
        return _open_folder(Path(location.text), options)
    paths = [Path(path) for path in expand(spec)]
    index_folder = foreign.index_files(paths, options.place, location.text)
    index = _read(index_folder)
    check_local_shards(paths, index_folder, index)
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    return Source(location.text, folder, index_folder, LocalTars(paths), index)


def _open_folder(folder: Path, options: CacheOptions) -> Source:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards; make one with tools/make_shards.py")
    index_folder = folder
    if not (folder / "index.json").exists():
        index_folder = foreign.index_folder(folder, options.place)
    index = _read(index_folder)
    paths = [folder / shard["name"] for shard in index["shards"]]
    check_local_shards(paths, index_folder, index)
    check_no_others(folder, index_folder, index)
    return Source(str(folder), folder, index_folder, LocalTars(paths), index)


def _read(index_folder: Path) -> dict[str, Any]:
    index = read_index(index_folder / "index.json")
    check_index(index, str(index_folder / "index.json"))
    check_table(index_folder, index)
    return index


def _open_remote(location: Location, options: CacheOptions) -> Source:
    name, cache = shown(location.text), ShardCache(options)
    index_folder, urls = None, []
    if location.is_folder:
        index_folder = _fetch_index(location, cache)
        if index_folder is None:
            urls = list_without_index(location, options.patience)
    else:
        urls = expand(location.text, options.patience)
    if index_folder is None:
        index_folder = foreign.index_remote(_files(urls, options.patience), cache, name)
        remedy = f"run again: the shards are indexed anew (or delete {index_folder})"
    else:
        remedy = "upload the shards and index.json of one run of tools/make_shards.py again"
    index = _read(index_folder)
    urls = urls or [join(location.text, shard["name"]) for shard in index["shards"]]
    pairs = zip(urls, index["shards"], strict=True)
    wanted = [Wanted(url, shard["bytes"], shard["sha256"]) for url, shard in pairs]
    cache.check_bound([shard.size for shard in wanted])
    tars = RemoteTars(wanted, options, remedy)
    return Source(name, index_folder, index_folder, tars, index)


def _files(urls: list[str], patience: Patience) -> list[RemoteFile]:
    if urls[0].startswith("pipe:"):
        return [RemoteFile(url, None, "") for url in urls]
    return look_at_all(urls, patience)


# -- the index of a remote folder -----------------------------------------------------------------


def _fetch_index(location: Location, cache: ShardCache) -> Path | None:
    """Bring index.json and its table into the cache; None if the folder has no index.json.

    The index is asked for at every opening. Its shards are looked at when this version of it is
    seen for the first time; later each is checked when it is fetched.
    """
    url = join(location.text, "index.json")
    data = read_if_there(url, cache.options.patience)
    if data is None:
        return None
    key = hashlib.sha256(location.text.encode() + b"\n" + data).hexdigest()
    target = cache.folder / "indexes" / key
    with cache.lock(f"index-{key}"):
        if not (target / "index.json").exists():
            foreign.make_folder(target)
            index = _parse(data, url)
            _fetch_table(location, index, target, cache.options.patience)
            _check_remote_shards(location, index, cache.options.patience)
            write_bytes(target / "index.json", data)
    return target


def _parse(data: bytes, url: str) -> dict[str, Any]:
    try:
        index = json.loads(data)
    except ValueError as error:
        raise UserError(
            f"{shown(url)}: cannot be read as an index ({error}); upload it again"
        ) from None
    if not isinstance(index, dict):
        raise UserError(f"{shown(url)}: cannot be read as an index; upload it again")
    check_index(index, shown(url))
    return index


def _fetch_table(
    location: Location, index: dict[str, Any], target: Path, patience: Patience
) -> None:
    url = join(location.text, index["samples"])
    limit = index["num_samples"] * SAMPLE_DTYPE.itemsize + 4096  # a header is 128 bytes
    sink = BytesSink(url, limit)
    download(look(url, patience), sink, patience)
    if hashlib.sha256(sink.data).hexdigest() != index["samples_sha256"]:
        raise UserError(
            f"{shown(url)}: its SHA-256 is not the one in index.json: one of them is stale; upload "
            "both again"
        )
    with contextlib.suppress(FileNotFoundError):
        (target / index["samples"]).unlink()
    write_bytes(target / index["samples"], bytes(sink.data))


def _check_remote_shards(location: Location, index: dict[str, Any], patience: Patience) -> None:
    urls = [join(location.text, shard["name"]) for shard in index["shards"]]
    for shard, file in zip(index["shards"], look_at_all(urls, patience), strict=True):
        if file.size is not None and file.size != shard["bytes"]:
            raise UserError(
                f"{shown(file.url)}: {file.size:,} bytes instead of {shard['bytes']:,}: the shard "
                "was cut short or changed, or index.json is stale; upload both again"
            )
