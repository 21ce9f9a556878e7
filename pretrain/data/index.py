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
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np

from common import files
from common.errors import UserError, require
from common.pictures import MAX_FILE_BYTES, PICTURE_SUFFIXES
from pretrain.data.random_numbers import stable_hash

FORMAT = "fa-shards-1"
SAMPLE_DTYPE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u8")]
)
RULES = 2  # of `tar_samples`; another number, and tars of other tools are indexed again
NO_LABEL = -1
MAX_LABEL = 2**31 - 1  # what the table holds
_KEY_AND_SUFFIX = re.compile(
    r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL
)  # WebDataset's rule: first dot of the name
_META = re.compile(r"__[^/]*__($|/)")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")  # a name in the suffix, as in "a.seg.png"
_MAX_GROUP = 256  # consecutive files of one key that are held together
_MAX_LABEL_BYTES = 1 << 16  # of a cls file that is looked at
_READ_BYTES = 1 << 20  # read at once
_MAX_HEADER_BYTES = 1 << 18  # of a long name, or pax attributes
_LONG_NUMBER = re.compile(rb"[0-9]{300}")
_MAX_LINKS = 16  # from one to the next
_ROWS_AT_ONCE = 1 << 22  # of the table that are counted, 32 MiB of numbers
# What numpy raises for a damaged .npy.
_NPY_ERRORS = (OSError, EOFError, ValueError, SyntaxError, OverflowError, tokenize.TokenError)
_REMEDY = "delete index.json and run again to index the tars, or make the shards again"


# -- names ----------------------------------------------------------------------------------------


def sample_hash(name: str) -> int:
    """64-bit number of a sample's name, the same wherever the sample is stored."""
    return int.from_bytes(stable_hash(name, num_bytes=8), "little")


def key_and_suffix(name: str) -> tuple[str, str]:
    """WebDataset key and lower-case suffix of a tar member; the whole name and "" without one.

    A suffix begins at the first dot, as "seg.png" of "a.seg.png", but holds only names: what is
    none, as a number, belongs to the key with all before it. So "a.2024.01.jpg" is ("a.2024.01",
    "jpg").
    """
    match = _KEY_AND_SUFFIX.match(name)
    if match is None:
        return name, ""
    *fields, last = match[2].split(".")
    num_key = max((i for i, x in enumerate(fields, 1) if not _FIELD.fullmatch(x)), default=0)
    suffix = ".".join([*fields[num_key:], last])
    return ".".join([match[1], *fields[:num_key]]), suffix.lower()


def is_picture(suffix: str) -> bool:
    """Whether a member with this suffix is a sample's picture; "left.jpg" is one too."""
    return f".{suffix.rpartition('.')[2]}" in PICTURE_SUFFIXES


def label_of(data: bytes) -> tuple[int, str]:
    """The label in a sample's ``cls`` file, NO_LABEL without one, and why there is none or ""."""
    text = data.strip()
    if not re.fullmatch(rb"[+-]?[0-9]{1,30}", text):
        return NO_LABEL, f"label {data[:32]!r} is not an integer"
    label = int(text)
    if NO_LABEL <= label <= MAX_LABEL:
        return label, ""
    return NO_LABEL, f"label {label} is no class number (0 to {MAX_LABEL})"


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
        is_seekable: True if it can also go back.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream, self._position, self.last = stream, 0, b""
        self._ahead = b""  # read already, but not taken
        self.is_seekable = hasattr(stream, "seek")

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, /) -> int:
        if self.is_seekable:
            try:
                self._position = cast(IO[bytes], self._stream).seek(position)
            except (OSError, OverflowError) as error:
                raise tarfile.ReadError(f"no file is {position:,} bytes long") from error
            return position
        assert position >= self._position, "tarfile went back"
        while self._position < position:
            if not self.read_data(min(_READ_BYTES, position - self._position)):
                break
        return self._position

    def read(self, size: int, /) -> bytes:
        """`size` bytes of a header, fewer only at the end; `tarfile` reads nothing else.

        Raises:
            tarfile.ReadError: If no header is so long, or `tarfile` would take long to read it.
        """
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data = self.read_data(size)
        # tarfile would take the square of such a number's length to read it.
        if size > tarfile.BLOCKSIZE and _LONG_NUMBER.search(data):
            raise tarfile.ReadError("a header with a number of 300 digits")
        return data

    def read_data(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end; memory grows with what is there, not with `size`."""
        parts, missing = [self._ahead[:size]], size - len(self._ahead[:size])
        self._ahead = self._ahead[size:]
        while missing > 0 and (part := self._stream.read(min(missing, _READ_BYTES))):
            parts.append(part)
            missing -= len(part)
        self.last = parts[-1] if len(parts) == 2 and not parts[0] else b"".join(parts)
        self._position += len(self.last)
        return self.last

    def has_more(self) -> bool:
        """Move to the next block that is not all zeros; False if only zeros are left."""
        while data := self.read_data(tarfile.BLOCKSIZE):
            if data.strip(b"\0"):
                self._position -= len(data)
                if self.is_seekable:
                    self.seek(self._position)
                else:
                    self._ahead = data
                return True
        return False


class TarMember(NamedTuple):
    """A member of a tar that is no folder.

    Attributes:
        name: As the tar says; it may hold anything.
        offset: Of its bytes inside the tar; of a link, those of the file that it names.
        size: Bytes.
        data: Its bytes, where they are needed.
        fault: Why it has none, or "".
    """

    name: str
    offset: int
    size: int
    data: bytes
    fault: str


def tar_files(
    stream: ByteStream, name: str, is_needed: Callable[[str, int], bool]
) -> Iterator[TarMember]:
    """The members of one tar that are no folders, in their order.

    GNU and pax long names are fine, and so are tars one after the other (``cat a.tar b.tar``).
    Links, hard and symbolic, give the bytes of the file of this tar that they name; a stream that
    cannot go back has none for them. Nothing is read by a name, or written.

    A tar is taken for whole only if it ends with a block of zeros and nothing but zeros follows:
    `tarfile` alone, and with it webdataset's own reader, takes a damaged header, a cut between two
    files or zeros in the middle for the end. So the stream is read to its end, where a command's
    exit status is seen.

    Args:
        stream: The tar, at its beginning.
        name: What to call it in messages.
        is_needed: Given a member's name and size; the bytes of others are passed over.
    Raises:
        UserError: If the tar is compressed, damaged, cut short, or cannot be read.
    """

    def cut_short(how: object) -> UserError:
        again = "copy or make this shard again"
        return UserError(f"{name}: the tar is cut short or damaged ({how}); {again}")

    forward, first = _Forward(stream), 0
    try:
        while first == 0 or forward.has_more():
            first = forward.tell()
            targets: dict[str, tarfile.TarInfo] | None = None
            for member in _headers(forward):
                if member.isdir():
                    continue
                target: tarfile.TarInfo | None = member
                if (member.islnk() or member.issym()) and forward.is_seekable:
                    if targets is None:  # seldom needed: the headers are read once more
                        here = forward.tell()
                        forward.seek(first)
                        targets = {os.path.normpath(m.name): m for m in _headers(forward)}
                        forward.seek(here)
                    target = _target_of(member, targets)
                fault, data = _fault_of(member, target), b""
                if target is None or fault:
                    yield TarMember(member.name, member.offset_data, 0, b"", fault)
                    continue
                if is_needed(member.name, target.size):
                    forward.seek(target.offset_data)
                    data = forward.read_data(target.size)
                    if len(data) < target.size:
                        raise cut_short(f"it ends in the middle of {member.name!r}")
                yield TarMember(member.name, target.offset_data, target.size, data, "")
            if forward.last != bytes(tarfile.BLOCKSIZE):
                is_block = len(forward.last) == tarfile.BLOCKSIZE
                is_new = first > 0 and forward.tell() - len(forward.last) == first
                bad = f"bytes after its end, at {first:,}" if is_new else "a damaged header"
                raise cut_short(bad if is_block or is_new else "no end mark")
            first = forward.tell()
    except UserError:
        raise
    except (tarfile.TarError, ValueError, RecursionError, OverflowError, IndexError) as error:
        # All but the first are tarfile's own mistakes about headers that make no sense.
        if forward.tell() > tarfile.BLOCKSIZE:  # it began as a tar
            raise cut_short(error) from error
        raise UserError(f"{name}: not an uncompressed tar ({error}): unpack it first") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error}); check the file") from error


def _headers(forward: _Forward) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar from here on; none is kept."""
    tar = tarfile.open(fileobj=cast(IO[bytes], forward), mode="r:", encoding="utf-8")  # noqa: SIM115
    is_empty = cast(Any, tar).firstmember is None  # then it would read the first header again
    while not is_empty and (member := tar.next()) is not None:
        cast(Any, tar).members.clear()  # kept for random access
        if member.size < 0:  # tarfile would go back, for ever
            raise tarfile.ReadError(f"a file of {member.size:,} bytes")
        yield member


def _target_of(
    link: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]
) -> tarfile.TarInfo | None:
    """The file of the tar that a link names, through further links; None if there is none."""
    member: tarfile.TarInfo | None = link
    for _ in range(_MAX_LINKS):
        if member is None or not (member.islnk() or member.issym()):
            return member
        folder = os.path.dirname(member.name) if member.issym() else ""
        member = members.get(os.path.normpath(os.path.join(folder, member.linkname)))
    return None


def _fault_of(member: tarfile.TarInfo, target: tarfile.TarInfo | None) -> str:
    """Why a member has no bytes to give, or ""."""
    if target is None or target.islnk() or target.issym():
        why = "no file of this tar" if target is None else "where a stream cannot go back to"
        return f"a link to {member.linkname!r}, {why}"
    if not target.isfile():
        return "no plain file"
    if target.issparse():
        return "a sparse file: pack it without --sparse"
    if target.size > MAX_FILE_BYTES:
        return f"{target.size:,} bytes, more than {MAX_FILE_BYTES:,}"
    return ""


# -- the samples of one tar -----------------------------------------------------------------------


class TarSample(NamedTuple):
    """A picture of a tar, or what is left out.

    Attributes:
        name: WebDataset key; of what is left out the file's name, or the key that has no picture.
        offset: Of the picture's bytes inside the tar.
        size: Of the picture, bytes.
        label: NO_LABEL if there is none.
        data: The picture, where it is needed.
        fault: Why it is left out, or "".
    """

    name: str
    offset: int
    size: int
    label: int
    data: bytes = b""
    fault: str = ""


class Notes:
    """What was not used of samples that are used: one text for each kind of it in a tar."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[str, str, int]] = {}

    def add(self, kind: str, file: str, reason: str) -> None:
        """Note a file; the first of each kind is the example."""
        file, reason, count = self._kinds.get(kind, (file, reason, 0))
        self._kinds[kind] = file, reason, count + 1

    def items(self) -> list[dict[str, Any]]:
        """Of each kind the first file, its reason, and how many there are: "kept"."""
        return [
            {"file": file, "reason": f"{reason} ({count} such)", "kept": count}
            for file, reason, count in self._kinds.values()
        ]


def tar_samples(
    stream: ByteStream, name: str, notes: Notes, *, with_pictures: bool
) -> Iterator[TarSample]:
    """The samples of one tar and what is left out of it, in the tar's order.

    This is the one place where files become samples (docs/shards.md says how). Files such as
    ``__meta__`` belong to no sample, as in webdataset.

    Args:
        stream: The tar, at its beginning.
        name: What to call it in messages.
        notes: Gets labels and pictures that are not used.
        with_pictures: Whether the pictures' bytes are needed.
    Raises:
        UserError: As `tar_files`.
    """

    def is_needed(member: str, size: int) -> bool:
        suffix = key_and_suffix(member)[1]
        is_label = suffix.rsplit(".", 1)[-1] == "cls" and size <= _MAX_LABEL_BYTES
        return is_label or (with_pictures and is_picture(suffix))

    members = (
        (*key_and_suffix(member.name), member)
        for member in tar_files(stream, name, is_needed)
        if not _META.match(member.name)
    )
    for key, group in itertools.groupby(members, key=lambda member: member[0]):
        while some := [member[1:] for member in itertools.islice(group, _MAX_GROUP)]:
            yield from _samples_of_key(key, some, notes)


def _samples_of_key(
    key: str, members: list[tuple[str, TarMember]], notes: Notes
) -> Iterator[TarSample]:
    """The samples among consecutive files with one WebDataset key, given with their suffixes."""
    pictures: dict[str, tuple[str, TarMember]] = {}  # the first of each name, with its stem
    stems: set[str] = set()  # of all, also of those that cannot be read
    labels: dict[str, int] = {}
    left_out: list[TarSample] = []

    def leave_out(member: TarMember, why: str) -> None:
        left_out.append(TarSample(member.name, member.offset, 0, NO_LABEL, fault=why))

    for suffix, member in members:
        stem = member.name[: len(member.name) - len(suffix.rpartition(".")[2]) - 1]
        if suffix.rpartition(".")[2] == "cls":
            label, why = label_of(member.data)
            why = member.fault or why
            if stem in labels:
                notes.add("twice", member.name, f"a label of sample {key!r} comes twice")
            elif why:
                notes.add("label", member.name, f"{why}; kept without a label")
            labels.setdefault(stem, label)
        elif is_picture(suffix):
            stems.add(stem)
            if member.fault:
                leave_out(member, member.fault)
            elif member.name in pictures:
                leave_out(member, f"a file of sample {key!r} comes twice")
            else:
                pictures[member.name] = stem, member

    # With a file "a.jpg", "a.cls" or the like the key is a sample: its picture is the plain one, or
    # its only one. Without, and where there are several, each is a sample under its own name.
    own = key if key in stems else min(stems, default=key)
    is_keyed = any(suffix and "." not in suffix for suffix, _ in members)
    is_one = is_keyed and (own == key or len(stems) == 1)
    taken: dict[str, TarMember] = {}
    for stem, member in pictures.values():
        if is_one and stem != own:
            what = member.name[len(key) :]
            notes.add(what, member.name, f"a picture beside that of sample {key!r}, not used")
            continue
        sample = key if is_one else stem
        if (first := taken.setdefault(sample, member)) is not member:
            leave_out(member, f"another picture of sample {sample!r}, beside {first.name!r}")
            continue
        label = labels.get(stem, labels.get(key, NO_LABEL))
        yield TarSample(sample, member.offset, member.size, label, member.data)
    if not pictures and not left_out:
        why = "no picture" if members[0][0] else "a name without a suffix"
        left_out.append(TarSample(key, members[0][1].offset, 0, NO_LABEL, fault=why))
    yield from left_out


def scan_shard(name: str, stream: IO[bytes]) -> tuple[list[TarSample], list[dict[str, Any]]]:
    """Find the samples of one tar.

    Args:
        name: What to call the tar in messages.
        stream: An uncompressed tar.
    Returns:
        The samples in the tar's order; what was skipped as {"file", "reason"}, and with "kept" (how
        many) what is missing from samples that are there: labels, further pictures.
    Raises:
        UserError: As `tar_files`.
    """
    samples: list[TarSample] = []
    skipped: list[dict[str, Any]] = []
    notes, base = Notes(), os.path.basename(name)
    for one in tar_samples(stream, name, notes, with_pictures=False):
        if one.fault:
            skipped.append({"file": f"{base}/{one.name}", "reason": one.fault})
        else:
            samples.append(one)
    kept = [item | {"file": f"{base}/{item['file']}"} for item in notes.items()]
    return samples, skipped + kept


# -- index.json and samples.npy -------------------------------------------------------------------


@dataclass(frozen=True)
class ShardPart:
    """What one tar gives to the index of its set.

    Attributes:
        table: SAMPLE_DTYPE [num_samples]; the shard's number is 0 until it is known.
        shard: Its entry in index.json: name, num_samples, bytes, sha256.
        skipped: What is no sample: [{"file", "reason"}]; see `scan_shard`.
    """

    table: np.ndarray
    shard: dict[str, Any]
    skipped: list[dict[str, Any]]

    @classmethod
    def of(
        cls, name: str, samples: Sequence[TarSample], skipped: list[dict[str, Any]], size: int,
        sha256: str,
    ) -> "ShardPart":  # fmt: skip
        """The part of a tar with its bytes' number and hash."""
        shard = {"name": name, "num_samples": len(samples), "bytes": size, "sha256": sha256}
        rows = [(0, one.offset, one.size, one.label, sample_hash(one.name)) for one in samples]
        return cls(np.array(rows, SAMPLE_DTYPE), shard, skipped)

    def save(self, path: Path, fingerprint: str = "") -> None:
        """Leave it for a later run as PATH.npy and PATH.json.

        Args:
            path: Without the suffix.
            fingerprint: Of what the tar was made of.
        """
        files.write_atomically(Path(f"{path}.npy"), lambda file: np.save(file, self.table))
        facts = {
            "fingerprint": fingerprint,
            "shard": self.shard,
            "skipped": self.skipped,
            "table_sha256": hashlib.sha256(self.table.tobytes()).hexdigest(),
        }
        files.write_json(Path(f"{path}.json"), facts)

    @classmethod
    def load(cls, path: Path, fingerprint: str = "") -> "ShardPart | None":
        """What `save` left; None if there is nothing whole with this fingerprint."""
        try:
            facts: Any = files.read_json_or_none(Path(f"{path}.json"))
            if facts["fingerprint"] != fingerprint:
                return None
            part = cls(np.load(f"{path}.npy"), facts["shard"], facts["skipped"])
            is_whole = hashlib.sha256(part.table.tobytes()).hexdigest() == facts["table_sha256"]
            return part if is_whole and part.table.dtype == SAMPLE_DTYPE else None
        except (*_NPY_ERRORS, KeyError, TypeError, AttributeError):
            return None


def scan_file(path: Path) -> ShardPart:
    """The part of a local tar; raises as `tar_files`, and OSError."""
    with files.open_regular(path) as stream:
        samples, skipped = scan_shard(str(path), stream)
    return ShardPart.of(path.name, samples, skipped, path.stat().st_size, files.sha256_of(path))


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
    files.write_atomically(folder / "samples.npy", lambda file: np.save(file, table))
    index = {
        "format": FORMAT,
        "num_samples": len(table),
        "classes": classes,
        "shards": [part.shard for part in parts],
        "options": options,
        "skipped": [item for part in parts for item in part.skipped],
        "samples": "samples.npy",
        "samples_sha256": files.sha256_of(folder / "samples.npy"),
    }
    files.write_json(folder / "index.json", index)
    return index


def read_index(folder: Path) -> dict[str, Any]:
    """Read a folder's index.json; raises as `parse_index`."""
    path = folder / "index.json"
    try:
        data = files.read_regular(path, files.MAX_JSON_BYTES)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read as an index ({reason}); {_REMEDY}") from error
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
            sizes = (shard["bytes"], shard["num_samples"])
            if not is_hash or not all(type(size) is int and size >= 0 for size in sizes):
                raise ValueError(f"shard {shard['name']!r}: sizes or sha256 are impossible")
        total = sum(shard["num_samples"] for shard in index["shards"])
        if total != index["num_samples"]:
            raise ValueError(f"{total} samples in the shards, num_samples {index['num_samples']}")
        if "/" in check_name(index["samples"], where):
            raise ValueError("samples must be a file beside index.json")
        for name, kind in (("skipped", list), ("options", dict), ("samples_sha256", str)):
            if not isinstance(index[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        for item in index["skipped"]:
            if not (isinstance(item["file"], str) and isinstance(item["reason"], str)):
                raise ValueError("skipped: an entry without file and reason")
        if not all(isinstance(name, str) for name in index["classes"] or []):
            raise ValueError("classes are not names")
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
        files.require_regular(path)
        table = np.lib.format.open_memmap(path, mode="r")  # np.load takes an .npz as well
    except _NPY_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    if table.dtype != SAMPLE_DTYPE or table.shape != (index["num_samples"],):
        num = index["num_samples"]
        raise UserError(f"{path}: does not fit index.json ({num} samples); {_REMEDY}")
    if files.sha256_of(path) != index["samples_sha256"]:
        raise UserError(f"{path}: its SHA-256 is not the one in index.json; {_REMEDY}")
    sizes = [shard["num_samples"] for shard in index["shards"]]
    num_labels = MAX_LABEL + 1 if index["classes"] is None else len(index["classes"])
    labels = table["label"]
    if len(labels) and not NO_LABEL <= int(labels.min()) <= int(labels.max()) < num_labels:
        raise UserError(f"{path}: has labels that index.json has no class for; {_REMEDY}")
    is_inside = not len(table) or int(table["shard"].max()) < len(sizes)
    if not is_inside or (_samples_per_shard(table, len(sizes)) != sizes).any():
        raise UserError(f"{path}: its shards are not those of index.json; {_REMEDY}")
    most = max((shard["bytes"] for shard in index["shards"]), default=0)
    if len(table) and max(int(table[name].max()) for name in ("offset", "size")) > most:
        raise UserError(f"{path}: has samples beyond the end of their shards; {_REMEDY}")
    return table


def _samples_per_shard(table: np.ndarray, num_shards: int) -> np.ndarray:
    """How many samples the table has of each shard, int64; NumPy copies a block at a time."""
    counts = np.zeros(num_shards, np.int64)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = table["shard"][start : start + _ROWS_AT_ONCE]
        counts += np.bincount(rows, minlength=num_shards)
    return counts
