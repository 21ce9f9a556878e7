"""Read tars once, from front to end: local files, servers and commands."""

import re
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, Any, Protocol, cast

from common.errors import UserError
from pretrain.data.sources.remote import Patience, RemoteFile, download, look, shown

_MAX_PARTS = 2  # of 8 MiB each, fetched and not yet read
_SKIP_BYTES = 1 << 20  # read at once where bytes are passed over
_REMOTE = re.compile(r"(https?|s3|gs)://|pipe:")


class ByteStream(Protocol):
    """Bytes in their order."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...

    def close(self) -> object:
        """Give back what it holds."""
        ...


def open_stream(url: str, patience: Patience) -> ByteStream:
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
            f"{shown(self._url)}: a second try brought other bytes than the first; a source must "
            "give the same tar each time"
        )


class _Forward:
    """A stream as `tarfile` wants it: with positions, though it moves forward only.

    Attributes:
        last: What the last `read` gave.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream, self._position, self.last = stream, 0, b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, /) -> int:
        assert position >= self._position, "tarfile went back"
        while self._position < position and self.read(min(_SKIP_BYTES, position - self._position)):
            pass
        return self._position

    def read(self, size: int, /) -> bytes:
        """`size` bytes, fewer only at the end."""
        data = self._stream.read(size)
        if len(data) < size:
            parts = [data]
            while parts[-1] and (missing := size - sum(map(len, parts))):
                parts.append(self._stream.read(missing))
            data = b"".join(parts)
        self._position += len(data)
        self.last = data
        return data


class TarStream:
    """The files of one tar, in their order.

    A tar is taken for whole only if it ends with a block of zeros: `tarfile` alone, and with it
    webdataset's own reader, takes a damaged header or a cut between two files for the end. After
    the last file the stream is read to its end, so that a command's exit status is heard of.

    Args:
        url: A local path, a URL, or ``pipe:`` with a command.
        patience: How long to keep trying.
        is_wanted: Told a file's name; the bytes of others are passed over.
    """

    def __init__(self, url: str, patience: Patience, is_wanted: Callable[[str], bool]) -> None:
        self._name, self._is_wanted = shown(url), is_wanted
        self._stream = open_stream(url, patience)

    def __enter__(self) -> "TarStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stream.close()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of the files; no bytes where they are not wanted.

        Raises:
            UserError: If the tar is compressed, damaged, cut short, or cannot be fetched.
        """
        forward = _Forward(self._stream)
        try:
            with tarfile.open(fileobj=cast(IO[bytes], forward), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    cast(Any, tar).members.clear()  # kept for random access
                    if member.isfile():
                        yield member.name, self._bytes(member, forward)
        except tarfile.TarError as error:
            raise UserError(self._refusal(error, forward)) from error
        except OSError as error:
            raise UserError(f"{self._name}: cannot be read ({error}); check the file") from error
        if forward.last != bytes(tarfile.BLOCKSIZE):
            how = "a damaged header" if len(forward.last) == tarfile.BLOCKSIZE else "no end mark"
            raise UserError(self._cut_short(how))
        while forward.read(_SKIP_BYTES):
            pass

    def _bytes(self, member: tarfile.TarInfo, forward: _Forward) -> bytes:
        if not self._is_wanted(member.name):
            return b""
        forward.seek(member.offset_data)
        data = forward.read(member.size)
        if len(data) < member.size:
            raise UserError(self._cut_short(f"it ends in the middle of {member.name!r}"))
        return data

    def _refusal(self, error: Exception, forward: _Forward) -> str:
        if forward.tell() > tarfile.BLOCKSIZE:  # it began as a tar
            return self._cut_short(str(error))
        return (
            f"{self._name}: not an uncompressed tar ({error}): unpack it first (gunzip, zstd -d) "
            "or take it away"
        )

    def _cut_short(self, how: str) -> str:
        return (
            f"{self._name}: the tar is cut short or damaged ({how}); copy or make this shard again"
        )
