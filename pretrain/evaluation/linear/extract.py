"""Features of central crops or of random crops, block by block; BN with its running statistics."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from common.errors import UserError
from common.files import read_json_lines, sha256_of, write_json
from common.resnet import Arch, infer_arch
from pretrain import collectives as dist
from pretrain.data.loader import EvalDataset, Reply, TwoViewDataset, start_workers
from pretrain.data.order import OrderedSamples, stable_hash
from pretrain.data.shards import Samples
from pretrain.engine import checkpoint
from pretrain.engine.device import uses_bf16
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.probe import normalise
from pretrain.model.backbone import ResNet

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


Branch = Literal["online", "ema"]
RANDOM = "random:"
NAMED = {
    "R18": Arch(18, 64, 64, 64),
    "R34": Arch(34, 64, 64, 64),
    "R50": Arch(50, 64, 64, 256),
    "R101": Arch(101, 64, 64, 256),
    "thin_R50": Arch(50, 16, 16, 64),
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision uses them
_DEFAULT_SIZE = 224  # pixels
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Frozen:
    """A backbone in eval mode whose parameters take no gradient.

    Attributes:
        backbone: Pictures to pooled features.
        name: What the user called it, without folders.
        kind: "checkpoint", "torchvision" or "random".
        branch: Of a checkpoint of ours.
        weights_hash: Of names and values of its tensors: what features depend on.
        file_sha256: Of the file; None for random weights.
        image_size: Side of the pictures in pretraining, pixels; 224 where that is not known.
        mean: Of the normalisation, RGB, 0..1.
        std: Of the normalisation.
    """

    backbone: ResNet
    name: str
    kind: Literal["checkpoint", "torchvision", "random"]
    branch: Branch | None
    weights_hash: str
    file_sha256: str | None
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def description(self) -> dict[str, Any]:
        """For the result: plain types."""
        return {
            "name": self.name,
            "kind": self.kind,
            "branch": self.branch,
            "arch": asdict(self.backbone.arch),
            "weights_hash": self.weights_hash,
            "file_sha256": self.file_sha256,
        }


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
    if source.startswith(RANDOM):
        return _random(source, seed)
    path = Path(source)
    state = checkpoints.read(path)
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: holds no state dict; give a checkpoint")
    if state.get("format") == checkpoints.FORMAT:
        return _ours(checkpoint.load(path), path, branch)
    if branch != "online":
        raise UserError(f"--branch {branch}: {path} is no checkpoint of ours and has one network")
    return _torchvision(state, path)


def _frozen(backbone: ResNet, **options: Any) -> Frozen:
    backbone.eval().requires_grad_(False)
    weights = {k: v for k, v in backbone.state_dict().items() if not k.endswith(_COUNTER)}
    return Frozen(backbone, weights_hash=checkpoints.checksum(weights), **options)


def _random(source: str, seed: int) -> Frozen:
    name = source.removeprefix(RANDOM)
    like: dict[str, Any] = {"image_size": _DEFAULT_SIZE, "mean": _MEAN, "std": _STD}
    if name in NAMED:
        arch = NAMED[name]
    elif Path(name).is_file():
        state = checkpoint.load(Path(name))
        arch, like, name = Arch(**state["arch"]), _look(state), Path(name).name
    else:
        raise UserError(f"{source}: give random: with {', '.join(NAMED)}, or with a checkpoint")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = ResNet(arch)
    return _frozen(
        backbone, name=f"{RANDOM}{name}", kind="random", branch=None, file_sha256=None, **like
    )


def _look(state: dict[str, Any]) -> dict[str, Any]:
    """How the network of a checkpoint of ours looks at pictures."""
    preprocessing, data = state["preprocessing"], state["config"]["data"]
    return {
        "image_size": int(data["image_size"]),
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
    }


def _ours(state: dict[str, Any], path: Path, branch: Branch) -> Frozen:
    weights = state["model" if branch == "online" else "ema"]
    if weights is None:
        raise UserError(
            f"--branch ema: {path} has no EMA network (objective {_objective(state)}); use online"
        )
    prefix = "backbone."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    backbone = ResNet(Arch(**state["arch"]))
    _fill(backbone, own, path)
    return _frozen(
        backbone, name=path.name, kind="checkpoint", branch=branch, file_sha256=sha256_of(path),
        **_look(state),
    )  # fmt: skip


def _objective(state: dict[str, Any]) -> str:
    return str(state["config"]["objective"]["name"])


def _torchvision(state: Mapping[str, Any], path: Path) -> Frozen:
    try:
        state = checkpoints.named(checkpoints.nested(state, checkpoints.WRAPPERS) or state)
        weights = {
            key: torch.as_tensor(value)
            for key, value in state.items()
            if isinstance(value, Tensor | np.ndarray) and not key.startswith("fc.")
        }
        arch = infer_arch({name: tuple(value.shape) for name, value in weights.items()})
    except (UserError, TypeError) as error:
        raise UserError(
            f"{path}: {error}. Give a checkpoint of tools/pretrain.sh or a state dict with "
            "torchvision's names"
        ) from None
    backbone = ResNet(arch)
    _fill(backbone, weights, path)
    return _frozen(
        backbone, name=path.name, kind="torchvision", branch=None, file_sha256=sha256_of(path),
        image_size=_DEFAULT_SIZE, mean=_MEAN, std=_STD,
    )  # fmt: skip


def _fill(backbone: ResNet, weights: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor of the backbone, and no other; batch counters may be missing.

    Raises:
        UserError: Naming the first tensors that do not fit.
    """
    own = backbone.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in weights and not k.endswith(_COUNTER)]
    wrong += [f"{k} is not known" for k in weights if k not in own]
    wrong += [
        f"{k} is {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    if wrong:
        raise UserError(
            f"{path}: another architecture than ResNet-{backbone.arch.depth}: {wrong[0]} "
            f"({len(wrong)} tensors do not fit)"
        )
    backbone.load_state_dict({**own, **weights})


class Extractor:
    """Pictures to features, without gradient.

    Args:
        frozen: The network.
        config: Precision, size of the pictures, crops.
        device: Where it runs.
    Attributes:
        image_size: Side of a crop, pixels.
    """

    def __init__(self, frozen: Frozen, config: LinearConfig, device: torch.device) -> None:
        self._frozen, self._device = frozen, device
        self._backbone = frozen.backbone.to(device)
        if device.type == "cuda":
            self._backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._is_bf16 = uses_bf16(config.precision, device)
        self.image_size = config.image_size or frozen.image_size
        self.dim = frozen.backbone.output_dim

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Pooled features, float32, on the device."""
        assert not self._backbone.training
        x = normalise(images.to(self._device), self._frozen.mean, self._frozen.std)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._is_bf16):
            return self._backbone(x).float()

    def view(self) -> dict[str, Any]:
        """How pictures are looked at, for the result and for the identity of features."""
        return {
            "image_size": self.image_size,
            "mean": list(self._frozen.mean),
            "std": list(self._frozen.std),
            "precision": "bf16" if self._is_bf16 else "fp32",
            "crop": "central square of 7/8 of the short side",
        }


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
        self._central = EvalDataset(samples, image_size) if passes == 0 else None
        self._random = None
        if passes:
            self._random = TwoViewDataset(
                samples, image_size=image_size, crop_scales=(config.crop_scale,), seed=config.seed,
                flip_probability=config.flip_probability,
            )  # fmt: skip

    def __len__(self) -> int:
        return -(-self.num_rows // BLOCK_ROWS)

    def __getitem__(self, block: int) -> Reply:
        """(pictures uint8 [n, 3, s, s], numbers of the samples); a bad one is told in the reply."""
        start = block * BLOCK_ROWS
        rows = np.arange(start, min(start + BLOCK_ROWS, self.num_rows))
        ids, visits = rows % self._num_samples, rows // self._num_samples
        if self._central is not None:
            reply = self._central[ids]
            return reply if reply.error else Reply(batch=(reply.batch[0], reply.batch[2]))
        assert self._random is not None
        reply = self._random[OrderedSamples(ids, visits)]
        if reply.error or reply.bad:
            reason = reply.error or next(iter(reply.bad.values()))
            return Reply(error=f"{reason}; repair or remove it and make the shards again")
        return Reply(batch=(reply.batch.views[0], torch.from_numpy(ids)))


def pictures(
    blocks: Blocks, numbers: Sequence[int], num_workers: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some blocks, in order: number, pictures, numbers of the samples.

    Raises:
        UserError: If a sample does not decode.
    """
    replies = start_workers(blocks, numbers, num_workers)  # type: ignore[arg-type]
    for number, reply in zip(numbers, replies, strict=True):
        if reply.error is not None:
            raise UserError(reply.error)
        yield number, *reply.batch


def extract(
    extractor: Extractor, blocks: Blocks, file: FeatureFile, title: str, num_workers: int
) -> None:
    """Compute what the file lacks."""
    own = file.own_blocks()
    num_rows = sum(file.rows_of(block).stop - file.rows_of(block).start for block in own)
    if file.num_damaged and dist.rank() == 0:
        print(f"warning: {file.path.name}: {file.num_damaged} rows are damaged and are computed "
              "again", file=sys.stderr)  # fmt: skip
    if not own:
        file.finish()
        return
    with bar(num_rows, title, "picture") as progress:
        for block, images, _ in pictures(blocks, own, num_workers):
            file.write(block, extractor(images))
            progress.update(len(images))
    file.finish()


def each_block(
    extractor: Extractor, blocks: Blocks, title: str, num_workers: int,
    see: Callable[[Tensor, Tensor], None],
) -> None:  # fmt: skip
    """Show the features of all blocks with the numbers of their samples; none are kept.

    Each process sees its own blocks.
    """
    own = range(len(blocks))[dist.rank() :: dist.world_size()]
    with bar(blocks.num_rows // dist.world_size(), title, "picture") as progress:
        for _, images, ids in pictures(blocks, own, num_workers):
            see(extractor(images), ids)
            progress.update(len(images))


def bar(total: int, title: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar with the remaining time, in the first process only."""
    return tqdm(
        total=total, initial=initial, desc=title, unit=unit, disable=dist.rank() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 10, file=sys.stderr,
    )  # fmt: skip
