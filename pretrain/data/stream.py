"""From a shard index to batches of two uint8 views, in an order that is a pure function of (seed, epoch).

One request to a worker is a whole batch of one rank: (epoch, step, sample numbers). Workers keep no state, so
their number changes nothing but the speed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.data.order import (
    counter_rng,
    epoch_order,
    global_batch,
    num_steps_per_epoch,
    rank_slice,
)
from pretrain.data.shards import ShardIndex
from pretrain.data.views import RATIO, BadSample, center_crop, decode, random_resized_crop
from pretrain.errors import UserError

_MAX_REPLACEMENTS = 32  # draws of a stand-in for one bad sample before giving up
NUM_VIEWS = 2


@dataclass(frozen=True)
class TwoViewBatch:
    """One rank's part of a global batch.

    Attributes:
        views: uint8 [2, n, 3, s, s], RGB; each view lies channels-last in memory.
        keys: int64 [n], 64-bit hashes of the samples' names (the bits of an unsigned number).
        sample_ids: int64 [n], numbers in the shard index.
        labels: int64 [n], -1 where there is none.
        num_bad: How many samples of this batch stand in for bad ones.
    """

    views: torch.Tensor
    keys: torch.Tensor
    sample_ids: torch.Tensor
    labels: torch.Tensor
    num_bad: int

    def pin_memory(self) -> "TwoViewBatch":
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> "TwoViewBatch":
        """The same batch on a device; the copy does not wait if the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Any) -> "TwoViewBatch":
        names = ("views", "keys", "sample_ids", "labels")
        return replace(self, **{name: function(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Request:
    """What a worker is asked for: these samples, in this order, of this epoch."""

    epoch: int
    step: int
    sample_ids: np.ndarray


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


class TwoViewDataset(Dataset):
    """Two random resized crops of each picture; photometric changes come later, on the device.

    Args:
        index: The shards.
        image_size: Side of a view in pixels.
        crop_scales: For each view, the range of the crop's area as a share of the picture's.
        seed: Seed of the run.
        flip_probability: Probability of a horizontal flip.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        image_size: int,
        crop_scales: tuple[tuple[float, float], tuple[float, float]],
        seed: int,
        flip_probability: float = 0.5,
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

    def __getitem__(self, request: Request) -> Reply:
        """The views of one request; never raises for a bad picture or shard, but says so in the reply."""
        reply = Reply()
        try:
            reply.batch = self._batch(request, reply.bad)
        except UserError as error:
            reply.error = str(error)
        return reply

    def _batch(self, request: Request, bad: dict[int, str]) -> TwoViewBatch:
        num, size = len(request.sample_ids), self.image_size
        views = np.empty((NUM_VIEWS, num, size, size, 3), np.uint8)
        used = np.empty(num, np.int64)
        for row, sample_id in enumerate(request.sample_ids):
            used[row] = self._fill(int(sample_id), request.epoch, views[:, row], bad)
        rows = self.index.samples[used]
        return TwoViewBatch(
            views=torch.from_numpy(views).permute(0, 1, 4, 2, 3),
            keys=torch.from_numpy(rows["key"].astype(np.uint64).view(np.int64)),
            sample_ids=torch.from_numpy(used),
            labels=torch.from_numpy(rows["label"].astype(np.int64)),
            num_bad=int((used != request.sample_ids).sum()),
        )

    def _fill(self, sample_id: int, epoch: int, out: np.ndarray, bad: dict[int, str]) -> int:
        """Write the views of a sample, or of its stand-in if it is bad; returns the number of the one used."""
        candidate = sample_id
        for attempt in range(_MAX_REPLACEMENTS):
            if candidate not in bad:
                try:
                    self.write_views(candidate, epoch, out)
                    return candidate
                except BadSample as error:
                    bad[candidate] = str(error)
            draw = counter_rng("replacement", self.seed, epoch, sample_id, attempt)
            candidate = int(draw.integers(self.index.num_samples))
        raise UserError(
            f"{bad[sample_id]}; {_MAX_REPLACEMENTS} samples drawn in its place were bad too"
        )

    def write_views(self, sample_id: int, epoch: int, out: np.ndarray) -> None:
        """Decode a sample once and write its views into uint8 [2, s, s, 3].

        Raises:
            BadSample: If the picture does not decode.
        """
        image = decode_sample(self.index, sample_id)
        key = int(self.index.samples[sample_id]["key"])
        for view, scale in enumerate(self.crop_scales):
            rng = counter_rng("crop", self.seed, epoch, key, view)
            random_resized_crop(
                image, rng, self.image_size, scale, RATIO, self.flip_probability, out=out[view]
            )


def decode_sample(index: ShardIndex, sample_id: int) -> np.ndarray:
    """Decode sample `sample_id`, uint8 [height, width, 3].

    Raises:
        BadSample: If it does not decode; the message names sample and shard.
    """
    data = index.read_bytes(sample_id)
    try:
        return decode(data, where="picture")
    except BadSample as error:
        raise BadSample(f"{index.describe(sample_id)}: {error}") from error


class RequestSampler(Sampler):
    """The requests of one rank from a step of an epoch on; set `epoch` and `start_step` before iterating."""

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
                f"{reason}. {len(self.bad_samples)} bad samples, allowed are {self._max_bad_samples}: repair the "
                "source and make the shards again, or raise data.max_bad_samples to replace and count such samples"
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
    """The batches of one epoch from one step on; for several epochs keep a `Loader`, whose workers stay."""
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


class EvalDataset(Dataset):
    """Central crops in index order, for features and the kNN probe."""

    def __init__(self, index: ShardIndex, image_size: int) -> None:
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
        except (BadSample, UserError) as error:
            return Reply(error=f"{error}; repair or remove it and make the shards again")
        labels = self.index.samples["label"][sample_ids].astype(np.int64)
        tensors = (
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(labels),
            torch.from_numpy(sample_ids),
        )
        return Reply(batch=tensors)


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
