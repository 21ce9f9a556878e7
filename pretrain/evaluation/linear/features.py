"""The frozen network, and its features of central or random crops.

Features are computed once and kept in a file that survives a kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from common import checkpoints
from common.backbone import IMAGENET, read_backbone
from common.errors import require
from common.files import held, sha256_of, write_atomically, write_bytes, write_json
from common.network import ResNet
from common.resnet import NAMED
from pretrain import collectives as dist
from pretrain.data.loader import ViewDataset, start_workers
from pretrain.data.order import OrderedSamples
from pretrain.data.random_numbers import stable_hash
from pretrain.data.shards import Samples
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.load import PicturePreprocessing, from_checkpoint
from pretrain.precision import autocast_type

RANDOM = "random:"
Branch = Literal["online", "ema"]
FORMAT = "fa-features-3"
BLOCK_ROWS = 128  # computed and written together: what a kill can cost each process
_ABSENT = -1  # in place of a block's checksum
_HEADER_BYTES = 128  # of a .npy file with two dimensions


class FrozenBackbone:
    """Pictures to pooled features, without gradient.

    Args:
        source: A checkpoint that conversion reads, or ``random:`` with R18, R34, R50,
            R101, thin_R50 or such a checkpoint, whose architecture is taken.
        config: Seed of random weights, size of the pictures, precision.
        branch: Which network of a checkpoint that has two.
        device: Where it runs.
        reading: What a checkpoint does not say of itself, as `read_backbone` takes it: layout,
            preprocessing, stride_in_1x1.
    Attributes:
        model: The ResNet, on the device.
        description: For the result: architecture, ``name`` of the file, ``kind`` (checkpoint of
            ours, another layout's name, or random), branch, ``file_sha256``, and ``weights_hash``
            of names and values of its tensors, which is what features depend on.
        view: How central crops are made and computed, for the result and the facts about features;
            ``image_size`` is the side of a crop in pixels.
    Raises:
        UserError: File missing or damaged, no such branch, or an architecture that is not here.
    """

    def __init__(
        self,
        source: str,
        config: LinearConfig,
        *,
        branch: Branch,
        device: torch.device,
        **reading: Any,
    ) -> None:
        # The network, from the file or by the name.
        name, is_random = source.removeprefix(RANDOM), source.startswith(RANDOM)
        path, kind = Path(name), "random"
        if is_random and name in NAMED:
            arch, self._pixels = NAMED[name], PicturePreprocessing(IMAGENET.mean, IMAGENET.std)
        else:
            require(
                not is_random or path.is_file(),
                f"{source}: give random: with {', '.join(NAMED)}, or with a checkpoint",
            )
            file = read_backbone(path, branch=branch, **reading)
            model: ResNet = from_checkpoint(file)
            arch, self._pixels = file.arch, model.preprocessing
            kind = kind if is_random else file.layout.replace("ours", "checkpoint")
        if is_random:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = ResNet(arch).eval()
        model.requires_grad_(False)
        values = model.state_dict().items()
        values = {k: v for k, v in values if not k.endswith("num_batches_tracked")}
        self.description: dict[str, Any] = {
            "arch": asdict(arch),
            "name": f"{RANDOM if is_random else ''}{path.name}",
            "kind": kind,
            "branch": None if is_random else branch,
            "weights_hash": checkpoints.checksum(values),
            "file_sha256": None if is_random else sha256_of(path),
        }
        # How it runs.
        self.model, self._device = model.to(device), device
        if device.type == "cuda":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._is_bf16 = autocast_type(config.precision, device) is torch.bfloat16
        self.view: dict[str, Any] = {
            "image_size": config.image_size or self._pixels.image_size,
            "mean": list(self._pixels.mean),
            "std": list(self._pixels.std),
            "precision": "bf16" if self._is_bf16 else "fp32",
            "crop": "central square of 7/8 of the short side",
        }

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Pooled features, float32, on the device."""
        x = self._pixels.normalise(images.to(self._device))
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._is_bf16):
            return self.model(x).float()


@dataclass(frozen=True)
class Features:
    """The features of a set.

    Attributes:
        path: Of their file, which ``numpy.load`` reads.
        values: [num_rows, dim], mapped from the file; row p * n + i holds sample i in pass p.
        labels: int64 [n], of the samples.
    """

    path: Path
    values: np.ndarray
    labels: np.ndarray

    def read(self, rows: np.ndarray) -> Tensor:
        """Some rows as float32 [n, dim], on the CPU."""
        return torch.from_numpy(self.values[rows])


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
        config: Seed and distribution of random crops.
        folder: Of the file; shared by all processes.
        passes: 0 for one pass of central crops; otherwise random crops, others in each pass.
    Raises:
        UserError: If a sample does not decode, a feature is not finite, or another process writes
            the file.
        DiskFullError: If the disk has no room for the file.
    """
    # What the values follow from decides the name of the file.
    shape = (samples.num_samples * max(1, passes), backbone.model.output_dim)
    view = dict(backbone.view)
    if passes:
        view["crop"] = config.random_crop | {"seed": config.seed, "passes": passes}
    facts = {
        "format": FORMAT,
        "weights_hash": backbone.description["weights_hash"],
        "samples": samples.fingerprint,
        "view": view,
        "shape": list(shape),
        "block_rows": BLOCK_ROWS,
    }
    code = stable_hash(json.dumps(facts, sort_keys=True), num_bytes=8).hex()
    path = folder / f"{name}-{code}.npy"
    with contextlib.ExitStack() as lock:
        if dist.rank() == 0:  # another evaluation may share the folder
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(held(path.with_suffix(".lock")))
        _fill(path, facts, backbone, samples, config, passes=passes)
    return Features(path, np.load(path, mmap_mode="c"), samples.labels)


def _fill(
    path: Path, facts: dict[str, Any], backbone: FrozenBackbone, samples: Samples,
    config: LinearConfig, *, passes: int,
) -> None:  # fmt: skip
    """Compute the blocks of rows that the file lacks."""
    shape, dtype, num = tuple(facts["shape"]), np.dtype(np.float32), samples.num_samples
    image_size, name = backbone.view["image_size"], path.stem.rpartition("-")[0]
    sums_path = path.with_suffix(".sums")

    # The first process takes the room on the disk, before anything is computed.
    num_bytes = _HEADER_BYTES + shape[0] * shape[1] * dtype.itemsize

    def reserve(file: BinaryIO) -> None:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:  # macOS
            file.truncate(num_bytes)

    rows = np.split(np.arange(shape[0]), range(BLOCK_ROWS, shape[0], BLOCK_ROWS))  # of each block
    if dist.rank() == 0 and not _has_room(path, shape, sums_path, len(rows)):
        write_json(path.with_suffix(".json"), facts)
        write_bytes(sums_path, np.full(len(rows), _ABSENT).tobytes())
        remedy = "run the same command again, or give another --features DIR"
        write_atomically(path, reserve, remedy=remedy)
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
            content = backbone(reply.checked().views[0]).cpu().numpy()
            require(
                bool(np.isfinite(content).all()),
                f"{name} features of rows {rows[block][0]} to {rows[block][-1]} are not finite: "
                "the weights are damaged",
            )
            data, place = content.tobytes(), rows[block][0] * values.strides[0]
            os.pwrite(file.fileno(), data, _HEADER_BYTES + place)
            os.pwrite(sums_file.fileno(), np.int64(zlib.crc32(data)).tobytes(), 8 * block)
    dist.wait()


def _has_room(path: Path, shape: tuple[int, int], sums_path: Path, num_blocks: int) -> bool:
    """Whether both files are there, with the head and the size that they must have."""
    try:
        is_right = np.load(path, mmap_mode="r").shape == shape
        return is_right and sums_path.stat().st_size == 8 * num_blocks
    except (OSError, EOFError, ValueError):
        return False
