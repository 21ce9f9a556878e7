"""Bytes of tars that are read once, from front to end: local files, servers and commands."""

import re
import threading
import zlib
from collections import deque
from typing import BinaryIO

from common.errors import UserError
from pretrain.data.sources.remote import Patience, RemoteFile, displayed, download, look

_MAX_PARTS = 2  # of 8 MiB each, fetched and not yet read
_SKIP_BYTES = 1 << 20  # read at once where bytes are passed over
_REMOTE = re.compile(r"(https?|s3|gs)://|pipe:")


def open_stream(url: str, patience: Patience) -> "BinaryIO | RemoteStream":
    """Open a tar that is read once.

    Args:
        url: A local path, a URL, or ``pipe:`` with a command.
        patience: How long to keep trying.
    Raises:
        UserError: If a local file cannot be opened. What servers and commands do wrong is raised by
            `read`.
    """
    if _REMOTE.match(url):
        return RemoteStream(url, patience)
    try:
        return open(url, "rb")
    except FileNotFoundError:
        raise UserError(f"{url}: there is no such shard; check the path") from None
    except OSError as error:
        raise UserError(f"{url}: cannot be opened ({error.strerror}); check the file") from error


class _ClosedError(Exception):
    """The reader wants no more bytes."""


class RemoteStream:
    """Bytes of a file on a server, or of a command's output, fetched by a thread.

    `download` does the work, with its retries. At most two parts of 8 MiB wait to be read. Where a
    try begins again from the front (a command, or a server without ranges), the bytes that were
    handed over already are passed over, and compared by their checksum.

    Args:
        url: A URL, or ``pipe:`` with a command.
        patience: How long to keep trying.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self._url, self._patience = url, patience
        self._parts: deque[memoryview] = deque()
        self._changed = threading.Condition()
        self._is_whole = self._is_closed = False
        self._error: Exception | None = None
        self._num_bytes = self._checksum = 0  # of what the reader was given
        self._num_repeated = self._repeated_checksum = 0  # of these, what the present try brought
        threading.Thread(target=self._run, name="shard-stream", daemon=True).start()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end.

        Raises:
            UserError: If the rest cannot be fetched.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._is_whole or self._error)
            if not self._parts:
                if self._error is not None:
                    raise self._error
                return b""
            part = self._parts.popleft()
            if len(part) > size:
                self._parts.appendleft(part[size:])
            else:
                self._changed.notify_all()
            return bytes(part[:size])

    def close(self) -> None:
        """Stop fetching; the thread ends at its next byte, or by its own time limit."""
        with self._changed:
            self._is_closed = True
            self._parts.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            if self._url.startswith("pipe:"):
                file = RemoteFile(self._url, None, "", has_ranges=False)
            else:
                file = look(self._url, self._patience)
            download(file, self, self._patience)
            if self._num_repeated < self._num_bytes:
                raise self._not_the_same()
        except _ClosedError:
            return
        except Exception as error:
            self._finish(error)
        else:
            self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        with self._changed:
            self._is_whole, self._error = error is None, error
            self._changed.notify_all()

    # What `download` calls, in the thread.

    def write(self, data: bytes) -> None:
        """Append bytes; waits while enough of them are unread."""
        missing = self._num_bytes - self._num_repeated
        if missing:
            again, data = data[:missing], data[missing:]
            self._repeated_checksum = zlib.crc32(again, self._repeated_checksum)
            self._num_repeated += len(again)
            if len(again) == missing and self._repeated_checksum != self._checksum:
                raise self._not_the_same()
        if not data:
            return
        self._checksum = zlib.crc32(data, self._checksum)
        self._num_bytes += len(data)
        self._num_repeated, self._repeated_checksum = self._num_bytes, self._checksum
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._parts) < _MAX_PARTS)
            if self._is_closed:
                raise _ClosedError
            self._parts.append(memoryview(data))
            self._changed.notify_all()

    def restart(self) -> None:
        """A new try begins from the front."""
        self._num_repeated = self._repeated_checksum = 0

    def _not_the_same(self) -> UserError:
        return UserError(
            f"{displayed(self._url)}: a second try brought other bytes than the first; a source "
            "must give the same tar each time"
        )
