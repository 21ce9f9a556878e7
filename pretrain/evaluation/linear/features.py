"""Features of central or random crops, computed once and kept in a file that survives a kill."""

from __future__ import annotations

import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import require
from common.files import write_atomically, write_bytes, write_json
from pretrain import collectives as dist
from pretrain.data.loader import ViewDataset, start_workers
from pretrain.data.order import OrderedSamples
from pretrain.data.random_numbers import stable_hash
from pretrain.data.shards import Samples
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.frozen import FrozenBackbone

FORMAT = "fa-features-2"
BLOCK_ROWS = 128  # computed and written together: what a kill can cost each process
_ABSENT = -1  # in place of a block's checksum
_HEADER_BYTES = 128  # of a .npy file with two dimensions


@dataclass(frozen=True)
class Features:
    """The features of a set.

    Attributes:
        path: Of their file, which ``numpy.load`` reads.
        facts: What the values follow from, as plain types.
        values: [num_rows, dim], mapped from the file; row p * n + i holds sample i in pass p.
        labels: int64 [n], of the samples.
        num_stored: Rows that were there already.
    """

    path: Path
    facts: dict[str, Any]
    values: np.ndarray
    labels: np.ndarray
    num_stored: int

    def read(self, rows: np.ndarray) -> Tensor:
        """Some rows as float32 [n, dim], on the CPU."""
        return torch.from_numpy(np.array(self.values[rows], np.float32))


def extract(
    backbone: FrozenBackbone, samples: Samples, name: str, config: LinearConfig, folder: Path, *,
    passes: int = 0,
) -> Features:  # fmt: skip
    """The features of a set, computed as far as their file lacks them; the processes share blocks.

    The file is ``<folder>/<name>-<hash>.npy``; the hash is that of the facts, which lie beside it
    in ``.json``. ``.sums`` holds the checksum of each block of rows that is written.

    Args:
        backbone: The network.
        samples: The pictures.
        name: Of the file.
        config: Seed and distribution of random crops, type of the values.
        folder: Of the file; shared by all processes.
        passes: 0 for one pass of central crops; otherwise random crops, others in each pass.
    Raises:
        UserError: If a sample does not decode, or a feature does not fit into the type.
        DiskFullError: If the disk has no room for the file.
    """
    # What the values follow from decides the name of the file.
    num, image_size = samples.num_samples, backbone.view["image_size"]
    shape, dtype = (num * max(1, passes), backbone.model.output_dim), np.dtype(config.feature_dtype)
    view = dict(backbone.view)
    if passes:
        view["crop"] = config.random_crop | {"seed": config.seed, "passes": passes}
    facts = {
        "format": FORMAT,
        "weights_hash": backbone.description["weights_hash"],
        "samples": samples.fingerprint,
        "view": view,
        "shape": list(shape),
        "dtype": config.feature_dtype,
        "block_rows": BLOCK_ROWS,
    }
    code = stable_hash(json.dumps(facts, sort_keys=True), num_bytes=8).hex()
    path = folder / f"{name}-{code}.npy"
    sums_path = path.with_suffix(".sums")

    # The first process takes the room on the disk, before anything is computed.
    num_bytes = _HEADER_BYTES + shape[0] * shape[1] * dtype.itemsize

    def reserve(file: BinaryIO) -> None:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        os.posix_fallocate(file.fileno(), 0, num_bytes)

    rows = np.split(np.arange(shape[0]), range(BLOCK_ROWS, shape[0], BLOCK_ROWS))  # of each block
    is_whole = sums_path.exists() and path.exists() and path.stat().st_size == num_bytes
    if dist.rank() == 0 and not is_whole:
        write_json(path.with_suffix(".json"), facts)
        write_bytes(sums_path, np.full(len(rows), _ABSENT).tobytes())
        remedy = "run the same command again, give another --features DIR, or take "
        write_atomically(path, reserve, remedy=f"{remedy}feature_dtype=float16")
    dist.wait()

    # Blocks that are not there, or are damaged, are shared out among the processes.
    values, sums = np.load(path, mmap_mode="r"), np.fromfile(sums_path, np.int64)
    missing = [b for b, part in enumerate(rows) if sums[b] != zlib.crc32(values[part])]
    dist.wait()  # all have read what is there before any writes
    own = missing[dist.rank() :: dist.world_size()]
    views = (config.view_policy,) if passes else "central"
    dataset = ViewDataset(samples, image_size=image_size, views=views, seed=config.seed)
    requests = [OrderedSamples(rows[block] % num, rows[block] // num) for block in own]
    replies = start_workers(dataset, requests, config.num_workers) if own else ()
    bar = tqdm(
        own, f"{name} features", unit="block", disable=dist.rank() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    with open(path, "r+b") as file, open(sums_path, "r+b") as sums_file:
        for block, reply in zip(bar, replies, strict=True):
            with np.errstate(over="ignore"):  # reported by the next line
                content = backbone(reply.checked().views[0]).cpu().numpy().astype(dtype)
            require(
                bool(np.isfinite(content).all()),
                f"{name} features of rows {rows[block][0]} to {rows[block][-1]} are not finite in "
                f"{dtype}: the weights are damaged, or the values too large; feature_dtype=float32 "
                "holds the larger ones",
            )
            data, place = content.tobytes(), rows[block][0] * values.strides[0]
            os.pwrite(file.fileno(), data, _HEADER_BYTES + place)
            os.pwrite(sums_file.fileno(), np.int64(zlib.crc32(data)).tobytes(), 8 * block)
    dist.wait()
    num_stored = shape[0] - sum(len(rows[block]) for block in missing)
    return Features(path, facts, np.load(path, mmap_mode="c"), samples.labels, num_stored)
