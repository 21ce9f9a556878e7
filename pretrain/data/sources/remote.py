"""Files on servers, through fsspec: what is there, and trying again."""

import contextlib
import importlib.util
import os
import random
import select
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar
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
        require(
            self.timeout_seconds > 0,
            f"data.read_timeout_seconds: {self.timeout_seconds}: must be above 0",
        )


@dataclass(frozen=True)
class RemoteFile:
    """What a server says about a file without sending it.

    Attributes:
        url: Its URL.
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
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"{displayed(url)}: {scheme}:// needs a package that is not installed; "
            f"run: pip install '{requirement}'"
        )
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
    """Do what may fail now and then; wait longer from try to try, with jitter.

    Raises:
        UserError: At once if the file is not there or not allowed; after the last try otherwise.
    """
    num_tries = patience.retries + 1
    for attempt in range(num_tries):
        try:
            return action()
        except Exception as error:
            cause: BaseException = error
            while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
                cause = cause.__cause__  # fsspec's HTTP reports every failed look so
            if isinstance(cause, UserError) or not _is_of_transport(cause):
                raise
            status = _status(cause)
            if isinstance(cause, FileNotFoundError) or status in (404, 410):
                raise NotThereError(
                    f"{displayed(url)}: there is no such file (HTTP 404); check the address"
                ) from error
            if final := _why_final(cause, status):
                raise UserError(f"{displayed(url)}: {final}") from error
            if attempt + 1 == num_tries:
                if status is not None:
                    reason = f"HTTP {status}"
                elif isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
                    reason = f"no byte for {patience.timeout_seconds:g} s (timeout)"
                else:
                    reason = f"{type(cause).__name__}: {cause}"
                raise UserError(
                    f"{displayed(url)}: could not be fetched in {num_tries} tries, the last one: "
                    f"{reason}; look after the server, the network or the command and run again "
                    "(data.read_retries and data.read_timeout_seconds say how long to try)"
                ) from error
        delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**attempt)
        time.sleep(delay * _JITTER.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _is_of_transport(error: BaseException) -> bool:
    """True for errors of the network, the server or the client's library, false for bugs."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, EOFError)) or package in {
        "aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "urllib3", "requests",
    }  # fmt: skip


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


def _why_final(error: BaseException, status: int | None) -> str | None:
    """Why another try is useless; None if it may help."""
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return (
            "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile), or "
            "FSSPEC_S3_ANON=true for a public bucket"
        )
    is_forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden:")
    if is_forbidden or status in (401, 403):  # gcsfs reports 403 by that word only
        return f"not allowed (HTTP {status or 403}); check the credentials and who may read it"
    if status is not None and 400 <= status < 500 and status not in _RETRIED_STATUS:
        return f"the server refuses (HTTP {status}: {error})"
    return None


# -- what is there --------------------------------------------------------------------------------


def look(url: str, patience: Patience) -> RemoteFile:
    """Ask for size and version of a file.

    Raises:
        UserError: If it is not there, not allowed, or the server does not answer.
    """
    return retried(lambda: _remote_file(url, filesystem(url, patience).info(url)), url, patience)


def _remote_file(url: str, info: dict[str, Any]) -> RemoteFile:
    versions = [str(info[name]) for name in _VERSION_NAMES if info.get(name)]
    size = info.get("size", info.get("Size"))
    return RemoteFile(url, size, versions[0] if versions else "", info.get("partial", True))


def look_at_all(urls: list[str], patience: Patience) -> list[RemoteFile]:
    """Sizes and versions of many files: by listing their folders in object stores, else one by one.

    Raises:
        UserError: As `look`, for the first file that fails.
    """
    known: dict[str, RemoteFile] = {}
    scheme = urlsplit(urls[0]).scheme if urls else ""
    for folder in sorted({url.rpartition("/")[0] + "/" for url in urls}):
        if scheme not in ("s3", "gs"):
            break

        def listing(folder: str = folder) -> list[dict[str, Any]]:
            return filesystem(folder, patience).ls(folder, detail=True)

        with contextlib.suppress(UserError):  # perhaps reading is allowed, listing is not
            for item in retried(listing, folder, patience):
                url = f"{scheme}://{item['name']}"
                if item["type"] == "file":
                    known[url] = _remote_file(url, item)
    with ThreadPoolExecutor(min(_NUM_LOOKERS, len(urls) or 1)) as pool:
        return list(pool.map(lambda url: known.get(url) or look(url, patience), urls))


def find_tars(pattern: str, patience: Patience) -> list[str]:
    """URLs in an object store that fit a pattern with ``*``, ``?`` or ``[]``, sorted."""
    scheme = urlsplit(pattern).scheme
    names = retried(lambda: filesystem(pattern, patience).glob(pattern), pattern, patience)
    return sorted(f"{scheme}://{name}" for name in names)


# -- fetching -------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes the bytes of a file in order."""

    def write(self, data: bytes) -> None:
        """Append bytes."""

    def restart(self) -> None:
        """Forget everything: the file begins again."""


class _NoRangesError(Exception):
    """The server sends the whole file whatever part is requested."""


def download(file: RemoteFile, sink: Sink, patience: Patience) -> None:
    """Fetch a file: in parts, each tried again on its own, or else as one stream.

    Args:
        file: What `look` said, or a ``pipe:`` command with the size to expect, if known.
        sink: Gets the bytes; whether they are the right ones is its business, but for their number.
        patience: How long to keep trying.
    Raises:
        UserError: After the last try; and whatever the sink raises.
    """
    if file.url.startswith("pipe:"):
        retried(lambda: _run_command(file, sink, patience), file.url, patience)
        return
    if file.size is not None and file.has_ranges:
        try:
            sink.restart()
            for start in range(0, file.size, CHUNK_BYTES):
                end = min(start + CHUNK_BYTES, file.size)
                part = partial(_fetch_part, file, start, end, patience)
                sink.write(retried(part, file.url, patience))
            return
        except _NoRangesError:
            pass
    retried(lambda: _fetch_stream(file, sink, patience), file.url, patience)


def _fetch_part(file: RemoteFile, start: int, end: int, patience: Patience) -> bytes:
    files = filesystem(file.url, patience)
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


def _fetch_stream(file: RemoteFile, sink: Sink, patience: Patience) -> None:
    sink.restart()
    num_bytes = 0
    with filesystem(file.url, patience).open(file.url, block_size=0, size=file.size) as stream:
        while data := stream.read(_STREAM_BYTES):
            sink.write(data)
            num_bytes += len(data)
    _check_number(num_bytes, file.size)


def _run_command(file: RemoteFile, sink: Sink, patience: Patience) -> None:
    """Take a command's output through webdataset's opener; its exit status must be 0."""
    from webdataset.gopen import gopen

    sink.restart()
    num_bytes = 0
    pipe: Any = gopen(file.url, "rb", bufsize=0)
    try:
        while True:
            if not select.select([pipe.stream], [], [], patience.timeout_seconds)[0]:
                raise TimeoutError
            if not (data := os.read(pipe.stream.fileno(), _STREAM_BYTES)):
                break
            sink.write(data)
            num_bytes += len(data)
    except BaseException:
        pipe.proc.kill()
        with contextlib.suppress(OSError):  # its exit status says that it was killed
            pipe.close()
        raise
    try:
        pipe.close()
    except OSError:
        if pipe.status in (126, 127):  # the shell's own words
            raise UserError(
                f"{displayed(file.url)}: the command cannot be run (exit status {pipe.status}); "
                "check its name and whether it is installed"
            ) from None
        raise OSError(f"the command ended with exit status {pipe.status}") from None
    _check_number(num_bytes, file.size)


class BytesSink:
    """Keeps what comes in memory, up to a bound."""

    def __init__(self, url: str, max_bytes: int) -> None:
        self.data = bytearray()
        self._url, self._max_bytes = url, max_bytes

    def write(self, data: bytes) -> None:
        """Append bytes; raises UserError above the bound."""
        self.data += data
        require(
            len(self.data) <= self._max_bytes,
            f"{displayed(self._url)}: larger than {self._max_bytes:,} bytes",
        )

    def restart(self) -> None:
        """Forget everything."""
        self.data.clear()


def read_small(url: str, patience: Patience, max_bytes: int = _MAX_BYTES_IN_MEMORY) -> bytes:
    """The bytes of a small file, an index for instance.

    Raises:
        UserError: If it cannot be fetched, or is larger than `max_bytes`.
    """
    sink = BytesSink(url, max_bytes)
    download(look(url, patience), sink, patience)
    return bytes(sink.data)


def read_if_there(url: str, patience: Patience) -> bytes | None:
    """As `read_small`; None if there is no such file."""
    try:
        return read_small(url, patience)
    except NotThereError:
        return None
