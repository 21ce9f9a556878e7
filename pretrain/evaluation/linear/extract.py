"""Features of central crops or of random crops, block by block; BN with its running statistics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import UserError
from pretrain import collectives as dist
from pretrain.data.index.mixture import Samples
from pretrain.data.loader import start_workers
from pretrain.data.samples import EvalDataset, Reply, Request, TwoViewDataset
from pretrain.engine.device import uses_bf16
from pretrain.evaluation.features import normalise
from pretrain.evaluation.linear.cache import BLOCK_ROWS, FeatureFile
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.frozen import Frozen


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
        reply = self._random[Request(block, ids, visits)]
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
