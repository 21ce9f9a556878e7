"""Files of the cache: locks, downloads in flight, what lies there."""

import contextlib
import errno
import hashlib
import os
import time
from pathlib import Path
from typing import Protocol

from common.errors import UserError

_GROWTH_BYTES = 64 << 20  # reserved at a time for a download of unknown size


class Space(Protocol):
    """What hands out the cache's space."""

    folder: Path
    max_bytes: int

    def reserve(self, partial: Path, extra: int, *, is_growing: bool) -> None:
        """Reserve bytes for a download."""


class TooMuchError(Exception):
    """More bytes came than were announced."""


class YieldError(Exception):
    """Downloads of unknown size stand in each other's way: this one must begin again later."""


class PartialFile:
    """A download in flight: reserves its space, hashes what comes; a sink for `download`."""

    GROWING = ".growing"  # ends the name if the size is not known

    def __init__(self, cache: Space, path: Path, size: int | None) -> None:
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
    """What to tell about an error of the cache's disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{folder}: the disk is full ({error.strerror}); free space, lower data.cache_gb, or "
            "put data.cache_dir on another disk"
        )
    return UserError(
        f"{folder}: the cache cannot be written ({error.strerror or error}); put data.cache_dir "
        "elsewhere"
    )


def touch(file: int) -> None:
    """Mark a cached shard as just used."""
    with contextlib.suppress(OSError):  # a cache of somebody else's: order of use is a hint
        now = time.time_ns()  # finer than the clock that the system would take
        os.utime(file, ns=(now, now))


def files_of(folder: Path) -> list[tuple[int, int, Path]]:
    """Time of last use, bytes and path of the files of a folder."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a download just given up
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    return found


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
