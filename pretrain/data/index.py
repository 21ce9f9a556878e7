"""What tars hold: their files in order, the table of samples, and index.json.

A shard set is a row of WebDataset tars with samples.npy (where each picture lies) and index.json
(the shards with their sizes and hashes). Everything that is read here may come from somebody else,
so damage and impossible entries are refused by name.
"""

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np

from common.errors import UserError, require
from common.files import read_json_or_none, sha256_of, write_atomically, write_json
from pretrain.data.random_numbers import stable_hash

FORMAT = "fa-shards-1"
SAMPLE_DTYPE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u8")]
)
NO_LABEL = -1
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
_KEY_AND_SUFFIX = re.compile(
    r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL
)  # WebDataset's rule: first dot of the name
_META = re.compile(r"__[^/]*__($|/)")
_SKIP_BYTES = 1 << 20  # read at once where bytes are passed over
_REMEDY = "delete index.json and run again to index the tars, or make the shards again"


# -- names ----------------------------------------------------------------------------------------


def sample_hash(name: str) -> int:
    """64-bit number of a sample's name, the same wherever the sample is stored."""
    return int.from_bytes(stable_hash(name, num_bytes=8), "little")


def key_and_suffix(name: str) -> tuple[str, str]:
    """WebDataset key and lower-case suffix of a tar member; the whole name and "" without one."""
    match = _KEY_AND_SUFFIX.match(name)
    return (match[1], match[2].lower()) if match else (name, "")


def is_picture(suffix: str) -> bool:
    """Whether a member with this suffix is a sample's picture; "left.jpg" is one too."""
    return suffix.rsplit(".", 1)[-1] in _IMAGE_SUFFIXES


def label_of(data: bytes) -> int | None:
    """The label in a sample's ``cls`` file; None if it is no integer."""
    try:
        return int(data[:32].decode())
    except ValueError:
        return None


# -- the files of one tar -------------------------------------------------------------------------


class ByteStream(Protocol):
    """Bytes in their order."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...


class _Forward:
    """A stream with positions, as `tarfile` needs it, though it may move forward only.

    Attributes:
        last: What the last `read` gave.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream, self._position, self.last = stream, 0, b""
        self.is_seekable = hasattr(stream, "seek")

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, /) -> int:
        if self.is_seekable:
            self._position = cast(IO[bytes], self._stream).seek(position)
            return position
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


def tar_files(
    stream: ByteStream, name: str, is_needed: Callable[[str], bool]
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The files of one tar, in their order; GNU and pax long names are fine.

    A tar is taken for whole only if it ends with a block of zeros: `tarfile` alone, and with it
    webdataset's own reader, takes a damaged header or a cut between two files for the end. A stream
    that cannot seek is read to its end after the last file, so that a command's exit status is
    seen.

    Args:
        stream: The tar, at its beginning.
        name: What to call it in messages.
        is_needed: Given a file's name; the bytes of others are passed over.
    Yields:
        Each file and its bytes, none where they are not needed.
    Raises:
        UserError: If the tar is compressed, damaged, cut short, or cannot be read.
    """

    def cut_short(how: object) -> UserError:
        again = "copy or make this shard again"
        return UserError(f"{name}: the tar is cut short or damaged ({how}); {again}")

    forward = _Forward(stream)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], forward), mode="r:") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members.clear()  # kept for random access
                if not member.isfile():
                    continue
                data = b""
                if is_needed(member.name):
                    forward.seek(member.offset_data)
                    data = forward.read(member.size)
                    if len(data) < member.size:
                        raise cut_short(f"it ends in the middle of {member.name!r}")
                yield member, data
    except tarfile.TarError as error:
        if forward.tell() > tarfile.BLOCKSIZE:  # it began as a tar
            raise cut_short(error) from error
        raise UserError(f"{name}: not an uncompressed tar ({error}): unpack it first") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error}); check the file") from error
    if forward.last != bytes(tarfile.BLOCKSIZE):
        is_block = len(forward.last) == tarfile.BLOCKSIZE
        raise cut_short("a damaged header" if is_block else "no end mark")
    while not forward.is_seekable and forward.read(_SKIP_BYTES):
        pass


def tar_samples(
    stream: ByteStream, name: str, is_needed: Callable[[str], bool]
) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo, bytes]]]]:
    """The samples of one tar: consecutive files with the same key.

    Files such as ``__meta__`` belong to no sample, as in webdataset.

    Args:
        stream: The tar, at its beginning.
        name: What to call it in messages.
        is_needed: Given a suffix; the bytes of other files are passed over.
    Yields:
        Key, and suffix, header and bytes of each file. A file without a suffix has its name as key
        and the suffix "".
    Raises:
        UserError: As `tar_files`.
    """
    files = (
        (*key_and_suffix(member.name), member, data)
        for member, data in tar_files(stream, name, lambda n: is_needed(key_and_suffix(n)[1]))
        if not _META.match(member.name)
    )
    for key, group in itertools.groupby(files, key=lambda file: file[0]):
        yield key, [file[1:] for file in group]


@dataclass(frozen=True)
class Entry:
    """One sample of a shard."""

    name: str  # WebDataset key
    offset: int  # of the picture's bytes inside the tar
    size: int  # of the picture, bytes
    label: int  # -1: none


def scan_shard(name: str, stream: IO[bytes]) -> tuple[list[Entry], list[dict[str, str]]]:
    """Find the samples of one tar that have a picture.

    Args:
        name: What to call the tar in messages.
        stream: An uncompressed tar.
    Returns:
        The samples in the tar's order, and what was skipped as {"file", "reason"}.
    Raises:
        UserError: As `tar_files`.
    """
    entries: list[Entry] = []
    skipped: list[dict[str, str]] = []

    def skip(file: str, reason: str) -> None:
        skipped.append({"file": f"{os.path.basename(name)}/{file}", "reason": reason})

    for key, files in tar_samples(stream, name, lambda suffix: suffix == "cls"):
        picture, label = None, NO_LABEL
        for suffix, member, data in files:
            if is_picture(suffix):
                picture = picture or member
            elif suffix == "cls" and (own := label_of(data)) is not None:
                label = own
            elif suffix == "cls":
                reason = f"label {data[:32]!r} is not an integer; kept without a label"
                skip(f"{key}.cls", reason)
        if picture is None:
            is_named = key != files[0][1].name
            skip(key, "no picture" if is_named else "a name without a suffix")
        else:
            entries.append(Entry(key, picture.offset_data, picture.size, label))
    return entries, skipped


# -- index.json and samples.npy -------------------------------------------------------------------


@dataclass(frozen=True)
class ShardPart:
    """What one tar gives to the index of its set.

    Attributes:
        table: SAMPLE_DTYPE [num_samples]; the shard's number is 0 until it is known.
        shard: Its entry in index.json: name, num_samples, bytes, sha256.
        skipped: What is no sample: [{"file", "reason"}].
    """

    table: np.ndarray
    shard: dict[str, Any]
    skipped: list[dict[str, str]]

    @classmethod
    def of(
        cls, name: str, entries: Sequence[Entry], skipped: list[dict[str, str]], size: int,
        sha256: str,
    ) -> "ShardPart":  # fmt: skip
        """The part of a tar with its bytes' number and hash."""
        shard = {"name": name, "num_samples": len(entries), "bytes": size, "sha256": sha256}
        rows = [(0, one.offset, one.size, one.label, sample_hash(one.name)) for one in entries]
        return cls(np.array(rows, SAMPLE_DTYPE), shard, skipped)

    def save(self, path: Path, fingerprint: str = "") -> None:
        """Leave it for a later run as PATH.npy and PATH.json.

        Args:
            path: Without the suffix.
            fingerprint: Of what the tar was made of.
        """
        write_atomically(Path(f"{path}.npy"), lambda file: np.save(file, self.table))
        facts = {
            "fingerprint": fingerprint,
            "shard": self.shard,
            "skipped": self.skipped,
            "table_sha256": hashlib.sha256(self.table.tobytes()).hexdigest(),
        }
        write_json(Path(f"{path}.json"), facts)

    @classmethod
    def load(cls, path: Path, fingerprint: str = "") -> "ShardPart | None":
        """What `save` left; None if there is nothing whole with this fingerprint."""
        try:
            facts: Any = read_json_or_none(Path(f"{path}.json"))
            if facts["fingerprint"] != fingerprint:
                return None
            part = cls(np.load(f"{path}.npy"), facts["shard"], facts["skipped"])
            is_whole = hashlib.sha256(part.table.tobytes()).hexdigest() == facts["table_sha256"]
            return part if is_whole and part.table.dtype == SAMPLE_DTYPE else None
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None


def scan_file(path: Path) -> ShardPart:
    """The part of a local tar; raises as `tar_files`, and OSError."""
    with open(path, "rb") as stream:
        entries, skipped = scan_shard(str(path), stream)
    return ShardPart.of(path.name, entries, skipped, path.stat().st_size, sha256_of(path))


def write_index(
    folder: Path, parts: Iterable[ShardPart], *, classes: list[str] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Join the parts of a set; write samples.npy, then index.json, each by rename.

    Args:
        folder: Where to.
        parts: Of all shards, at least one, in their order.
        classes: Class names, or None.
        options: What the set was made with.
    Returns:
        index.json.
    """
    parts = list(parts)
    table = np.concatenate([part.table for part in parts])
    table["shard"] = np.repeat(np.arange(len(parts)), [len(part.table) for part in parts])
    write_atomically(folder / "samples.npy", lambda file: np.save(file, table))
    index = {
        "format": FORMAT,
        "num_samples": len(table),
        "classes": classes,
        "shards": [part.shard for part in parts],
        "options": options,
        "skipped": [item for part in parts for item in part.skipped],
        "samples": "samples.npy",
        "samples_sha256": sha256_of(folder / "samples.npy"),
    }
    write_json(folder / "index.json", index)
    return index


def read_index(folder: Path) -> dict[str, Any]:
    """Read a folder's index.json; raises as `parse_index`."""
    path = folder / "index.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an index ({error}); {_REMEDY}") from error
    return parse_index(data, str(path))


def parse_index(data: bytes, where: str) -> dict[str, Any]:
    """An index, wherever it comes from.

    Raises:
        UserError: If it is no index, or of another format, or its entries are missing, of another
            kind, or lead out of the folder; naming the first such entry.
    """
    try:
        index = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as an index ({error}); {_REMEDY}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{where}: not an index of format {FORMAT!r}; {_REMEDY}")
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
        for name in ("classes", "skipped", "options", "samples_sha256"):
            if name not in index:
                raise KeyError(name)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: damaged index ({reason}); {_REMEDY}") from None
    return index


def check_name(name: object, where: str) -> str:
    """A file name out of an index: it must stay below the folder of the index.

    Raises:
        UserError: If it is absolute, climbs out of the folder, or names another place.
    """
    is_plain = (
        isinstance(name, str)
        and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name)
        and not re.search(r"[\\\x00-\x1f]", name)
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )
    if not is_plain:
        outside = f"names the file {name!r}, which does not lie below the folder"
        raise UserError(f"{where}: {outside}; such an index is not trusted")
    return str(name)


def load_table(folder: Path, index: dict[str, Any]) -> np.ndarray:
    """The table of samples of an index, mapped into memory.

    Raises:
        UserError: If it is missing, unreadable, of another length, or of another hash.
    """
    path = folder / index["samples"]
    require(path.exists(), f"{path}: missing; {_REMEDY}")
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    if table.dtype != SAMPLE_DTYPE or len(table) != index["num_samples"]:
        num = index["num_samples"]
        raise UserError(f"{path}: does not fit index.json ({num} samples); {_REMEDY}")
    if sha256_of(path) != index["samples_sha256"]:
        raise UserError(f"{path}: its SHA-256 is not the one in index.json; {_REMEDY}")
    sizes = [shard["num_samples"] for shard in index["shards"]]
    is_inside = not len(table) or int(table["shard"].max()) < len(sizes)
    if not is_inside or (np.bincount(table["shard"], minlength=len(sizes)) != sizes).any():
        raise UserError(f"{path}: its shards are not those of index.json; {_REMEDY}")
    return table
