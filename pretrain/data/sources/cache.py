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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError, require
from common.files import lock_file, locked, unlock
from pretrain.data.random_numbers import stable_hash
from pretrain.data.sources.remote import Patience, RemoteFile, displayed, download, look

_GROWTH_BYTES = 64 << 20  # reserved at a time for a download of unknown size
NUM_FETCHERS = 4  # shards fetched side by side by one process
_MIN_SHARDS = 4  # that the bound must hold, unless the set has fewer
_WAIT_SECONDS = 0.05


class TooMuchError(Exception):
    """More bytes came than were announced."""


class YieldError(Exception):
    """Downloads of unknown size stand in each other's way: this one must begin again later."""


class PartialFile:
    """A download in flight: reserves its space, hashes what comes; a sink for `download`."""

    GROWING = ".growing"  # ends the name if the size is not known

    def __init__(self, cache: "ShardCache", path: Path, size: int | None) -> None:
        self._cache, self._size = cache, size
        self.path = path if size is not None else path.with_name(path.name + self.GROWING)
        self.path.unlink(missing_ok=True)  # of a killed process
        self._reserved, self._file = 0, -1
        self._num_bytes, self._digest = 0, hashlib.sha256()
        self._reserve(size or 0)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)

    def _reserve(self, extra: int) -> None:
        try:
            self._cache.reserve(self.path, extra, is_growing=self._size is None)
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise disk_error(error, self._cache.folder) from error
            raise
        self._reserved += extra

    def write(self, data: bytes) -> None:
        """Append bytes."""
        missing = self._num_bytes + len(data) - self._reserved
        if missing > 0 and self._size is not None:
            raise TooMuchError
        if missing > 0:
            limit = self._cache.max_bytes // 16
            self._reserve(max(missing, min(_GROWTH_BYTES, limit)))
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._file, memoryview(data)[done:], self._num_bytes + done)
        except OSError as error:
            raise disk_error(error, self._cache.folder) from error
        self._digest.update(data)
        self._num_bytes += len(data)

    def restart(self) -> None:
        """Forget everything; the space stays reserved."""
        self._num_bytes, self._digest = 0, hashlib.sha256()

    def finish(self) -> tuple[int, str]:
        """Make the file durable; its bytes and SHA-256."""
        os.ftruncate(self._file, self._num_bytes)
        os.fsync(self._file)
        return self._num_bytes, self._digest.hexdigest()

    def discard(self) -> None:
        """Close, and remove what is left under the temporary name."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self.path.unlink(missing_ok=True)


def disk_error(error: OSError, folder: Path) -> UserError:
    """The error of the cache's disk, with a remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{folder}: the disk is full ({error.strerror}); free space, lower data.cache_gb, or "
            "put data.cache_dir on another disk"
        )
    return UserError(
        f"{folder}: the cache cannot be written ({error.strerror or error}); put data.cache_dir "
        "elsewhere"
    )


def make_folder(folder: Path) -> None:
    """Make a folder of the cache.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error


def touch(file: int) -> None:
    """Mark a cached shard as just used."""
    with contextlib.suppress(OSError):  # a cache of somebody else's: order of use is a hint
        now = time.time_ns()  # finer than the clock that the system would take
        os.utime(file, ns=(now, now))


def files_of(folder: Path) -> list[tuple[int, int, Path]]:
    """Time of last use, bytes and path of the files of a folder."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a download just given up
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    return files


def extend(path: Path, extra: int) -> None:
    """Make a file larger by bytes that the disk really has."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(file).st_size
        try:
            if extra > 0 and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, size, extra)
                return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        os.ftruncate(file, size + extra)
    finally:
        os.close(file)


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

    def __init__(self, options: CacheOptions, remedy: str = "") -> None:
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
        if least > self.options.max_bytes:
            raise UserError(
                f"data.cache_gb: {self.options.max_bytes / 1e9:g} is too small for shards of up to "
                f"{max(sizes) / 1e9:.3g} GB: set it to {least / 1e9:.3g} or more (much more reads "
                "better), or make smaller shards"
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
            file = RemoteFile(shard.url, shard.size, "")
            if not shard.url.startswith("pipe:"):
                file = look(shard.url, self.options.patience)
            if file.size is not None and file.size != shard.size:
                raise self._changed(shard, f"{file.size:,} bytes instead of {shard.size:,}")
            return self._fetch(file, shard.size, shard.sha256, shard)[0]

    def ensure(self, shards: list[RemoteShard]) -> None:
        """Fetch what is missing, several shards side by side; as many as the bound holds.

        Raises:
            UserError: As `open`.
        """
        missing: list[RemoteShard] = []
        room = self.options.max_bytes
        for shard in shards:
            room -= shard.size
            if room < 0:
                break  # it would throw out what was fetched a moment ago
            descriptor = self._open_cached(shard)
            if descriptor is None:
                missing.append(shard)
            else:
                os.close(descriptor)
        if len(missing) > 1:
            with ThreadPoolExecutor(min(NUM_FETCHERS, len(missing))) as pool:
                list(pool.map(lambda shard: os.close(self.open(shard)), missing))
        elif missing:
            os.close(self.open(missing[0]))

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
        if file.size is not None and file.size > self.options.max_bytes:
            raise self._too_large(displayed(file.url), file.size)
        name = stable_hash(file.url, file.version).hex()
        with self.lock(name):
            descriptor, (num_bytes, sha256) = self._fetch(file, file.size, name, None)
        if not file.url.startswith("pipe:"):
            now = look(file.url, self.options.patience)
            if (now.size, now.version) != (file.size, file.version):
                os.close(descriptor)
                raise UserError(f"{displayed(file.url)}: changed while it was fetched; run again")
        return descriptor, num_bytes, sha256

    def _fetch(
        self, file: RemoteFile, size: int | None, name: str, shard: RemoteShard | None
    ) -> tuple[int, tuple[int, str]]:
        """Download under the lock `name`, which the caller holds; give the descriptor and facts."""
        while True:
            sink = PartialFile(self, self._partial / name, size)
            try:
                download(file, sink, self.options.patience)
                facts = sink.finish()
                if shard is not None and facts != (shard.size, shard.sha256):
                    what = f"{facts[0]:,} bytes instead of {shard.size:,}"
                    if facts[0] == shard.size:
                        what = "its SHA-256 is not the one in the index"
                    raise self._changed(shard, what)
                descriptor = os.open(sink.path, os.O_RDONLY)  # before others may throw it out
                with self._space_lock():
                    os.replace(sink.path, self._shards / f"{facts[1]}.tar")
                touch(descriptor)
                return descriptor, facts
            except YieldError:
                sink.discard()
                time.sleep(20 * _WAIT_SECONDS)
            except TooMuchError:
                if shard is not None:
                    raise self._changed(shard, f"more than {shard.size:,} bytes") from None
                raise UserError(
                    f"{displayed(file.url)}: more bytes than announced; run again"
                ) from None
            except OSError as error:
                raise disk_error(error, self.folder) from error
            finally:
                sink.discard()

    # -- space ------------------------------------------------------------------------------------

    def reserve(self, partial: Path, extra: int, *, is_growing: bool) -> None:
        """Reserve bytes for a download, throwing out the least recently used shards.

        Waits while other downloads fill the cache.

        Raises:
            UserError: If the bound or the disk is too small.
        """
        while not self._make_room(extra, partial):
            others = sorted(path for path in self._partial.iterdir() if path != partial)
            if not others:  # nobody to wait for, unless the last one has just finished
                if self._make_room(extra, partial):
                    return
                size = partial.stat().st_size if partial.exists() else 0
                raise self._too_large("a shard", extra + size)
            growing = all(path.name.endswith(PartialFile.GROWING) for path in others)
            if is_growing and growing and others and others[0] < partial:
                raise YieldError
            time.sleep(_WAIT_SECONDS)

    def _make_room(self, extra: int, partial: Path | None) -> bool:
        """Extend `partial` by `extra` bytes if they fit; true if so."""
        with self._space_lock():
            self._remove_leftovers()
            whole = files_of(self._shards)
            too_much = extra - self.options.max_bytes
            too_much += sum(size for _, size, _ in whole + files_of(self._partial))
            for _, size, path in sorted(whole):
                if too_much <= 0:
                    break
                path.unlink(missing_ok=True)
                too_much -= size
            if too_much > 0:
                return False
            if partial is not None:
                extend(partial, extra)
            return True

    def _remove_leftovers(self) -> None:
        for path in self._partial.iterdir():
            with self.lock(path.name.removesuffix(PartialFile.GROWING), wait=False) as is_free:
                if is_free:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _space_lock(self) -> Iterator[None]:
        with open(self.folder / "space.lock", "ab") as stream:
            lock_file(stream, self.folder, wait=True)
            try:
                yield
            finally:
                unlock(stream)

    def lock(self, name: str, wait: bool = True) -> AbstractContextManager[bool]:
        """Hold a lock that other processes and threads see; it dies with its process.

        Args:
            name: Which lock.
            wait: False: give up if it is held.
        Returns:
            A context that gives True if it is held now.
        """
        return locked(self.folder / "locks" / name, patience=math.inf if wait else 0.0)

    # -- messages ---------------------------------------------------------------------------------

    def _changed(self, shard: RemoteShard, what: str) -> UserError:
        return UserError(
            f"{displayed(shard.url)}: {what}: the shard was changed or cut short, or the index is "
            f"stale; {self.remedy}"
        )

    def _too_large(self, name: str, size: int) -> UserError:
        return UserError(
            f"{name}: {size:,} bytes or more do not fit into the cache of "
            f"{self.options.max_bytes:,} bytes ({self.folder}); raise data.cache_gb, or make "
            "smaller shards"
        )
