"""Fetch the bytes of a file from a server or a command, with retries."""

import contextlib
import os
import select
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

from common.errors import UserError
from pretrain.data.sources.remote import (
    NotThereError,
    Patience,
    RemoteFile,
    filesystem,
    look,
    retried,
    shown,
)

CHUNK_BYTES = 8 << 20  # one range request
_STREAM_BYTES = 1 << 20
_MAX_BYTES_IN_MEMORY = 1 << 30


class Sink(Protocol):
    """Takes the bytes of a file in order."""

    def write(self, data: bytes) -> None:
        """Append bytes."""

    def restart(self) -> None:
        """Forget everything: the file begins again."""


class _NoRangesError(Exception):
    """The server sends the whole file whatever part was asked for."""


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
            _fetch_parts(file, file.size, sink, patience)
            return
        except _NoRangesError:
            pass
    retried(lambda: _fetch_stream(file, sink, patience), file.url, patience)


def _fetch_parts(file: RemoteFile, size: int, sink: Sink, patience: Patience) -> None:
    sink.restart()
    for start in range(0, size, CHUNK_BYTES):
        part = partial(_fetch_part, file, start, min(start + CHUNK_BYTES, size), patience)
        sink.write(retried(part, file.url, patience))


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
    _end_command(pipe, file.url)
    _check_number(num_bytes, file.size)


def _end_command(pipe: Any, url: str) -> None:
    try:
        pipe.close()
    except OSError:
        if pipe.status in (126, 127):  # the shell's own words
            raise UserError(
                f"{shown(url)}: the command cannot be run (exit status {pipe.status}); check its "
                "name and whether it is installed"
            ) from None
        raise OSError(f"the command ended with exit status {pipe.status}") from None


class BytesSink:
    """Keeps what comes in memory, up to a bound.

    Raises:
        UserError: On `write`, if the file is larger than the bound.
    """

    def __init__(self, url: str, max_bytes: int) -> None:
        self.data = bytearray()
        self._url, self._max_bytes = url, max_bytes

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self.data += data
        if len(self.data) > self._max_bytes:
            raise UserError(f"{shown(self._url)}: larger than {self._max_bytes:,} bytes")

    def restart(self) -> None:
        """Forget everything."""
        self.data.clear()


def read_if_there(url: str, patience: Patience) -> bytes | None:
    """The bytes of a small file, an index for instance; None if there is no such file.

    Raises:
        UserError: If it cannot be fetched, or is larger than 1 GiB.
    """
    sink = BytesSink(url, _MAX_BYTES_IN_MEMORY)
    try:
        download(look(url, patience), sink, patience)
    except NotThereError:
        return None
    return bytes(sink.data)
