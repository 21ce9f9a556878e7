"""Whole remote shards on the local disk: bounded, shared by processes, oldest use out first.

FOLDER/shards/SHA256.tar    whole shards, named by their content; the time of change is the last use
FOLDER/partial/NAME         downloads in flight, as large as the space they have reserved
FOLDER/locks/NAME           one lock per download; held while it is in flight, so a partial file
                            whose lock is free was left by a killed process
FOLDER/space.lock           held for a moment while space is reserved, given back, or counted
FOLDER/indexes/             indexes of remote sets, not counted in the bound

A shard that another process has open stays readable when it is thrown out: only its name goes.
"""

import contextlib
import errno
import hashlib
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import UserError, require
from common.files import locked
from pretrain.data.random_numbers import stable_hash
from pretrain.data.remote import Patience, RemoteFile, displayed, download, look

_GROWTH_BYTES = 64 << 20  # reserved at a time for a download of unknown size
NUM_FETCHERS = 4  # shards fetched side by side by one process
_MIN_SHARDS = 4  # that the bound must hold, unless the set has fewer
_WAIT_SECONDS = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_error(error: OSError, folder: Path) -> UserError:
    """The error of the cache's disk, with a remedy."""
    if error.errno in _FULL:
        return UserError(
            f"{folder}: the disk is full; free space, lower data.cache_gb, or put data.cache_dir "
            "on another disk"
        )
    return UserError(f"{folder}: the cache cannot be written ({error}); change data.cache_dir")


def make_folder(folder: Path) -> None:
    """Make a folder of the cache.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error


def touch(file: int | Path) -> None:
    """Mark a cached shard as just used."""
    with contextlib.suppress(OSError):  # a cache of somebody else's: order of use is a hint
        now = time.time_ns()  # finer than the clock that the system would take
        os.utime(file, ns=(now, now))


def files_of(folder: Path) -> list[tuple[int, int, Path]]:
    """Time of last use, bytes and path of the files of a folder."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # removed by somebody else
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    return files


@dataclass(frozen=True)
class CacheOptions:
    """Where remote shards are kept, how many bytes of them, and how long to try to fetch one.

    Attributes:
        folder: None: ``$XDG_CACHE_HOME/fa-shards``, or ``~/.cache/fa-shards``.
        max_bytes: Bound of all whole shards and downloads in flight together.
        patience: How long to keep trying.
    """

    folder: Path | None = None
    max_bytes: int = 64_000_000_000
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        require(self.max_bytes > 0, f"data.cache_gb: {self.max_bytes / 1e9}: must be above 0")

    @property
    def place(self) -> Path:
        """The folder, whoever chose it."""
        if self.folder is not None:
            return self.folder
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "fa-shards"


@dataclass(frozen=True)
class RemoteShard:
    """A remote shard as an index knows it."""

    url: str
    size: int
    sha256: str


class ShardCache:
    """The cache, as one process sees it; threads may share it.

    Args:
        options: Where, how large, how patient.
        remedy: Ends the message about a shard that is not what the index says.
    Raises:
        UserError: If the folder cannot be made or written.
    """

    def __init__(self, options: CacheOptions, remedy: str = "run again") -> None:
        self.options, self.remedy = options, remedy
        self.folder, self.max_bytes = options.place, options.max_bytes
        self._shards, self._partial = self.folder / "shards", self.folder / "partial"
        for folder in (self._shards, self._partial, self.folder / "locks"):
            make_folder(folder)
        try:
            with self._space_lock():
                pass  # the folder is writable and its disk knows locks
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def check_bound(self, sizes: list[int]) -> None:
        """Refuse a bound that holds fewer than a few of these shards; throw out what is too much.

        Raises:
            UserError: Naming the smallest bound that would do.
        """
        least = sum(sorted(sizes)[-_MIN_SHARDS:])
        if least > self.max_bytes:
            raise UserError(
                f"data.cache_gb: {self.max_bytes / 1e9:g} is too small for shards of up to "
                f"{max(sizes) / 1e9:.3g} GB: set it to {least / 1e9:.3g} or much more"
            )
        self._make_room(0, None)

    # -- what a reader needs ----------------------------------------------------------------------

    def path(self, shard: RemoteShard) -> Path:
        """Where the shard lies if it is in the cache."""
        return self._shards / f"{shard.sha256}.tar"

    def open(self, shard: RemoteShard) -> int:
        """A file descriptor of the whole shard, fetched first if need be; the caller closes it.

        Raises:
            UserError: If it cannot be fetched, is not what the index says, or finds no room.
        """
        if (descriptor := self._open_cached(shard)) is not None:
            return descriptor
        with self.lock(shard.sha256):
            if (descriptor := self._open_cached(shard)) is not None:
                return descriptor
            file = look(shard.url, self.options.patience)
            if file.size not in (None, shard.size):
                raise self._changed(shard.url, f"{file.size:,} bytes instead of {shard.size:,}")
            return self._fetch(replace(file, size=shard.size), shard.sha256, shard)[0]

    def ensure(self, shards: list[RemoteShard]) -> None:
        """Fetch what is missing, several shards side by side; as many as the bound holds.

        Raises:
            UserError: As `open`.
        """
        missing, room = [], self.max_bytes
        for shard in shards:
            room -= shard.size
            if room < 0:
                break  # it would throw out what was fetched a moment ago
            if self.path(shard).exists():
                touch(self.path(shard))
            else:
                missing.append(shard)
        if missing:
            with ThreadPoolExecutor(min(NUM_FETCHERS, len(missing))) as pool:
                list(pool.map(lambda shard: os.close(self.open(shard)), missing))

    def _open_cached(self, shard: RemoteShard) -> int | None:
        path = self.path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != shard.size:  # somebody meddled with it
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        touch(descriptor)
        return descriptor

    # -- fetching ---------------------------------------------------------------------------------

    def fetch_unknown(self, file: RemoteFile) -> tuple[int, int, str]:
        """Fetch a shard that no index describes yet.

        Returns:
            File descriptor, bytes, SHA-256; the caller closes the descriptor.
        Raises:
            UserError: As `open`; also if the file changes meanwhile.
        """
        if file.size is not None and file.size > self.max_bytes:
            raise self._too_large(displayed(file.url), file.size)
        name = stable_hash(file.url, file.version).hex()
        # Two that grow could wait for each other.
        alone = self.lock("growing") if file.size is None else contextlib.nullcontext()
        with self.lock(name), alone:
            fetched = self._fetch(file, name, None)
        now = look(file.url, self.options.patience)
        if (now.size, now.version) != (file.size, file.version):
            os.close(fetched[0])
            raise UserError(f"{displayed(file.url)}: changed while it was fetched; run again")
        return fetched

    def _fetch(
        self, file: RemoteFile, name: str, shard: RemoteShard | None
    ) -> tuple[int, int, str]:
        """Download under the lock `name`, which the caller holds.

        Args:
            file: With its size, unless it is not known.
            name: Of the partial file.
            shard: What the index says of it, if there is one.
        Returns:
            File descriptor, bytes, SHA-256.
        """
        partial, digest, num_bytes = self._partial / name, hashlib.sha256(), 0
        try:
            self._give_back(partial)  # of a killed process
            reserved = file.size or 0
            self._reserve(partial, reserved)
            with open(partial, "r+b", buffering=0) as stream:
                for data in download(file, self.options.patience):
                    num_bytes += len(data)
                    if (missing := num_bytes - reserved) > 0:
                        if file.size is not None:
                            raise self._changed(file.url, f"more than {file.size:,} bytes")
                        extra = max(missing, min(_GROWTH_BYTES, self.max_bytes // 16))
                        self._reserve(partial, extra)
                        reserved += extra
                    digest.update(data)
                    while data:
                        data = data[stream.write(data) :]
                stream.truncate(num_bytes)
                os.fsync(stream.fileno())
            sha256 = digest.hexdigest()
            if shard is not None and sha256 != shard.sha256:
                raise self._changed(file.url, "its SHA-256 is not the one in the index")
            descriptor = os.open(partial, os.O_RDONLY)  # before others may throw it out
            with self._space_lock():
                os.replace(partial, self._shards / f"{sha256}.tar")
            touch(descriptor)
            return descriptor, num_bytes, sha256
        except OSError as error:
            raise disk_error(error, self.folder) from error
        finally:
            with contextlib.suppress(OSError):  # of a lost disk, which is reported already
                self._give_back(partial)

    # -- space ------------------------------------------------------------------------------------

    def _reserve(self, partial: Path, extra: int) -> None:
        """Reserve bytes for a download, throwing out the least recently used shards.

        Waits while other downloads fill the cache.

        Raises:
            UserError: If the bound or the disk is too small.
        """
        while not self._make_room(extra, partial):
            if not any(path != partial for path in self._partial.iterdir()):
                # Nobody to wait for, unless the last one has just finished.
                if self._make_room(extra, partial):
                    return
                size = partial.stat().st_size if partial.exists() else 0
                raise self._too_large("a shard", extra + size)
            time.sleep(_WAIT_SECONDS)

    def _make_room(self, extra: int, partial: Path | None) -> bool:
        """Extend `partial` by `extra` bytes if they fit; true if so."""
        with self._space_lock():
            for path in self._partial.iterdir():  # of killed processes
                with self.lock(path.name, wait=False) as descriptor:
                    if descriptor is not None:
                        path.unlink(missing_ok=True)
            whole = files_of(self._shards)
            too_much = extra - self.max_bytes
            too_much += sum(size for _, size, _ in whole + files_of(self._partial))
            for _, size, path in sorted(whole):
                if too_much <= 0:
                    break
                path.unlink(missing_ok=True)
                too_much -= size
            if too_much > 0:
                return False
            if partial is not None:
                with open(partial, "ab") as file:
                    file.truncate(os.fstat(file.fileno()).st_size + extra)
            return True

    def _give_back(self, partial: Path) -> None:
        with self._space_lock():
            partial.unlink(missing_ok=True)

    def _space_lock(self) -> AbstractContextManager[int | None]:
        return locked(self.folder / "space.lock", patience=math.inf)

    def lock(self, name: str, wait: bool = True) -> AbstractContextManager[int | None]:
        """Hold a lock that other processes and threads see; it dies with its process.

        Args:
            name: Which lock.
            wait: False: give up if it is held.
        Returns:
            A context that gives its file descriptor; None if another holds it.
        """
        return locked(self.folder / "locks" / name, patience=math.inf if wait else 0.0)

    # -- messages ---------------------------------------------------------------------------------

    def _changed(self, url: str, what: str) -> UserError:
        name = displayed(url)
        return UserError(f"{name}: {what}: the shard or the index is stale; {self.remedy}")

    def _too_large(self, name: str, size: int) -> UserError:
        return UserError(
            f"{name}: {size:,} bytes or more do not fit into the cache of {self.max_bytes:,} bytes "
            f"({self.folder}); raise data.cache_gb, or make smaller shards"
        )
