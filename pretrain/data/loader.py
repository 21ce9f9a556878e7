"""From shards to batches of uint8 views, in an order that follows from (seed, epoch).

One request to a worker is a whole batch of one rank: sample numbers and repeats. Workers keep no
state, so their number changes nothing but the speed.
"""

import atexit
import math
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing.sharedctypes import Synchronized
from types import FrameType
from typing import Any

import cv2
import numpy as np
import torch
import torch.utils.data
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError
from pretrain.data import order
from pretrain.data.decode import Sample, ViewWriter
from pretrain.data.random_numbers import counter_rng
from pretrain.data.shards import Samples

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # they stop a run; workers get them too
_CHUNK = 64  # samples whose encoded pictures a worker holds at once
_MAX_REPLACEMENTS = 32  # stand-ins tried for one bad sample before giving up
_MAX_KEPT = 4  # blocks of memory that lie idle; a batch ahead and one in use need two


# -- batches --------------------------------------------------------------------------------------


class ReusedMemory:
    """Hands out tensors; the memory of those that are gone, views of them included, comes again.

    First touching new memory would cost several times more.
    """

    def __init__(self) -> None:
        self._idle: list[np.ndarray] = []
        self._lock = threading.RLock()  # a tensor may vanish in any thread, at any moment

    def tensor(self, shape: tuple[int, ...], dtype: type[np.generic]) -> torch.Tensor:
        """A tensor on the CPU with any content.

        Args:
            shape: Its shape.
            dtype: NumPy's type of its elements.
        """
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._take(num_bytes)
        # The tensor's storage keeps this very array, and nothing else does.
        held = block.view(dtype).reshape(shape)
        weakref.finalize(held, self._give_back, block).atexit = False
        return torch.from_numpy(held)

    def _take(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            for position, block in enumerate(self._idle):
                if block.nbytes == num_bytes:
                    return self._idle.pop(position)
        return np.empty(num_bytes, np.uint8)  # NumPy asks for huge pages

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._idle.append(block)
            if len(self._idle) > _MAX_KEPT:
                self._idle.pop(0)


_MEMORY = ReusedMemory()


@dataclass(frozen=True)
class ViewBatch:
    """One rank's part of a global batch.

    Attributes:
        views: uint8 [views, n, 3, s, s], RGB; each view lies channels-last in memory.
        small_views: uint8 [small, n, 3, t, t], the same of small crops; None without.
        sample_hashes: int64 [n], 64-bit hashes of the samples' names (bits of unsigned numbers).
        sample_ids: int64 [n], numbers in the shard index.
        repeats: int64 [n], how often each sample was due before (docs/architecture.md).
        labels: int64 [n], -1 where there is none.
        num_bad: How many samples of this batch stand in for bad ones.
        is_augmented: True if photometric changes are done; what is left is to normalise.
    """

    views: torch.Tensor
    sample_hashes: torch.Tensor
    sample_ids: torch.Tensor
    repeats: torch.Tensor
    labels: torch.Tensor
    num_bad: int
    is_augmented: bool = False
    small_views: torch.Tensor | None = None

    def pin_memory(self) -> "ViewBatch":
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> "ViewBatch":
        """The same batch on a device; the copy does not wait if the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Any) -> "ViewBatch":
        names = ["views", "sample_hashes", "sample_ids", "repeats", "labels"]
        names += ["small_views"] * (self.small_views is not None)
        return replace(self, **{name: function(getattr(self, name)) for name in names})


@dataclass
class Reply:
    """A worker's answer; errors travel as text so that the user sees no worker's traceback.

    Attributes:
        batch: The batch, unless there is an error.
        bad: Reasons by the numbers of bad samples, for which the batch has others.
        error: Why there is no batch.
    """

    batch: Any = None
    bad: dict[int, str] = field(default_factory=dict)
    error: str | None = None

    def pin_memory(self) -> "Reply":
        """The same answer with its batch in page-locked memory."""
        if self.batch is not None:
            self.batch = self.batch.pin_memory()
        return self

    def checked(self, *, may_replace: bool = False) -> ViewBatch:
        """The batch, in which no sample is replaced unless that is allowed.

        Raises:
            UserError: If one is bad, or there is no batch.
        """
        bad = None if may_replace else next(iter(self.bad.values()), None)
        if reason := self.error or bad:
            raise UserError(f"{reason}; repair or remove it and make the shards again")
        return self.batch


def _new_block(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory for views of one size, uint8."""
    if torch.utils.data.get_worker_info() is None:
        return _MEMORY.tensor(shape, np.uint8)
    # Shared memory from the start, so that handing the batch over copies nothing.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


class BatchDataset(Dataset):
    """The work of a worker: decode samples into a batch of views, and replace those that are bad.

    Args:
        views: Decodes, crops and changes.
    """

    def __init__(self, views: ViewWriter) -> None:
        self.views = views

    def make_batch(self, take: Callable[[slice], list[Sample]], num: int, reply: Reply) -> None:
        """Put a batch into a reply, or why there is none.

        Args:
            take: Gives the samples of a part of the batch; the parts come in their order.
            num: Samples of the batch.
            reply: Where bad samples are noted, too.
        """
        blocks = [_new_block((views, num, size, size, 3)) for views, size in self.views.blocks]
        out, num_bad = [view for block in blocks for view in block.numpy()], 0
        numbers: list[tuple[int, int, int, int]] = []
        try:
            for start in range(0, num, _CHUNK):
                rows = slice(start, min(start + _CHUNK, num))
                chunk, into = take(rows), [view[rows] for view in out]
                failed = self.views.write(chunk, into)
                for row, why in failed.items():
                    own = [view[row : row + 1] for view in into]
                    chunk[row] = self._replace(chunk[row], why, own, reply.bad)
                num_bad += len(failed)
                numbers += [sample[:4] for sample in chunk]
        except UserError as error:
            reply.error = str(error)
            return
        sample_ids, sample_hashes, repeats, labels = (
            zip(*numbers, strict=True) if numbers else [()] * 4
        )
        views, *small = (block.permute(0, 1, 4, 2, 3) for block in blocks)
        reply.batch = ViewBatch(
            views=views,
            sample_hashes=torch.from_numpy(np.array(sample_hashes, np.uint64).view(np.int64)),
            sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
            repeats=torch.tensor(repeats, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            num_bad=num_bad,
            is_augmented=self.views.with_colours,
            small_views=small[0] if small else None,
        )

    def _replace(
        self, sample: Sample, why: str, out: list[np.ndarray], bad: dict[int, str]
    ) -> Sample:
        """Note a bad sample, write the views of a stand-in, and return that."""
        reason = bad[sample.sample_id] = f"{self.describe(sample)}: {why}"
        for attempt in range(_MAX_REPLACEMENTS):
            other = self.stand_in(sample, attempt)
            if other.sample_id in bad:
                continue
            failed = self.views.write([other], out)
            if not failed:
                return other
            bad[other.sample_id] = f"{self.describe(other)}: {failed[0]}"
        raise UserError(f"{reason}; {_MAX_REPLACEMENTS} samples taken in its place were bad too")

    def stand_in(self, sample: Sample, attempt: int) -> Sample:
        """Another sample for a bad one."""
        raise NotImplementedError

    def describe(self, sample: Sample) -> str:
        """What to call a sample in a message."""
        raise NotImplementedError


class ViewDataset(BatchDataset):
    """Views of samples by their numbers.

    Args:
        index: The samples.
        views: Arguments of `ViewWriter`.
    """

    def __init__(self, index: Samples, **views: Any) -> None:
        super().__init__(ViewWriter(**views))
        self.index = index

    def __getitem__(self, request: order.OrderedSamples) -> Reply:
        """The views of one request; what is bad stands in the reply, and is not raised."""
        reply = Reply()
        self.make_batch(lambda rows: self._read(request[rows]), len(request), reply)
        return reply

    def _read(self, request: order.OrderedSamples) -> list[Sample]:
        rows = self.index.samples[request.sample_ids]
        columns = (request.sample_ids, rows["key"], request.repeats, rows["label"])
        pictures = self.index.read_many(request.sample_ids)
        return [*map(Sample, *(column.tolist() for column in columns), pictures)]

    def stand_in(self, sample: Sample, attempt: int) -> Sample:
        """A sample drawn by the run's seed and the bad sample."""
        rng = counter_rng("replacement", self.views.seed, sample.repeat, sample.sample_id, attempt)
        drawn = int(rng.integers(self.index.num_samples))
        return self._read(order.OrderedSamples(np.array([drawn]), np.array([sample.repeat])))[0]

    def describe(self, sample: Sample) -> str:
        """See `BatchDataset`."""
        return self.index.describe(sample.sample_id)


class FetchAhead:
    """A thread that fetches the shards of the coming batches.

    The order of an epoch is known in advance. A shard that the thread cannot fetch is left to the
    worker that needs it, which reports why.

    Args:
        fetch: Makes sure that the shards of some samples are in the cache.
        batches: Sample numbers of the coming batches, int64 [n] each.
        num_ahead: How many batches the thread is at most in front of those that were taken.
    """

    def __init__(
        self, fetch: Callable[[np.ndarray], None], batches: Iterator[np.ndarray], num_ahead: int
    ) -> None:
        self._fetch, self._batches = fetch, batches
        self._allowed = threading.Semaphore(num_ahead)
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)

    def __enter__(self) -> "FetchAhead":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._is_closed = True
        self.advance()
        if kind is None:  # a shard in flight is finished, or given up by its own time limit
            self._thread.join()

    def advance(self) -> None:
        """One more batch was taken."""
        self._allowed.release()

    def _run(self) -> None:
        for sample_ids in self._batches:
            self._allowed.acquire()
            if self._is_closed:
                return
            try:
                self._fetch(sample_ids)
            except UserError:
                return


@dataclass(kw_only=True)
class RequestSampler(Sampler):
    """The requests of one rank from `start_step` of `epoch` on; set both before iterating.

    Attributes:
        sources: Sizes and weights of what is read.
        seed: Seed of the run.
        batch_size: Global batch size, over all ranks.
        rank: Number of this rank.
        world_size: Number of ranks.
        window: Window of the shuffle, in samples.
        last_batch: What becomes of the remainder below one batch.
        epoch: Epoch, counted from 0.
        start_step: First global batch that is yielded.
        num_steps: Global batches per epoch.
    """

    sources: Sequence[order.SourceSizes]
    seed: int
    batch_size: int
    rank: int
    world_size: int
    window: int
    last_batch: order.LastBatch = "drop"
    epoch: int = 0
    start_step: int = 0

    def __post_init__(self) -> None:
        num_due = sum(source.num_due for source in self.sources)
        self.num_steps = order.num_steps_per_epoch(num_due, self.batch_size, self.last_batch)
        order.share_of_rank(self.batch_size, self.world_size)  # what does not divide is refused now

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[order.OrderedSamples]:
        epoch = order.epoch_samples(
            self.sources, seed=self.seed, epoch=self.epoch, window=self.window
        )
        for step in range(self.start_step, self.num_steps):
            batch = order.global_batch(epoch, step, self.batch_size)
            yield order.rank_slice(batch, self.rank, self.world_size)


class WorkerLoader:
    """Batches of views, epoch by epoch; the workers stay alive between epochs.

    Args:
        dataset: The work.
        requests: What the workers are asked for in an epoch.
        num_workers: Worker processes; 0 reads in this process.
        max_bad_samples: How many different bad samples this rank replaces before it stops.
        known_bad: Of an earlier part of the run, or left out of the tars: {sample number or file:
            reason}.
    Attributes:
        bad_samples: Those replaced so far: {sample number: reason}.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        requests: Iterable,
        num_workers: int,
        max_bad_samples: int,
        known_bad: Mapping[Any, str] | None,
    ) -> None:
        self.bad_samples: dict[Any, str] = dict(known_bad or {})
        self._max_bad_samples = max_bad_samples
        self._loader = start_workers(dataset, requests, num_workers)

    def close(self) -> None:
        """End the workers now.

        A loader that is collected with what refers to it cannot reach them any more: it waits 10 s.
        """
        iterator: Any = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()

    def _batch_of(self, reply: Reply) -> ViewBatch:
        """The batch of a worker's answer, whose bad samples are counted.

        Raises:
            UserError: If these are too many, or the worker could not go on.
        """
        bad, most = self.bad_samples, self._max_bad_samples
        bad.update(reply.bad)
        if len(bad) > most:
            reason = next(iter(reply.bad.values()), "bad samples of the run so far")
            raise UserError(
                f"{reason}. {len(bad)} bad samples, allowed are {most}: repair the source and make "
                "the shards again, or raise data.max_bad_samples"
            )
        if reply.error is not None:
            raise UserError(reply.error)
        return reply.batch


class Loader(WorkerLoader):
    """Batches of the samples of shard sets, in an order that follows from (seed, epoch).

    Args:
        dataset: What to read.
        batch_size: Global batch size, over all ranks.
        rank: Number of this rank.
        world_size: Number of ranks.
        num_workers, max_bad_samples, known_bad: See `WorkerLoader`.
        shuffle_window: Window of the shuffle, in samples.
        last_batch: "drop" leaves the remainder below one batch out, "pad" fills it up.
    Attributes:
        num_steps: Global batches per epoch.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_window: int = 4096,
        max_bad_samples: int = 0,
        last_batch: order.LastBatch = "drop",
        known_bad: Mapping[Any, str] | None = None,
    ) -> None:
        self._sampler = RequestSampler(
            sources=dataset.index.sources,
            seed=dataset.views.seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            window=shuffle_window,
            last_batch=last_batch,
        )
        super().__init__(dataset, self._sampler, num_workers, max_bad_samples, known_bad)
        self.num_steps = self._sampler.num_steps
        self._index = dataset.index
        self._num_ahead = max(1, shuffle_window // order.share_of_rank(batch_size, world_size))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ViewBatch]:
        """Batches `start_step` .. of an epoch, in order.

        Raises:
            UserError: If more samples are bad than allowed, or a shard changed or vanished.
        """
        self._sampler.epoch, self._sampler.start_step = epoch, start_step
        replies = iter(self._loader)  # starts the workers, before there is a thread
        coming = (one.sample_ids for one in self._sampler) if self._index.is_remote else iter(())
        with FetchAhead(self._index.fetch, coming, self._num_ahead) as ahead:
            for reply in replies:
                yield self._batch_of(reply)
                ahead.advance()


def start_workers(dataset: Dataset, sampler: Iterable, num_workers: int) -> DataLoader:
    """A DataLoader whose items are whole batches, in the sampler's order."""
    if num_workers:  # a forked worker would wait for ever for threads that only its parent has
        cv2.setNumThreads(1)  # 0 would keep them
    return _SafelyStarted(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # its own: an epoch's start must not move dropout's draws
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_set_up_worker, _leaving()),
    )


class _SafelyStarted(DataLoader):
    """Signals that come while its workers start reach these once they are set up."""

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()  # a worker begins with its parent's mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_up_worker(leaving: Synchronized, _: int) -> None:
    def end_with_parent(number: int, frame: FrameType | None) -> None:
        if leaving.value:
            os._exit(128 + number)

    cv2.setNumThreads(0)
    # Ctrl-C and a cluster's signals reach the workers too, but the parent needs them until it has
    # saved. A parent that leaves ends the workers that are still there by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_with_parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@cache
def _leaving() -> Synchronized:
    """Whether this process is at its end; its workers see it too."""
    flag = multiprocessing.Value("b", 0)
    atexit.register(setattr, flag, "value", 1)  # before multiprocessing's own, which signals
    return flag


def central_crops(
    index: Samples, image_size: int, batch_size: int, num_workers: int = 0, *,
    may_replace: bool = False,
) -> Iterator[ViewBatch]:  # fmt: skip
    """One central crop of every sample, in index order, the last batch shorter.

    Raises:
        UserError: If a sample does not decode and none ``may_replace`` it.
    """
    dataset = ViewDataset(index, image_size=image_size, views="central")
    numbers = np.arange(index.num_samples)
    requests = [
        order.OrderedSamples(ids, np.zeros_like(ids))
        for ids in np.split(numbers, range(batch_size, len(numbers), batch_size))
    ]
    for reply in start_workers(dataset, requests, num_workers):
        yield reply.checked(may_replace=may_replace)
