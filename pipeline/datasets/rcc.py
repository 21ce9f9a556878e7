"""Reads Qt resource files (.rcc), formats 1 to 3: a tree, a name table and a data block.

Layout, all numbers big-endian: "qres", version, offsets of tree, data and names (4 bytes each),
from version 3 on a word of flags. A tree entry is name offset (4), flags (2), then for a folder the
number of entries and the first entry's index (4, 4), for a file country, language (2, 2) and data
offset (4); from version 2 on a time stamp (8) follows.
"""

import struct
import zlib

import zstandard

from common.errors import UserError

_ZLIB, _FOLDER, _ZSTD = 1, 2, 4
_MAX_ENTRIES = 100_000
_MAX_BYTES = 1 << 28  # of one unpacked file


def read_rcc(name: str, content: bytes) -> dict[str, bytes]:
    """Read all files of a resource file.

    Args:
        name: What to call it in messages.
        content: The bytes of the .rcc file.
    Returns:
        Contents by path inside the resource, e.g. "gcompris/src/.../sea1.webp".
    Raises:
        UserError: If it is no resource file, damaged, or of an unknown format.
    """
    try:
        return _Reader(content).files()
    except (struct.error, zlib.error, zstandard.ZstdError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"{name}: no readable Qt resource file ({error}); fetch it again"
        ) from error


class _Reader:
    def __init__(self, raw: bytes) -> None:
        magic, self.version, self.tree, self.data, self.names = struct.unpack_from(">4s4I", raw)
        if magic != b"qres" or not 1 <= self.version <= 3:
            raise ValueError(f"starts with {magic!r}, version {self.version}; known are 1 to 3")
        self.raw = raw
        self.entry_bytes = 14 if self.version == 1 else 22

    def files(self) -> dict[str, bytes]:
        """Walk the tree; entries are counted, so that a damaged tree cannot loop for ever."""
        found, waiting, seen = {}, [(0, "")], 0
        while waiting:
            index, folder = waiting.pop()
            seen += 1
            if seen > _MAX_ENTRIES:
                raise ValueError("its tree runs in circles")
            start = self.tree + index * self.entry_bytes
            name_offset, flags = struct.unpack_from(">IH", self.raw, start)
            path = folder + self._name(name_offset) if index else ""
            if flags & _FOLDER:
                count, first = struct.unpack_from(">II", self.raw, start + 6)
                if count > _MAX_ENTRIES:
                    raise ValueError("its tree is damaged")
                below = path + "/" if path else ""
                waiting += [(first + i, below) for i in range(count)]
            else:
                (offset,) = struct.unpack_from(">I", self.raw, start + 10)
                found[path] = self._content(self.data + offset, flags)
        return found

    def _name(self, offset: int) -> str:
        start = self.names + offset
        (length,) = struct.unpack_from(">H", self.raw, start)
        return self._slice(start + 6, 2 * length).decode("utf-16-be")

    def _content(self, start: int, flags: int) -> bytes:
        (length,) = struct.unpack_from(">I", self.raw, start)
        packed = self._slice(start + 4, length)
        if flags & _ZSTD:
            return zstandard.ZstdDecompressor().decompress(packed, max_output_size=_MAX_BYTES)
        if flags & _ZLIB:
            return zlib.decompressobj().decompress(packed[4:], _MAX_BYTES)
        return packed

    def _slice(self, start: int, length: int) -> bytes:
        piece = self.raw[start : start + length]
        if len(piece) < length:
            raise ValueError("it ends too early")
        return piece
