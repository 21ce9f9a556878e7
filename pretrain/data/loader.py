"""From a shard index to batches of two uint8 views, in an order that follows from (seed, epoch).

One request to a worker is a whole batch of one rank: (step, sample numbers, visits). Workers keep
no state, so their number changes nothing but the speed.
"""

import atexit
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing.sharedctypes import Synchronized
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.utils.data
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError
from common.pictures import BadPicture, Header, decode, decode_fast, read_header
from pretrain.data import augment_uint8 as photometric_uint8
from pretrain.data.augment import ReusedMemory, ViewAugment, draw_parameters
from pretrain.data.augment_uint8 import Changes, changes_of
from pretrain.data.crops import center_crop, crop, draw_crops, reductions_for
from pretrain.data.mixture import Samples, source_sizes
from pretrain.data.order import (
    Epoch,
    LastBatch,
    SourceSizes,
    counter_rng,
    epoch_samples,
    global_batch,
    num_steps_per_epoch,
    rank_slice,
)

_CHUNK = 64  # samples whose encoded pictures a worker holds at once
_MAX_REPLACEMENTS = 32  # draws of a stand-in for one bad sample before giving up
NUM_VIEWS = 2
_MEMORY = ReusedMemory()


@dataclass(frozen=True)
class TwoViewBatch:
    """One rank's part of a global batch.

    Attributes:
        views: uint8 [views, n, 3, s, s], RGB; each view lies channels-last in memory.
        keys: int64 [n], 64-bit hashes of the samples' names (the bits of an unsigned number).
        sample_ids: int64 [n], numbers in the shard index.
        visits: int64 [n], how often each sample was due before (docs/architecture.md).
        labels: int64 [n], -1 where there is none.
        num_bad: How many samples of this batch stand in for bad ones.
        is_augmented: True if photometric changes are done; what is left is to normalise.
    """

    views: torch.Tensor
    keys: torch.Tensor
    sample_ids: torch.Tensor
    visits: torch.Tensor
    labels: torch.Tensor
    num_bad: int
    is_augmented: bool = False

    def pin_memory(self) -> "TwoViewBatch":
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> "TwoViewBatch":
        """The same batch on a device; the copy does not wait if the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Any) -> "TwoViewBatch":
        names = ("views", "keys", "sample_ids", "visits", "labels")
        return replace(self, **{name: function(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Request:
    """What a worker is asked for: these samples, in this order.

    Attributes:
        step: Global batch of the epoch.
        sample_ids: int64 [n].
        visits: int64 [n], how often each sample was due before.
    """

    step: int
    sample_ids: np.ndarray
    visits: np.ndarray


@dataclass
class Reply:
    """A worker's answer; errors travel as text so that the user sees no worker's traceback."""

    batch: Any = None
    bad: dict[int, str] = field(default_factory=dict)
    error: str | None = None

    def pin_memory(self) -> "Reply":
        """The same answer with its batch in page-locked memory."""
        if isinstance(self.batch, TwoViewBatch):
            self.batch = self.batch.pin_memory()
        return self


class BadSamples:
    """What one process replaced so far, and how much of it is allowed.

    Args:
        most: How many different ones may be replaced.
        known: Those that an earlier part of the run met: {sample number: reason}.
    Attributes:
        found: {sample number: reason}.
    """

    def __init__(self, most: int, known: Mapping[int, str] | None) -> None:
        self.found: dict[int, str] = dict(known or {})
        self._most = most

    def check(self, reply: Reply) -> None:
        """Note what a worker met.

        Raises:
            UserError: If these are too many, or the worker could not go on.
        """
        self.found.update(reply.bad)
        if len(self.found) > self._most:
            reason = next(iter(reply.bad.values()), "bad samples of the run so far")
            raise UserError(
                f"{reason}. {len(self.found)} bad samples, allowed are {self._most}: repair the "
                "source and make the shards again, or raise data.max_bad_samples to replace and "
                "count such samples"
            )
        if reply.error is not None:
            raise UserError(reply.error)


class TwoViewDataset(Dataset):
    """Random resized crops of each picture, two as a rule; photometric changes too, if asked.

    Args:
        index: The shards.
        image_size: Side of a view in pixels.
        crop_scales: For each view, the range of the crop's area as a share of the picture's. One
            range: one view, for linear evaluation.
        seed: Seed of the run.
        flip_probability: Probability of a horizontal flip.
        photometric: For each view, the changes done here, on uint8; None leaves them to the device.
    """

    def __init__(
        self,
        index: Samples,
        *,
        image_size: int,
        crop_scales: tuple[tuple[float, float], ...],
        seed: int,
        flip_probability: float = 0.5,
        photometric: tuple[ViewAugment, ViewAugment] | None = None,
    ) -> None:
        if image_size < 1:
            raise UserError(f"image size {image_size}: must be at least 1 pixel")
        for low, high in crop_scales:
            if not 0 < low <= high <= 1:
                raise UserError(f"crop scale ({low}, {high}): must satisfy 0 < low <= high <= 1")
        self.index = index
        self.image_size = image_size
        self.crop_scales = crop_scales
        self.seed = seed
        self.flip_probability = flip_probability
        self.photometric = photometric

    def __getitem__(self, request: Request) -> Reply:
        """The views of one request; a bad picture or shard is told in the reply, not raised."""
        reply = Reply()
        try:
            reply.batch = self._batch(request, reply.bad)
        except UserError as error:
            reply.error = str(error)
        return reply

    def _batch(self, request: Request, bad: dict[int, str]) -> TwoViewBatch:
        num, size = len(request.sample_ids), self.image_size
        views = empty_uint8((len(self.crop_scales), num, size, size, 3))
        used = np.array(request.sample_ids, np.int64)
        visits = np.array(request.visits, np.int64)
        for start in range(0, num, _CHUNK):
            part = slice(start, start + _CHUNK)
            self._fill(used[part], visits[part], views.numpy()[:, part], bad)
        rows = self.index.samples[used]
        return TwoViewBatch(
            views=views.permute(0, 1, 4, 2, 3),
            keys=torch.from_numpy(rows["key"].astype(np.uint64).view(np.int64)),
            sample_ids=torch.from_numpy(used),
            visits=torch.from_numpy(visits),
            labels=torch.from_numpy(rows["label"].astype(np.int64)),
            num_bad=int((used != request.sample_ids).sum()),
            is_augmented=self.photometric is not None,
        )

    def _fill(
        self, used: np.ndarray, visits: np.ndarray, out: np.ndarray, bad: dict[int, str]
    ) -> None:
        """Write the views of samples; those of a stand-in, noted in `used`, where one is bad."""
        failed = self.write_views(used, visits, out)
        for row, reason in failed.items():
            sample_id, visit = int(used[row]), int(visits[row])
            bad[sample_id] = reason
            for attempt in range(_MAX_REPLACEMENTS):
                draw = counter_rng("replacement", self.seed, visit, sample_id, attempt)
                used[row] = draw.integers(self.index.num_samples)
                if int(used[row]) in bad:
                    continue
                one = slice(row, row + 1)
                failed_too = self.write_views(used[one], visits[one], out[:, one])
                if not failed_too:
                    break
                bad[int(used[row])] = failed_too[0]
            else:
                raise UserError(
                    f"{reason}; {_MAX_REPLACEMENTS} samples drawn in its place were bad too"
                )

    def write_views(
        self, sample_ids: np.ndarray, visits: np.ndarray, out: np.ndarray
    ) -> dict[int, str]:
        """Decode samples once each and write their views.

        Args:
            sample_ids: int64 [n].
            visits: int64 [n].
            out: uint8 [views, n, s, s, 3], written in place.
        Returns:
            {row: reason} of the pictures that do not decode.
        """
        pictures = self.index.read_many(sample_ids)
        failed: dict[int, str] = {}
        headers: dict[int, Header] = {}
        for row, data in enumerate(pictures):
            try:
                headers[row] = read_header(data, where="picture")
            except BadPicture as error:
                failed[row] = f"{self.index.describe(int(sample_ids[row]))}: {error}"
        plans = self._plans(sample_ids, visits, headers)
        for row, (reduction, num_rows, views) in plans.items():
            try:
                image, reduction = decode_fast(
                    pictures[row], headers[row], reduction, where="picture", num_rows=num_rows
                )
            except BadPicture as error:
                failed[row] = f"{self.index.describe(int(sample_ids[row]))}: {error}"
                continue
            for view, plan in enumerate(views):
                plan.write(image, reduction, out[view, row])
        return failed

    def _plans(
        self, sample_ids: np.ndarray, visits: np.ndarray, headers: dict[int, Header]
    ) -> dict[int, tuple[int, int, list["_ViewPlan"]]]:
        """For each row with a header: decode how much smaller, how many rows, into what views."""
        rows = np.fromiter(headers, np.int64, len(headers))
        if len(rows) == 0:
            return {}
        keys = self.index.samples[sample_ids[rows]]["key"].astype(np.uint64).view(np.int64)
        own_visits = visits[rows]
        sizes = np.array([(headers[row].height, headers[row].width) for row in headers], np.int64)
        crops = draw_crops(
            sizes, keys, own_visits, seed=self.seed, scales=dict(enumerate(self.crop_scales)),
            flip_probability=self.flip_probability,
        )  # fmt: skip
        plans = []
        for number, drawn in enumerate(crops):
            changes: list[Changes | None] = [None] * len(rows)
            if self.photometric is not None:
                params = draw_parameters(
                    self.photometric[number], keys, own_visits, seed=self.seed, view_index=number
                )
                changes = [*changes_of(params, self.image_size)]
            both = zip(drawn.boxes.tolist(), drawn.flips.tolist(), changes, strict=True)
            plans.append([_ViewPlan(*plan) for plan in both])
        sides = np.min([drawn.boxes[:, 2:] for drawn in crops], axis=(0, 2))
        reductions = reductions_for(sides, self.image_size)
        bottoms = np.max([drawn.boxes[:, 0] + drawn.boxes[:, 2] for drawn in crops], axis=0)
        views = [list(both) for both in zip(*plans, strict=True)]
        own = zip(reductions.tolist(), bottoms.tolist(), views, strict=True)
        return dict(zip(headers, own, strict=True))


class _ViewPlan(NamedTuple):
    """One view of one picture: where it is cut, whether it is flipped, what becomes of it."""

    box: tuple[int, int, int, int]
    is_flipped: bool
    changes: Changes | None

    def write(self, image: np.ndarray, reduction: int, out: np.ndarray) -> None:
        """Make the view from the decoded picture, into uint8 [s, s, 3]."""
        size = len(out)
        crop(image, self.box, size, is_flipped=self.is_flipped, reduction=reduction, out=out)
        if self.changes is not None:
            photometric_uint8.apply(out, self.changes)


def empty_uint8(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory for a batch; shared in a DataLoader's worker, so that handing over copies nothing."""
    if torch.utils.data.get_worker_info() is None:
        return _MEMORY.tensor(shape, np.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


def decode_sample(index: Samples, sample_id: int) -> np.ndarray:
    """Decode sample `sample_id`, uint8 [height, width, 3].

    Raises:
        BadPicture: If it does not decode; the message names sample and shard.
    """
    data = index.read_bytes(sample_id)
    try:
        return decode(data, where="picture")
    except BadPicture as error:
        raise BadPicture(f"{index.describe(sample_id)}: {error}") from error


class EvalDataset(Dataset):
    """Central crops in index order, for features and the kNN probe."""

    def __init__(self, index: Samples, image_size: int) -> None:
        self.index = index
        self.image_size = image_size

    def __getitem__(self, sample_ids: np.ndarray) -> Reply:
        """Crops, labels and numbers of some samples; a bad one is told in the reply."""
        images = np.empty((len(sample_ids), self.image_size, self.image_size, 3), np.uint8)
        try:
            for row, sample_id in enumerate(sample_ids):
                images[row] = center_crop(
                    decode_sample(self.index, int(sample_id)), self.image_size
                )
        except (BadPicture, UserError) as error:
            return Reply(error=f"{error}; repair or remove it and make the shards again")
        labels = self.index.samples["label"][sample_ids].astype(np.int64)
        tensors = (
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(labels),
            torch.from_numpy(sample_ids),
        )
        return Reply(batch=tensors)


class FetchAhead:
    """A thread that walks along the coming batches and fetches their shards.

    The order of an epoch is known in advance, so nothing is guessed. The thread stays at most
    `num_samples_ahead` samples in front of the batches that were taken. What it cannot fetch it
    leaves to the worker that needs it, which tells the user.

    Args:
        fetch: Makes sure that the shards of some samples are in the cache.
        batches: Sample numbers of the coming batches, int64 [n] each.
        num_samples_ahead: How far to run ahead, in samples.
    """

    def __init__(
        self,
        fetch: Callable[[np.ndarray], None],
        batches: Iterator[np.ndarray],
        num_samples_ahead: int,
    ) -> None:
        self._fetch, self._batches, self._num_ahead = fetch, batches, num_samples_ahead
        self._num_taken = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)

    def __enter__(self) -> "FetchAhead":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if kind is None:  # a shard in flight is finished, or given up by its own time limit
            self._thread.join()

    def advance(self) -> None:
        """One more batch was taken."""
        with self._changed:
            self._num_taken += 1
            self._changed.notify()

    def _run(self) -> None:
        for number, sample_ids in enumerate(self._batches):
            num_ahead = max(1, self._num_ahead // max(1, len(sample_ids)))
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closed or number < self._num_taken + num_ahead  # noqa: B023
                )
                if self._is_closed:
                    return
            try:
                self._fetch(sample_ids)
            except UserError:
                return


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
