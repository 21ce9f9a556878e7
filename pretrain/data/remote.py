"""Files on servers, through fsspec, and output of commands: what is there, trying again."""

import contextlib
import importlib.util
import itertools
import os
import random
import select
import subprocess
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
import fsspec.asyn

from common.errors import UserError, require

PACKAGES = {  # scheme: module that fsspec needs, requirement for pip
    "http": ("aiohttp", "fsspec[http]>=2025.3"),
    "https": ("aiohttp", "fsspec[http]>=2025.3"),
    "s3": ("s3fs", "s3fs>=2025.3"),
    "gs": ("gcsfs", "gcsfs>=2025.3"),
}
_FIRST_DELAY_SECONDS = 0.5  # doubled from try to try, up to
_LONGEST_DELAY_SECONDS = 30.0
_NUM_LOOKERS = 16  # files looked at side by side
_VERSION_NAMES = (
    "ETag", "etag", "generation", "LastModified", "Last-Modified", "mtime", "updated",
)  # fmt: skip
_RETRIED_STATUS = {408, 425, 429}  # the other 4xx will not change
_TRANSPORT = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "urllib3", "requests"}
CHUNK_BYTES = 8 << 20  # one range request
_STREAM_BYTES = 1 << 20
_MAX_BYTES_IN_MEMORY = 1 << 30
_JITTER = random.SystemRandom()  # never the seeded generator of the run
_T = TypeVar("_T")
_filesystems: dict[tuple[int, str, float], Any] = {}


@dataclass(frozen=True)
class Patience:
    """How long to keep trying.

    Attributes:
        retries: Further tries after the first one.
        timeout_seconds: A connection that brings no byte for so long counts as failed.
    """

    retries: int = 5
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        require(self.retries >= 0, f"data.read_retries: {self.retries}: must be 0 or more")
        timeout = self.timeout_seconds
        require(timeout > 0, f"data.read_timeout_seconds: {timeout}: must be above 0")


@dataclass(frozen=True)
class RemoteFile:
    """What a server says about a file without sending it.

    Attributes:
        url: Its URL, or ``pipe:`` with a command.
        size: Bytes; None if the server does not say.
        version: ETag or time of the last change; "" if the server gives neither.
        has_ranges: False if the server says that it cannot send parts.
    """

    url: str
    size: int | None
    version: str
    has_ranges: bool = True


class NotThereError(UserError):
    """The server says that there is no such file."""


def displayed(url: str) -> str:
    """The URL for messages: without password and query, which may hold secrets."""
    if not url.startswith(("http://", "https://")):
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "..." if parts.query else "", ""))


def filesystem(url: str, patience: Patience) -> Any:
    """The fsspec file system for a URL, one per process: its event loop does not survive a fork.

    Raises:
        UserError: If the package for the scheme is not installed.
    """
    scheme = urlsplit(url).scheme
    module, requirement = PACKAGES[scheme]
    is_there = importlib.util.find_spec(module) is not None
    require(is_there, f"{scheme}:// needs a package that is missing: pip install '{requirement}'")
    key = (os.getpid(), scheme.removesuffix("s"), patience.timeout_seconds)
    if key not in _filesystems:
        if _filesystems and all(pid != os.getpid() for pid, _, _ in list(_filesystems)):
            fsspec.asyn.reset_lock()  # another thread of the parent may have held it at the fork
        # Those of the parent stay in the dictionary: collecting them would close its connections.
        _filesystems.setdefault(key, _make_filesystem(scheme, patience.timeout_seconds))
    return _filesystems[key]


def _make_filesystem(scheme: str, timeout: float) -> Any:
    common: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        limits = {"connect_timeout": timeout, "read_timeout": timeout}
        once = {"max_attempts": 0}  # tries are counted here, not in three places
        made = fsspec.filesystem("s3", config_kwargs={**limits, "retries": once}, **common)
        made.retries = 1
        return made
    import aiohttp

    # A bound for silence, none for the whole: a large part on a slow line is no failure.
    silence = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    if scheme == "gs":
        return fsspec.filesystem("gs", requests_timeout=silence, **common)
    # Bytes as stored: a compressed answer would have another size and no ranges.
    headers = {"Accept-Encoding": "identity"}
    client = {"timeout": silence, "trust_env": True, "headers": headers}
    return fsspec.filesystem(scheme, client_kwargs=client, **common)


# -- trying again ---------------------------------------------------------------------------------


def retried(action: Callable[[], _T], url: str, patience: Patience) -> _T:
    """Do what may fail now and then; raises as `wait_to_try_again`."""
    for attempt in itertools.count():
        try:
            return action()
        except Exception as error:
            wait_to_try_again(error, attempt, url, patience)
    raise AssertionError("unreachable")


def wait_to_try_again(error: Exception, attempt: int, url: str, patience: Patience) -> None:
    """After a failed try: wait, longer from try to try, with jitter.

    Args:
        error: What the try raised. What is no fault of the network, the server or the command
            is raised again.
        attempt: Number of the try, from 0.
        url: What was tried.
        patience: How many tries there are.
    Raises:
        UserError: At once if the file is not there or not allowed; after the last try otherwise.
    """
    cause: BaseException = error
    while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__  # fsspec's HTTP reports every failed look so
    package = type(cause).__module__.partition(".")[0]
    if not isinstance(cause, (OSError, EOFError)) and package not in _TRANSPORT:
        raise error
    name, status = displayed(url), _status(cause)

    # What another try would not change.
    if isinstance(cause, FileNotFoundError) or status in (404, 410):
        message = f"{name}: there is no such file (HTTP 404); check the address"
        raise NotThereError(message) from error
    if type(cause).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true"
        raise UserError(f"{name}: no credentials; {remedy}") from error
    is_forbidden = isinstance(cause, PermissionError) or str(cause).startswith("Forbidden:")
    if is_forbidden or status in (401, 403):  # gcsfs reports 403 by that word only
        message = f"{name}: not allowed (HTTP {status or 403}); check the credentials"
        raise UserError(message) from error
    if status is not None and 400 <= status < 500 and status not in _RETRIED_STATUS:
        raise UserError(f"{name}: the server refuses (HTTP {status}: {cause})") from error

    if attempt >= patience.retries:
        reason = f"{type(cause).__name__}: {cause}"
        if status is not None:
            reason = f"HTTP {status}"
        elif isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            reason = f"no byte for {patience.timeout_seconds:g} s (timeout)"
        raise UserError(
            f"{name}: could not be fetched in {attempt + 1} tries, the last one: {reason}; run "
            "again, or raise data.read_retries and data.read_timeout_seconds"
        ) from error
    delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**attempt)
    time.sleep(delay * _JITTER.uniform(0.5, 1.0))


def _status(error: BaseException) -> int | None:
    """HTTP status that a server answered with; None if there was no whole answer."""
    for holder in (error, error.__cause__):
        response = getattr(holder, "response", None)
        if isinstance(response, dict):  # botocore
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if type(error.__cause__).__module__ == "aiohttp.http_exceptions":
        return None  # a broken answer, to which aiohttp itself gives the number 400
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return int(str(status)) if str(status).isdigit() else None


# -- what is there --------------------------------------------------------------------------------


def look(url: str, patience: Patience) -> RemoteFile:
    """Ask for size and version of a file; of a command's output they are not known.

    Raises:
        UserError: If it is not there, not allowed, or the server does not answer.
    """
    if url.startswith("pipe:"):
        return RemoteFile(url, None, "")
    info = retried(lambda: filesystem(url, patience).info(url), url, patience)
    version = next((str(info[name]) for name in _VERSION_NAMES if info.get(name)), "")
    size = info.get("size", info.get("Size"))
    return RemoteFile(url, size, version, info.get("partial", True))


def look_at_all(urls: list[str], patience: Patience) -> list[RemoteFile]:
    """Sizes and versions of many files, side by side; raises as `look`, for the first failure."""
    with ThreadPoolExecutor(_NUM_LOOKERS) as pool:
        return list(pool.map(lambda url: look(url, patience), urls))


def find_tars(pattern: str, patience: Patience) -> list[str]:
    """URLs in an object store that fit a pattern with ``*``, ``?`` or ``[]``, sorted."""
    scheme = urlsplit(pattern).scheme
    names = retried(lambda: filesystem(pattern, patience).glob(pattern), pattern, patience)
    return sorted(f"{scheme}://{name}" for name in names)


# -- fetching -------------------------------------------------------------------------------------


class _NoRangesError(Exception):
    """The server sends the whole file whatever part is requested."""


def download(file: RemoteFile, patience: Patience) -> Iterator[bytes]:
    """The bytes of a file in their order: in parts, each tried again on its own, or as one stream.

    Where a stream begins again from the front (a command, or a server without ranges), the bytes
    that came before are passed over, and compared by their checksum.

    Args:
        file: What `look` said, or a ``pipe:`` command with the size to expect, if known.
        patience: How long to keep trying.
    Raises:
        UserError: After the last try, or if a second try brings other bytes than the first.
    """
    is_command = file.url.startswith("pipe:")
    skipped = 0
    if file.size is not None and file.has_ranges and not is_command:
        try:
            for start in range(0, file.size, CHUNK_BYTES):
                part = partial(_fetch_part, file, start, patience)
                yield retried(part, file.url, patience)
                skipped = start + CHUNK_BYTES
            return
        except _NoRangesError:
            pass
    name = displayed(file.url)
    other = UserError(f"{name}: a second try brought other bytes than the first; check the source")
    num_bytes = checksum = 0  # of the stream so far
    for attempt in itertools.count():
        position = repeated = 0  # of this try; and the checksum of what came before
        try:
            read = _run_command if is_command else _stream
            with contextlib.closing(read(file, patience)) as stream:  # ends the command, too
                for data in stream:
                    known = data[: max(0, num_bytes - position)]
                    repeated = zlib.crc32(known, repeated)
                    position += len(data)
                    if known and position >= num_bytes and repeated != checksum:
                        raise other
                    if new := data[len(known) :]:
                        num_bytes, checksum = position, zlib.crc32(new, checksum)
                        if num_bytes > skipped:
                            yield new[max(0, skipped - num_bytes + len(new)) :]
            _check_number(position, file.size)
            if position < num_bytes:
                raise other
            return
        except Exception as error:
            wait_to_try_again(error, attempt, file.url, patience)


def _fetch_part(file: RemoteFile, start: int, patience: Patience) -> bytes:
    assert file.size is not None
    files, end = filesystem(file.url, patience), min(start + CHUNK_BYTES, file.size)
    if urlsplit(file.url).scheme in ("http", "https"):
        options = {"block_size": CHUNK_BYTES, "cache_type": "none", "size": file.size}
        try:
            with files.open(file.url, **options) as stream:
                stream.seek(start)
                data = stream.read(end - start)
        except ValueError as error:
            if "range" in str(error):  # fsspec has no exception of its own for this
                raise _NoRangesError from error
            raise
    else:
        data = files.cat_file(file.url, start=start, end=end)
    _check_number(len(data), end - start)
    return data


def _check_number(num_bytes: int, expected: int | None) -> None:
    if expected is not None and num_bytes != expected:
        raise EOFError(f"{num_bytes:,} bytes came instead of {expected:,}")


def _stream(file: RemoteFile, patience: Patience) -> Generator[bytes]:
    with filesystem(file.url, patience).open(file.url, block_size=0, size=file.size) as stream:
        while data := stream.read(_STREAM_BYTES):
            yield data


def _run_command(file: RemoteFile, patience: Patience) -> Generator[bytes]:
    """A command's output; its exit status must be 0."""
    command = file.url.removeprefix("pipe:")
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        try:
            while True:
                if not select.select([process.stdout], [], [], patience.timeout_seconds)[0]:
                    raise TimeoutError
                if not (data := os.read(process.stdout.fileno(), _STREAM_BYTES)):
                    break
                yield data
        except BaseException:
            process.kill()
            raise
    if process.returncode in (126, 127):  # the shell's own words
        status = f"exit status {process.returncode}"
        raise UserError(f"{file.url}: the command cannot be run ({status}); check its name")
    if process.returncode != 0:
        raise OSError(f"the command ended with exit status {process.returncode}")


def read_small(url: str, patience: Patience, max_bytes: int = _MAX_BYTES_IN_MEMORY) -> bytes:
    """The bytes of a small file, an index for instance.

    Raises:
        UserError: If it cannot be fetched, or is larger than `max_bytes`.
    """
    data = bytearray()
    for part in download(look(url, patience), patience):
        data += part
        require(len(data) <= max_bytes, f"{displayed(url)}: larger than {max_bytes:,} bytes")
    return bytes(data)


def read_if_there(url: str, patience: Patience) -> bytes | None:
    """As `read_small`; None if there is no such file."""
    try:
        return read_small(url, patience)
    except NotThereError:
        return None
