"""Features on the disk: computed once, block by block, read back row by row in bounded memory.

A file is named after what it depends on (weights, samples, size and number of the pictures), so one
of other weights or shards is never taken for it. Every finished block stands in a journal with a
checksum; blocks that are missing or damaged are computed again. Any number of processes share the
work, also another number than before the interruption.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import read_json_lines, write_json
from pretrain import collectives as dist
from pretrain.data.order import stable_hash

FORMAT = "fa-features-1"
BLOCK_ROWS = 128
"""Rows between two lines of the journal: what a kill can cost each process."""
RESIDENT_BYTES = 256 << 20
"""A file up to this size is read once and kept; of a larger one rows are read when asked for."""
_DTYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Identity:
    """What the values of a file follow from.

    Attributes:
        weights_hash: Of the backbone.
        samples: Fingerprint of the pictures, in their order.
        num_rows: Passes times samples.
        dim: Of a feature.
        dtype: "float32" or "float16".
        view: How pictures are looked at: size, normalisation, crops, precision.
    """

    weights_hash: str
    samples: str
    num_rows: int
    dim: int
    dtype: str
    view: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """As it stands beside the features."""
        return {"format": FORMAT, "block_rows": BLOCK_ROWS, **vars(self)}

    @property
    def hash(self) -> str:
        """Short, for the file's name."""
        return stable_hash(json.dumps(self.plain(), sort_keys=True), num_bytes=8).hex()

    @property
    def num_bytes(self) -> int:
        """Of the features on the disk."""
        return self.num_rows * self.dim * np.dtype(_DTYPES[self.dtype]).itemsize


class FeatureFile:
    """The features of one set, in ``<folder>/<name>-<hash>.bin``.

    Args:
        folder: Where it lies; shared by all processes.
        name: "train" or "val".
        identity: What is in it.
    Attributes:
        num_found: Rows that were there already, whole.
        num_damaged: Rows that the journal had, but whose checksum differs.
    Raises:
        UserError: If the disk has no room for it.
    """

    def __init__(self, folder: Path, name: str, identity: Identity) -> None:
        self.identity = identity
        self._stem = folder / f"{name}-{identity.hash}"
        self.path = self._stem.with_name(self._stem.name + ".bin")
        self._dtype = np.dtype(_DTYPES[identity.dtype])
        if dist.rank() == 0:
            self._allocate(folder)
        dist.wait()
        self._file = os.open(self.path, os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        self._row_bytes = identity.dim * self._dtype.itemsize
        self._resident: np.ndarray | None = None
        self.num_found = self.num_damaged = 0
        self._missing = self._look()
        dist.wait()  # all have read the journals before any goes on writing
        self._journal = self._stem.with_name(f"{self._stem.name}.{dist.rank()}.jsonl")

    def _allocate(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        size = self.identity.num_bytes
        if self.path.exists() and self.path.stat().st_size == size:
            return
        free = shutil.disk_usage(folder).free
        if free < size:
            raise UserError(
                f"{folder}: the features of {self.identity.num_rows:,} pictures need "
                f"{size / 1e6:,.0f} MB, only {free / 1e6:,.0f} MB are free; free some space, give "
                "another --features DIR, or take feature_dtype=float16"
            )
        for journal in folder.glob(f"{self._stem.name}.*.jsonl"):
            journal.unlink()
        write_json(self._stem.with_name(self._stem.name + ".json"), self.identity.plain())
        with open(self.path, "wb") as file:
            reserve(file.fileno(), size)

    def _look(self) -> list[int]:
        """Blocks that are to be computed: all but those that are whole."""
        known: dict[int, str] = {}
        for journal in sorted(self._stem.parent.glob(f"{self._stem.name}.*.jsonl")):
            known.update({row["block"]: row["hash"] for row in read_json_lines(journal)})
        missing = []
        for block in range(-(-self.identity.num_rows // BLOCK_ROWS)):
            rows = self.rows_of(block)
            if block in known and known[block] == _hash(self._read_slice(rows)):
                self.num_found += rows.stop - rows.start
                continue
            missing.append(block)
            self.num_damaged += (rows.stop - rows.start) * (block in known)
        return missing

    def rows_of(self, block: int) -> slice:
        """The rows of a block."""
        return slice(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.identity.num_rows))

    def own_blocks(self) -> list[int]:
        """What this process has to compute: every n-th of the missing blocks."""
        return self._missing[dist.rank() :: dist.world_size()]

    def write(self, block: int, features: Tensor) -> None:
        """Put a block in its place, and into the journal.

        Raises:
            UserError: If a value is not finite, or too large for the type.
        """
        rows = self.rows_of(block)
        with np.errstate(over="ignore"):  # told of below
            values = features.cpu().numpy().astype(self._dtype)
        if not np.isfinite(values).all():
            raise UserError(
                f"features of rows {rows.start} to {rows.stop - 1} are not finite in "
                f"{self.identity.dtype}: the weights are damaged, or the values too large; "
                "feature_dtype=float32 holds the larger ones"
            )
        os.pwrite(self._file, values.tobytes(), rows.start * self._row_bytes)
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps({"block": block, "hash": _hash(values)}) + "\n")

    def finish(self) -> None:
        """Wait for the other processes; all rows can be read then."""
        os.fsync(self._file)
        dist.wait()

    def read(self, rows: np.ndarray | slice) -> Tensor:
        """Some rows as float32 [n, dim], on the CPU."""
        if self._resident is None and self.identity.num_bytes <= RESIDENT_BYTES:
            self._resident = self._read_slice(slice(0, self.identity.num_rows))
        if self._resident is not None:
            values = self._resident[rows]
        elif isinstance(rows, slice):
            values = self._read_slice(rows)
        else:
            values = np.empty((len(rows), self.identity.dim), self._dtype)
            size, flat = self._row_bytes, values.data.cast("B")
            for place, row in enumerate(rows.tolist()):
                os.preadv(self._file, [flat[place * size : (place + 1) * size]], row * size)
        return torch.from_numpy(np.array(values, np.float32))

    def whole(self) -> Tensor:
        """All rows as the file has them, mapped; a change would not reach the file."""
        shape = (self.identity.num_rows, self.identity.dim)
        return torch.from_numpy(np.memmap(self.path, self._dtype, "c", shape=shape))

    def _read_slice(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.identity.num_rows)
        values = np.empty((stop - start, self.identity.dim), self._dtype)
        place, left = start * self._row_bytes, values.data.cast("B")
        while len(left):
            num = os.preadv(self._file, [left], place)
            place, left = place + num, left[num:]
        return values


def _hash(values: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=8).hexdigest()


def reserve(file: int, num_bytes: int) -> None:
    """Take the room on the disk now: a mapped page that finds none would end the process."""
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(file, num_bytes)
