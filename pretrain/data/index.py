"""Where each sample lies inside its tar: the table, and how it is made from any shard."""

import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError
from common.files import sha256_of, write_atomically, write_json
from pretrain.data.order import stable_hash

FORMAT = "fa-shards-1"
SAMPLE_DTYPE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u8")]
)
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
NO_LABEL = -1
_KEY_AND_SUFFIX = re.compile(
    r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL
)  # WebDataset's rule: first dot of the name


@dataclass(frozen=True)
class Entry:
    """One sample of a shard."""

    name: str  # WebDataset key
    offset: int  # of the picture's bytes inside the tar
    size: int  # of the picture, bytes
    label: int  # -1: none


def key_hash(name: str) -> int:
    """64-bit number of a sample's name, the same wherever the sample is stored."""
    return int.from_bytes(stable_hash(name, num_bytes=8), "little")


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset key and lower-case suffix of a tar member; None if it has no suffix."""
    match = _KEY_AND_SUFFIX.match(name)
    return (match[1], match[2].lower()) if match else None


def scan_shard(
    path: Path | str, stream: BinaryIO | None = None
) -> tuple[list[Entry], list[dict[str, str]]]:
    """Find the samples of one tar: consecutive members with the same key, one of them a picture.

    Args:
        path: An uncompressed tar; GNU and pax long names are fine.
        stream: The tar, already open; `path` then only names it in messages.
    Returns:
        The samples in the tar's order, and what was skipped as {"file", "reason"}.
    Raises:
        UserError: If the file is no tar, is compressed, or ends in the middle of a member.
    """
    if stream is None:
        with open(path, "rb") as stream:
            return scan_shard(path, stream)
    entries: list[Entry] = []
    skipped: list[dict[str, str]] = []
    group: dict[str, Any] = {}
    name, size = os.path.basename(path), os.fstat(stream.fileno()).st_size
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise UserError(_truncated(path, f"in the middle of {member.name!r}"))
                parts = split_name(member.name)
                if parts is None:
                    skipped.append(
                        {"file": f"{name}/{member.name}", "reason": "a name without a suffix"}
                    )
                    continue
                if group and group["name"] != parts[0]:
                    _close_group(group, name, entries, skipped)
                    group = {}
                group = group or {"name": parts[0]}
                _add_member(group, parts[1], member, tar)
            _require_end_mark(path, tar, stream)
    except tarfile.ReadError as error:
        if "unexpected end of data" in str(error):
            raise UserError(_truncated(path, "in the middle of a member")) from error
        raise UserError(
            f"{path}: not an uncompressed tar ({error}): unpack it first (gunzip, zstd -d) or "
            "take it away"
        ) from error
    if group:
        _close_group(group, name, entries, skipped)
    return entries, skipped


def _require_end_mark(path: Path | str, tar: tarfile.TarFile, stream: BinaryIO) -> None:
    """A whole tar ends with blocks of zeros; one that was cut between two members does not."""
    stream.seek(tar.offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise UserError(_truncated(path, "without its end mark"))


def _truncated(path: Path | str, where: str) -> str:
    return f"{path}: the tar ends {where}: it was cut short; copy or make this shard again"


def _add_member(
    group: dict[str, Any], suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile
) -> None:
    if suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES and "offset" not in group:
        group["offset"], group["size"] = member.offset_data, member.size
    elif suffix == "cls":
        stream = tar.extractfile(member)
        group["cls"] = stream.read(32) if stream is not None else b""


def _close_group(
    group: dict[str, Any], shard: str, entries: list[Entry], skipped: list[dict[str, str]]
) -> None:
    key = group["name"]
    if "offset" not in group:
        skipped.append({"file": f"{shard}/{key}", "reason": "no picture"})
        return
    label = NO_LABEL
    if "cls" in group:
        try:
            label = int(group["cls"].decode())
        except (ValueError, UnicodeDecodeError):
            reason = f"label {group['cls'][:32]!r} is not an integer; kept without a label"
            skipped.append({"file": f"{shard}/{key}.cls", "reason": reason})
    entries.append(Entry(key, group["offset"], group["size"], label))


def to_table(shards: list[list[Entry]]) -> np.ndarray:
    """Join the entries of all shards into one structured array."""
    table = np.empty(sum(map(len, shards)), dtype=SAMPLE_DTYPE)
    row = 0
    for number, entries in enumerate(shards):
        for entry in entries:
            table[row] = (number, entry.offset, entry.size, entry.label, key_hash(entry.name))
            row += 1
    return table


def read_index(path: Path) -> dict[str, Any]:
    """Read index.json.

    Raises:
        UserError: If it cannot be read or is of another format.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as an index ({error}); delete it and make the shards again"
        ) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(
            f"{path}: not an index of format {FORMAT!r}; delete it, or make the shards again"
        )
    return index


def write_index(
    folder: Path,
    table: np.ndarray,
    shards: list[dict[str, Any]],
    *,
    classes: list[str] | None,
    options: dict[str, Any],
    skipped: list[dict[str, str]],
) -> None:
    """Write samples.npy, then index.json, each by rename."""
    write_atomically(folder / "samples.npy", lambda file: np.save(file, table))
    index = {
        "format": FORMAT,
        "num_samples": len(table),
        "classes": classes,
        "shards": shards,
        "options": options,
        "skipped": skipped,
        "samples": "samples.npy",
        "samples_sha256": sha256_of(folder / "samples.npy"),
    }
    write_json(folder / "index.json", index)
