"""A frozen network, and its features of central or random crops in a file that survives a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from common import checkpoints
from common.config import one_line
from common.errors import UserError, require
from common.files import read_json_lines, sha256_of, write_json
from common.resnet import NAMED, infer_arch, read_arch
from pretrain import collectives as dist
from pretrain.data.loader import Reply, ViewDataset, start_workers
from pretrain.data.order import OrderedSamples
from pretrain.data.policy import Crop, Flip, ViewPolicy
from pretrain.data.random_numbers import stable_hash
from pretrain.data.shards import Samples
from pretrain.engine.device import uses_bf16
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.probe import normalise
from pretrain.model.backbone import ResNet

FORMAT = "fa-features-1"
BLOCK_ROWS = 128  # rows between two lines of the journal: what a kill can cost each process
RANDOM = "random:"
Branch = Literal["online", "ema"]


@dataclass(frozen=True)
class Frozen:
    """A backbone in eval mode whose parameters take no gradient.

    Attributes:
        backbone: Pictures to pooled features.
        name: What the user called it, without folders.
        kind: "checkpoint", "torchvision" or "random".
        branch: Of a checkpoint of ours.
        file_sha256: Of the file; None for random weights.
        weights_hash: Of names and values of its tensors: what features depend on.
        image_size: Side of the pictures in pretraining, pixels; 224 where that is not known.
        mean: Of the normalisation, RGB, 0..1; ImageNet's where the pretraining's is not known.
        std: Of the normalisation.
    """

    backbone: ResNet
    name: str
    kind: Literal["checkpoint", "torchvision", "random"]
    branch: Branch | None
    file_sha256: str | None
    weights_hash: str
    image_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def description(self) -> dict[str, Any]:
        """For the result: plain types."""
        keys = ("name", "kind", "branch", "weights_hash", "file_sha256")
        return {"arch": asdict(self.backbone.arch)} | {key: getattr(self, key) for key in keys}


def load(source: str, *, branch: Branch, seed: int) -> Frozen:
    """The network of a file, or one with random weights.

    Args:
        source: A checkpoint of ours, a file with a torchvision-style state dict, or ``random:``
            with R18, R34, R50, R101, thin_R50 or a checkpoint of ours whose architecture is taken.
        branch: Which network of a checkpoint of ours.
        seed: Of random weights.
    Raises:
        UserError: File missing or damaged, no such branch, or an architecture that is not here.
    """
    name, is_random = source.removeprefix(RANDOM), source.startswith(RANDOM)
    path, state = Path(name), {}
    if not (is_random and name in NAMED):
        names = ", ".join(NAMED)
        require(
            not is_random or path.is_file(),
            f"{source}: give random: with {names}, or with a checkpoint",
        )
        state = checkpoints.read(path)
        is_table = isinstance(state, Mapping) and bool(state)
        require(is_table, f"{path}: holds no state dict; give a checkpoint")
    is_ours = state.get("format") == checkpoints.FORMAT
    options: dict[str, Any] = {}
    if is_ours:
        options = {key: tuple(state["preprocessing"][key]) for key in ("mean", "std")}
        options["image_size"] = int(state["config"]["data"]["image_size"])
    require(
        is_ours or is_random or branch == "online",
        f"--branch {branch}: {path} is no checkpoint of ours and has one network",
    )
    weights: Mapping[str, Any] = {}
    if is_random:
        require(name in NAMED or is_ours, f"{source}: {path} is no checkpoint of ours")
        arch = NAMED[name] if name in NAMED else read_arch(state["arch"])
    elif is_ours:
        weights, prefix = state["model" if branch == "online" else "ema"], "backbone."
        objective = state["config"]["objective"]["name"]
        require(
            weights is not None,
            f"--branch ema: {path} has no EMA network (objective {objective}); use online",
        )
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        arch = read_arch(state["arch"])
    else:
        try:
            state = checkpoints.named(checkpoints.nested(state, checkpoints.WRAPPERS) or state)
            weights = {
                key: torch.as_tensor(value)
                for key, value in state.items()
                if isinstance(value, Tensor | np.ndarray) and not key.startswith("fc.")
            }
            arch = infer_arch({key: tuple(value.shape) for key, value in weights.items()})
        except (UserError, TypeError) as error:
            raise UserError(
                f"{path}: {error}. Give a checkpoint of tools/pretrain.sh or a state dict with "
                "torchvision's names"
            ) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = ResNet(arch).eval().requires_grad_(False)
    if not is_random:
        try:
            backbone.load_state_dict(weights)  # batch counters, which old files lack, may miss
        except RuntimeError as error:
            raise UserError(
                f"{path}: another architecture than ResNet-{arch.depth}: {one_line(error)}"
            ) from None
    values = backbone.state_dict().items()
    values = {k: v for k, v in values if not k.endswith("num_batches_tracked")}
    return Frozen(
        backbone, f"{RANDOM if is_random else ''}{path.name}",
        "random" if is_random else "checkpoint" if is_ours else "torchvision",
        branch if is_ours and not is_random else None, None if is_random else sha256_of(path),
        checkpoints.checksum(values), **options,
    )  # fmt: skip


class Extractor:
    """Pictures to features, without gradient.

    Args:
        frozen: The network.
        config: Precision, size of the pictures, crops.
        device: Where it runs.
    Attributes:
        image_size: Side of a crop, pixels.
        dim: Width of a feature.
        view: How pictures are looked at, for the result and for the facts about features.
    """

    def __init__(self, frozen: Frozen, config: LinearConfig, device: torch.device) -> None:
        self._frozen, self._device = frozen, device
        self._backbone = frozen.backbone.to(device)
        if device.type == "cuda":
            self._backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._is_bf16 = uses_bf16(config.precision, device)
        self.image_size = config.image_size or frozen.image_size
        self.dim = frozen.backbone.output_dim
        self.view = {
            "image_size": self.image_size,
            "mean": list(frozen.mean),
            "std": list(frozen.std),
            "precision": "bf16" if self._is_bf16 else "fp32",
            "crop": "central square of 7/8 of the short side",
        }

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Pooled features, float32, on the device."""
        assert not self._backbone.training
        x = normalise(images.to(self._device), self._frozen.mean, self._frozen.std)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._is_bf16):
            return self._backbone(x).float()


class Blocks(Dataset):
    """The pictures of a block of rows; row r is sample r % n in pass r // n.

    Args:
        samples: The pictures.
        image_size: Side of a crop, pixels.
        passes: 0 for one pass of central crops; otherwise random crops, others in each pass.
        config: Seed and distribution of random crops.
    """

    def __init__(
        self, samples: Samples, image_size: int, passes: int, config: LinearConfig
    ) -> None:
        self._num_samples = samples.num_samples
        self.num_rows = samples.num_samples * max(1, passes)
        self._views = random_crops(samples, image_size, config)
        if passes == 0:
            self._views = ViewDataset(samples, image_size=image_size, views="central")

    def __len__(self) -> int:
        return -(-self.num_rows // BLOCK_ROWS)

    def __getitem__(self, block: int) -> Reply:
        """A batch of one view of each."""
        start = block * BLOCK_ROWS
        rows = np.arange(start, min(start + BLOCK_ROWS, self.num_rows))
        ids, repeats = rows % self._num_samples, rows // self._num_samples
        return self._views[OrderedSamples(ids, repeats)]


def random_crops(samples: Samples, image_size: int, config: LinearConfig) -> ViewDataset:
    """One view of random crops and flips, the pretraining loader's own."""
    view = ViewPolicy(Crop(config.crop_scale), Flip(config.flip_probability))
    return ViewDataset(samples, image_size=image_size, views=(view,), seed=config.seed)


class FeatureFile:
    """The features of one set, in ``<folder>/<name>-<hash>.bin``.

    Each process keeps a journal of the blocks that it wrote, with their checksums.

    Args:
        folder: Where it lies; shared by all processes.
        name: "train" or "val".
        num_rows: Passes times samples.
        dim: Of a feature.
        dtype: "float32" or "float16".
        facts: What the values follow from besides, as plain types: weights, samples, view.
    Attributes:
        num_bytes: Of the features on the disk.
        missing: Blocks that were not there, or whose checksum differs.
        num_found: Rows that were there already, whole.
        num_damaged: Rows that a journal had, but whose checksum differs.
    Raises:
        UserError: If the disk has no room for it.
    """

    def __init__(
        self, folder: Path, name: str, num_rows: int, dim: int, dtype: str, facts: dict[str, Any]
    ) -> None:
        self.num_rows, self.dim, self._dtype = num_rows, dim, np.dtype(dtype)
        self.num_bytes = num_rows * dim * self._dtype.itemsize
        self.facts = facts | {"format": FORMAT, "block_rows": BLOCK_ROWS, "num_rows": num_rows}
        self.facts |= {"dim": dim, "dtype": dtype}
        code = stable_hash(json.dumps(self.facts, sort_keys=True), num_bytes=8).hex()
        self._stem = f"{name}-{code}"
        self.path = folder / f"{self._stem}.bin"
        if dist.rank() == 0:
            self._allocate()
        dist.wait()
        self._file = os.open(self.path, os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        known: dict[int, str] = {}
        for journal in sorted(folder.glob(f"{self._stem}.*.jsonl")):
            known.update({row["block"]: row["hash"] for row in read_json_lines(journal)})
        self._rows, self.missing, self.num_found, self.num_damaged = self.whole(), [], 0, 0
        for block in range(-(-num_rows // BLOCK_ROWS)):
            rows = self.rows_of(block)
            if block in known and known[block] == _hash(self._rows[rows]):
                self.num_found += rows.stop - rows.start
                continue
            self.missing.append(block)
            self.num_damaged += (rows.stop - rows.start) * (block in known)
        dist.wait()  # all have read the journals before any goes on writing
        self._journal = folder / f"{self._stem}.{dist.rank()}.jsonl"

    def _allocate(self) -> None:
        folder, size = self.path.parent, self.num_bytes
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size == size:
            return
        free = shutil.disk_usage(folder).free
        require(
            free >= size,
            f"{folder}: the features of {self.num_rows:,} pictures need {size / 1e6:,.0f} MB, "
            f"only {free / 1e6:,.0f} MB are free; free some space, give another --features DIR, "
            "or take feature_dtype=float16",
        )
        for journal in folder.glob(f"{self._stem}.*.jsonl"):
            journal.unlink()
        write_json(folder / f"{self._stem}.json", self.facts)
        with open(self.path, "wb") as file:
            reserve(file.fileno(), size)

    def rows_of(self, block: int) -> slice:
        """The rows of a block."""
        return slice(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.num_rows))

    def write(self, block: int, features: Tensor) -> None:
        """Put a block in its place, and into the journal.

        Raises:
            UserError: If a value is not finite, or too large for the type.
        """
        rows = self.rows_of(block)
        with np.errstate(over="ignore"):  # reported below
            values = features.cpu().numpy().astype(self._dtype)
        require(
            bool(np.isfinite(values).all()),
            f"features of rows {rows.start} to {rows.stop - 1} are not finite in {self._dtype}: "
            "the weights are damaged, or the values too large; feature_dtype=float32 holds the "
            "larger ones",
        )
        os.pwrite(self._file, values.tobytes(), rows.start * self.dim * self._dtype.itemsize)
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps({"block": block, "hash": _hash(values)}) + "\n")

    def finish(self) -> None:
        """Wait for the other processes; all rows can be read then."""
        os.fsync(self._file)
        dist.wait()
        self._rows = self.whole()

    def read(self, rows: np.ndarray | slice) -> Tensor:
        """Some rows as float32 [n, dim], on the CPU."""
        return torch.from_numpy(np.array(self._rows[rows], np.float32))

    def whole(self) -> np.ndarray:
        """All rows [num_rows, dim], mapped from the disk; a change would not reach the file."""
        return np.memmap(self.path, self._dtype, "c", shape=(self.num_rows, self.dim))


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


def extract(
    extractor: Extractor, blocks: Blocks, file: FeatureFile, title: str, num_workers: int
) -> None:
    """Compute what the file lacks; the processes share the blocks.

    Raises:
        UserError: If a sample does not decode.
    """
    if file.num_damaged and dist.rank() == 0:
        print(f"warning: {file.path.name}: {file.num_damaged} rows are damaged and are computed "
              "again", file=sys.stderr)  # fmt: skip
    own = file.missing[dist.rank() :: dist.world_size()]
    replies = start_workers(blocks, own, num_workers) if own else []  # type: ignore[arg-type]
    with bar(min(len(own) * BLOCK_ROWS, file.num_rows), title, "picture") as progress:
        for number, reply in zip(own, replies, strict=True):
            pictures = reply.checked().views[0]
            file.write(number, extractor(pictures))
            progress.update(len(pictures))
    file.finish()


def bar(total: int, title: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar with the remaining time, in the first process only."""
    return tqdm(
        total=total, initial=initial, desc=title, unit=unit, disable=dist.rank() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 10, file=sys.stderr,
    )  # fmt: skip
