"""From a shard index to batches of two uint8 views, in an order that follows from (seed, epoch).

One request to a worker is a whole batch of one rank: (epoch, step, sample numbers). Workers keep no
state, so their number changes nothing but the speed.
"""

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.data.order import epoch_order, global_batch, num_steps_per_epoch, rank_slice
from pretrain.data.samples import EvalDataset, Reply, Request, TwoViewBatch, TwoViewDataset
from pretrain.data.shards import ShardIndex
from pretrain.errors import UserError

__all__ = [
    "EvalDataset",
    "Loader",
    "TwoViewBatch",
    "TwoViewDataset",
    "eval_loader",
    "make_loader",
]


class RequestSampler(Sampler):
    """The requests of one rank from `start_step` of `epoch` on; set both before iterating."""

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        window: int,
    ) -> None:
        self._sizes, self._seed, self._window = index.shard_sizes, seed, window
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.num_steps = num_steps_per_epoch(index.num_samples, batch_size)
        self.epoch = 0
        self.start_step = 0
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size}: must be from 0 to {world_size - 1}")
        rank_slice(
            np.arange(batch_size), rank, world_size
        )  # a batch that does not divide is refused now

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[Request]:
        order = epoch_order(self._sizes, seed=self._seed, epoch=self.epoch, window=self._window)
        for step in range(self.start_step, self.num_steps):
            batch = global_batch(order, step, self._batch_size)
            yield Request(self.epoch, step, rank_slice(batch, self._rank, self._world_size))


class Loader:
    """Batches of two views, epoch by epoch; the workers stay alive between epochs.

    Args:
        dataset: What to read.
        batch_size: Global batch size, over all ranks.
        rank: Number of this rank.
        world_size: Number of ranks.
        num_workers: Worker processes; 0 reads in this process.
        shuffle_window: Window of the shuffle, in samples.
        max_bad_samples: How many different bad samples this rank replaces before it stops.
    Attributes:
        num_steps: Global batches per epoch; the remainder is dropped.
        bad_samples: What was replaced so far: {sample number: reason}.
    """

    def __init__(
        self,
        dataset: TwoViewDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_window: int = 4096,
        max_bad_samples: int = 0,
    ) -> None:
        self._sampler = RequestSampler(
            dataset.index,
            seed=dataset.seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            window=shuffle_window,
        )
        self.num_steps = self._sampler.num_steps
        self.bad_samples: dict[int, str] = {}
        self._max_bad_samples = max_bad_samples
        self._loader = start_workers(dataset, self._sampler, num_workers)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[TwoViewBatch]:
        """Batches `start_step` .. of an epoch, in order.

        Raises:
            UserError: If more bad samples were met than allowed, or a shard changed or vanished.
        """
        self._sampler.epoch, self._sampler.start_step = epoch, start_step
        for reply in self._loader:
            self._check(reply)
            yield reply.batch

    def _check(self, reply: Reply) -> None:
        self.bad_samples.update(reply.bad)
        if len(self.bad_samples) > self._max_bad_samples:
            reason = next(iter(reply.bad.values()))
            raise UserError(
                f"{reason}. {len(self.bad_samples)} bad samples, allowed are "
                f"{self._max_bad_samples}: repair the "
                "source and make the shards again, or raise data.max_bad_samples to replace and "
                "count such samples"
            )
        if reply.error is not None:
            raise UserError(reply.error)


def start_workers(dataset: Dataset, sampler: Sampler, num_workers: int) -> DataLoader:
    """A DataLoader whose items are whole batches, in the sampler's order."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # its own: an epoch's start must not move dropout's draws
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_quiet_worker,
    )


def _quiet_worker(_: int) -> None:
    cv2.setNumThreads(0)


def make_loader(
    dataset: TwoViewDataset,
    *,
    batch_size: int,
    epoch: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    shuffle_window: int = 4096,
    max_bad_samples: int = 0,
) -> Iterator[TwoViewBatch]:
    """The batches of one epoch from one step on; for several epochs keep a `Loader`."""
    loader = Loader(
        dataset,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        shuffle_window=shuffle_window,
        max_bad_samples=max_bad_samples,
    )
    return loader.epoch(epoch, start_step)


class _Chunks(Sampler):
    """Consecutive sample numbers, the last chunk shorter."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self._starts = range(0, num_samples, batch_size)
        self._num_samples, self._batch_size = num_samples, batch_size

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in self._starts:
            yield np.arange(start, min(start + self._batch_size, self._num_samples), dtype=np.int64)


def eval_loader(
    index: ShardIndex, image_size: int, batch_size: int, num_workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """All samples once, in index order, the last batch shorter.

    Yields:
        images uint8 [n, 3, s, s], labels int64 [n] (-1: none), sample numbers int64 [n].
    Raises:
        UserError: If a sample does not decode.
    """
    dataset = EvalDataset(index, image_size)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Chunks(index.num_samples, batch_size),
        num_workers=num_workers,
        worker_init_fn=_quiet_worker,
    )
    for reply in loader:
        if reply.error is not None:
            raise UserError(reply.error)
        yield reply.batch
