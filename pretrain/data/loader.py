"""From a shard index to batches of two uint8 views, in an order that follows from (seed, epoch).

One request to a worker is a whole batch of one rank: (step, sample numbers, visits). Workers keep
no state, so their number changes nothing but the speed.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from multiprocessing.sharedctypes import Synchronized
from types import FrameType
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError
from pretrain.data.fetch_ahead import FetchAhead
from pretrain.data.index.mixture import Samples, source_sizes
from pretrain.data.order import (
    Epoch,
    LastBatch,
    SourceSizes,
    epoch_samples,
    global_batch,
    num_steps_per_epoch,
    rank_slice,
)
from pretrain.data.samples import BadSamples, EvalDataset, Request, TwoViewBatch, TwoViewDataset

__all__ = [
    "EvalDataset",
    "Loader",
    "TwoViewBatch",
    "TwoViewDataset",
    "eval_loader",
    "make_loader",
]


class RequestSampler(Sampler):
    """The requests of one rank from `start_step` of `epoch` on; set both before iterating.

    Args:
        sources: Sizes and weights of what is read.
        seed: Seed of the run.
        batch_size: Global batch size, over all ranks.
        rank: Number of this rank.
        world_size: Number of ranks.
        window: Window of the shuffle, in samples.
        last_batch: What becomes of the remainder below one batch.
    """

    def __init__(
        self,
        sources: Sequence[SourceSizes],
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        window: int,
        last_batch: LastBatch = "drop",
    ) -> None:
        self._sources, self._seed, self._window = sources, seed, window
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._last_batch: LastBatch = last_batch
        num_due = sum(source.num_due for source in sources)
        self.num_steps = num_steps_per_epoch(num_due, batch_size, last_batch)
        self.epoch = 0
        self.start_step = 0
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size}: must be from 0 to {world_size - 1}")
        whole = np.arange(batch_size)
        rank_slice(Epoch(whole, whole), rank, world_size)  # what does not divide is refused now

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[Request]:
        epoch = epoch_samples(self._sources, seed=self._seed, epoch=self.epoch, window=self._window)
        for step in range(self.start_step, self.num_steps):
            batch = global_batch(epoch, step, self._batch_size, self._last_batch)
            own = rank_slice(batch, self._rank, self._world_size)
            yield Request(step, own.sample_ids, own.visits)


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
        last_batch: "drop" leaves the remainder below one batch out, "pad" fills it up.
        known_bad: Bad samples that an earlier part of the run met: {sample number: reason}.
    Attributes:
        num_steps: Global batches per epoch.
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
        last_batch: LastBatch = "drop",
        known_bad: Mapping[int, str] | None = None,
    ) -> None:
        self._sampler = RequestSampler(
            source_sizes(dataset.index),
            seed=dataset.seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            window=shuffle_window,
            last_batch=last_batch,
        )
        self.num_steps = self._sampler.num_steps
        self._bad = BadSamples(max_bad_samples, known_bad)
        self.bad_samples = self._bad.found
        self._index, self._window = dataset.index, shuffle_window
        self._loader = start_workers(dataset, self._sampler, num_workers)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[TwoViewBatch]:
        """Batches `start_step` .. of an epoch, in order.

        Raises:
            UserError: If more bad samples were met than allowed, or a shard changed or vanished.
        """
        self._sampler.epoch, self._sampler.start_step = epoch, start_step
        replies = iter(self._loader)  # starts the workers, before there is a thread
        with self._fetch_ahead() as ahead:
            for reply in replies:
                self._bad.check(reply)
                yield reply.batch
                ahead.advance()

    def _fetch_ahead(self) -> FetchAhead:
        """The thread that brings remote shards of the coming batches into the cache."""
        requests = iter(self._sampler) if self._index.is_remote else iter(())
        return FetchAhead(self._index.fetch, (request.sample_ids for request in requests),
                          self._window)  # fmt: skip


def start_workers(dataset: Dataset, sampler: Sampler, num_workers: int) -> DataLoader:
    """A DataLoader whose items are whole batches, in the sampler's order."""
    _end_opencv_threads(num_workers)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # its own: an epoch's start must not move dropout's draws
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_quiet_worker, _leaving()),
    )


def _end_opencv_threads(num_workers: int) -> None:
    """Before workers are forked: one would wait for ever for threads that only its parent has."""
    if num_workers:
        cv2.setNumThreads(1)  # 0 would keep them


def _quiet_worker(leaving: Synchronized, _: int) -> None:
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it saves first
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, partial(_end_with_parent, leaving))


def _end_with_parent(leaving: Synchronized, number: int, frame: FrameType | None) -> None:
    """A cluster signals the workers too, but the parent needs them until it has saved.

    A parent that leaves ends the workers that are still there with the same signal.
    """
    if leaving.value:
        os._exit(128 + number)


@cache
def _leaving() -> Synchronized:
    """Whether this process is at its end; its workers see it too."""
    flag = multiprocessing.Value("b", 0)
    atexit.register(setattr, flag, "value", 1)  # before multiprocessing's own, which signals
    return flag


def make_loader(
    dataset: TwoViewDataset, *, epoch: int, start_step: int = 0, **options: Any
) -> Iterator[TwoViewBatch]:
    """The batches of one epoch from one step on; for several epochs keep a `Loader`."""
    return Loader(dataset, **options).epoch(epoch, start_step)


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
    index: Samples, image_size: int, batch_size: int, num_workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """All samples once, in index order, the last batch shorter.

    Yields:
        images uint8 [n, 3, s, s], labels int64 [n] (-1: none), sample numbers int64 [n].
    Raises:
        UserError: If a sample does not decode.
    """
    dataset = EvalDataset(index, image_size)
    _end_opencv_threads(num_workers)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Chunks(index.num_samples, batch_size),
        num_workers=num_workers,
        worker_init_fn=partial(_quiet_worker, _leaving()),
    )
    for reply in loader:
        if reply.error is not None:
            raise UserError(reply.error)
        yield reply.batch
