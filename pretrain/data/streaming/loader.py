"""The loader for shards that cannot be cached: they are read from front to end, again and again.

It stands on webdataset's pieces, and promises less than `stream`, which knows all samples:

- Within one pass over a source each sample comes once, to one of all readers (workers of all
  ranks). But an epoch is a number of batches, not a pass: it may end within one, and the readers do
  not wait for each other, so that a sample may come twice before another comes at all.
- The batches of an epoch follow from (seed, epoch, start_step, ranks, workers). A run that resumes
  within an epoch goes on with other samples than an uninterrupted one, and so does a run with
  another number of ranks or workers.
- A source is never looked through beforehand: what is wrong with a shard shows when it is read.

docs/streaming.md says when to use it and what it costs.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.utils.data
from torch.utils.data import Dataset, Sampler

from common.errors import UserError, require
from pretrain.data.augment import ViewAugment
from pretrain.data.index import SAMPLE_DTYPE
from pretrain.data.loader import (
    NUM_VIEWS,
    BadSamples,
    Reply,
    TwoViewBatch,
    TwoViewDataset,
    empty_uint8,
    start_workers,
)
from pretrain.data.mixture import Samples
from pretrain.data.order import Epoch, rank_slice
from pretrain.data.sources.remote import Patience
from pretrain.data.streaming.reader import Reader, StreamSample, StreamSource, open_sources

_CHUNK = 64  # samples that are decoded together
_MAX_REPLACEMENTS = 32  # bad samples in a row before giving up
_MAX_PASSES = 1 << 20  # per epoch; visits count epochs and passes in one number


@dataclass(frozen=True)
class StreamRequest:
    """What a worker is asked for: its next batch.

    Attributes:
        run: Number of the call of `StreamingLoader.epoch`; a new one begins a new stream.
        epoch: Epoch.
        start_step: First global batch of this stream.
    """

    run: int
    epoch: int
    start_step: int


class _Requests(Sampler):
    """As many requests as there are batches; set `first` and `num_steps` before iterating."""

    def __init__(self) -> None:
        self.first = StreamRequest(0, 0, 0)
        self.num_steps = 0

    def __len__(self) -> int:
        return max(0, self.num_steps - self.first.start_step)

    def __iter__(self) -> Iterator[StreamRequest]:
        return itertools.repeat(self.first, len(self))


class HeldSamples:
    """Samples in memory, in the face of a shard index: what `TwoViewDataset.write_views` needs.

    Attributes:
        samples: The table of the samples; only their keys are set.
    """

    def __init__(self) -> None:
        self.samples = np.empty(0, SAMPLE_DTYPE)
        self._row: Sequence[StreamSample] = ()

    def hold(self, row: Sequence[StreamSample]) -> None:
        """Hold these samples, and no others."""
        self._row = row
        self.samples = np.zeros(len(row), SAMPLE_DTYPE)
        self.samples["key"] = [sample.key for sample in row]

    def read_many(self, sample_ids: np.ndarray) -> list[bytes]:
        """The encoded pictures of some samples, by their places in the row."""
        return [self._row[i].data or b"" for i in sample_ids]

    def describe(self, i: int) -> str:
        """What to call sample `i` in a message."""
        return self._row[i].where


class StreamDataset(Dataset):
    """What a worker does: it keeps a stream of samples, and makes each request a batch of them.

    Args:
        sources: Where samples come from.
        held: What `views` reads.
        views: Decodes, crops and changes.
        num_steps: Global batches per epoch.
        batch_size: Batch size of one rank.
        rank: Number of this rank.
        world_size: Number of ranks.
        shuffle_buffer: Encoded samples that a worker holds back to mix them.
        patience: How long to keep trying to read a shard.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        held: HeldSamples,
        views: TwoViewDataset,
        *,
        num_steps: int,
        batch_size: int,
        rank: int,
        world_size: int,
        shuffle_buffer: int,
        patience: Patience,
    ) -> None:
        self._sources, self._held, self._views = sources, held, views
        self._num_steps, self._batch_size = num_steps, batch_size
        self._rank, self._world_size = rank, world_size
        self._shuffle_buffer, self._patience = shuffle_buffer, patience
        self._run = -1
        self._stream: Iterator[StreamSample] = iter(())
        self._error: str | None = None

    def __getitem__(self, request: StreamRequest) -> Reply:
        """The next batch; what is wrong is told in the reply, not raised."""
        if request.run != self._run:
            self._run, self._error = request.run, None
            self._stream = self._reader(request).samples()
        reply = Reply(error=self._error)
        if reply.error is None:
            try:
                reply.batch = self._batch(reply.bad)
            except UserError as error:  # there is no going on with a stream that broke
                reply.error = self._error = str(error)
        return reply

    def _reader(self, request: StreamRequest) -> Reader:
        worker = torch.utils.data.get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first_step = request.epoch * self._num_steps + request.start_step
        return Reader(
            self._sources,
            number=number * self._world_size + self._rank,
            num_readers=num_workers * self._world_size,
            seed=(self._views.seed, request.epoch, request.start_step),
            first_visit=first_step * _MAX_PASSES,
            shuffle_buffer=self._shuffle_buffer,
            patience=self._patience,
        )

    def _batch(self, bad: dict[int, str]) -> TwoViewBatch:
        num, size = self._batch_size, self._views.image_size
        views = empty_uint8((NUM_VIEWS, num, size, size, 3))
        row: list[StreamSample] = []
        num_bad = 0
        for start in range(0, num, _CHUNK):
            taken, num_replaced = self._fill(views.numpy()[:, start : start + _CHUNK], bad)
            row += taken
            num_bad += num_replaced
        keys = np.array([sample.key for sample in row], np.uint64)
        return TwoViewBatch(
            views=views.permute(0, 1, 4, 2, 3),
            keys=torch.from_numpy(keys.view(np.int64)),
            sample_ids=torch.tensor([sample.sample_id for sample in row]),
            visits=torch.tensor([sample.visit for sample in row]),
            labels=torch.tensor([sample.label for sample in row]),
            num_bad=num_bad,
            is_augmented=self._views.photometric is not None,
        )

    def _fill(self, out: np.ndarray, bad: dict[int, str]) -> tuple[list[StreamSample], int]:
        """Write the views of the next samples, without the bad ones; how many rows had one."""
        row = list(itertools.islice(self._stream, out.shape[1]))
        failed = self._write(row, out)
        for place, reason in failed.items():
            bad[row[place].sample_id] = reason
            for _ in range(_MAX_REPLACEMENTS):
                row[place] = next(self._stream)
                failed_too = self._write([row[place]], out[:, place : place + 1])
                if not failed_too:
                    break
                bad[row[place].sample_id] = failed_too[0]
            else:
                raise UserError(
                    f"{reason}; {_MAX_REPLACEMENTS} samples that came in its place were bad too"
                )
        return row, len(failed)

    def _write(self, row: Sequence[StreamSample], out: np.ndarray) -> dict[int, str]:
        """Write the views of samples; the reasons where this fails."""
        self._held.hold(row)
        visits = np.array([sample.visit for sample in row], np.int64)
        failed = self._views.write_views(np.arange(len(row)), visits, out)
        for place in failed:
            if row[place].data is None:
                failed[place] = f"{row[place].where}: holds no picture"
        return failed


class StreamingLoader:
    """Batches of two views from shards that are read from front to end (see the module's text).

    An epoch has the same number of batches on every rank, whatever the shards hold. Visits number
    the passes over a source through all epochs, so that a sample that comes again is cropped in
    another way; sample numbers are hashes of the names.

    A worker holds `shuffle_buffer` encoded pictures, one batch of views, and for each set with a
    weight up to three parts of 8 MiB of a shard on a server.

    Args:
        spec: What to read: one set, several in a list (read as one), or sets with their shares.
        image_size: Side of a view in pixels.
        crop_scales: For each view, the range of the crop's area as a share of the picture's.
        seed: Seed of the run.
        batch_size: Global batch size, over all ranks.
        samples_per_epoch: What an epoch is; the remainder below one batch is left out.
        rank: Number of this rank.
        world_size: Number of ranks.
        num_workers: Worker processes; 0 reads in this process.
        shuffle_buffer: Encoded samples that a worker holds back to mix them.
        max_bad_samples: How many different bad samples this rank replaces before it stops.
        known_bad: Bad samples that an earlier part of the run met: {sample number: reason}.
        photometric: For each view, the changes done here, on uint8; None leaves them to the device.
        patience: How long to keep trying to read a shard.
    Attributes:
        num_steps: Global batches per epoch.
        bad_samples: What was replaced so far: {sample number: reason}.
    Raises:
        UserError: If there is nothing to read, or an option is impossible.
    """

    def __init__(
        self,
        spec: str | Sequence[str] | Mapping[str, float],
        *,
        image_size: int,
        crop_scales: tuple[tuple[float, float], tuple[float, float]],
        seed: int,
        batch_size: int,
        samples_per_epoch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_buffer: int = 2048,
        max_bad_samples: int = 0,
        known_bad: Mapping[int, str] | None = None,
        photometric: tuple[ViewAugment, ViewAugment] | None = None,
        patience: Patience | None = None,
    ) -> None:
        require(batch_size >= 1, f"data.batch_size: {batch_size}: must be at least 1")
        require(
            samples_per_epoch >= batch_size,
            f"data.samples_per_epoch: {samples_per_epoch}: must fill one batch of {batch_size}",
        )
        require(
            shuffle_buffer >= 1, f"shuffle buffer of {shuffle_buffer}: must be at least 1 sample"
        )
        whole = np.arange(batch_size)
        rank_slice(Epoch(whole, whole), rank, world_size)  # what does not divide is refused now
        patience = patience or Patience()
        self._sources = open_sources(spec, patience)
        self._num_readers, self._rank = world_size * max(1, num_workers), rank
        self.num_steps = samples_per_epoch // batch_size
        self._bad = BadSamples(max_bad_samples, known_bad)
        self.bad_samples = self._bad.found
        held = HeldSamples()
        views = TwoViewDataset(
            cast(Samples, held),
            image_size=image_size,
            crop_scales=crop_scales,
            seed=seed,
            photometric=photometric,
        )
        dataset = StreamDataset(
            self._sources,
            held,
            views,
            num_steps=self.num_steps,
            batch_size=batch_size // world_size,
            rank=rank,
            world_size=world_size,
            shuffle_buffer=shuffle_buffer,
            patience=patience,
        )
        self._requests, self._num_runs = _Requests(), 0
        self._loader = start_workers(dataset, self._requests, num_workers)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[TwoViewBatch]:
        """Batches `start_step` .. of an epoch.

        Raises:
            UserError: If more bad samples were met than allowed, or a shard cannot be read.
        """
        self._tell_of_few_shards()
        self._num_runs += 1
        self._requests.first = StreamRequest(self._num_runs, epoch, start_step)
        self._requests.num_steps = self.num_steps
        for reply in self._loader:
            self._bad.check(reply)
            yield reply.batch

    def _tell_of_few_shards(self) -> None:
        """Say once that every reader fetches everything."""
        num_tars = min(len(source.tars) for source in self._sources)
        if self._num_runs == 0 and self._rank == 0 and num_tars < self._num_readers:
            print(
                f"streaming: fewer shards ({num_tars}) than readers ({self._num_readers}: ranks x "
                f"workers): every reader reads all shards and keeps one sample in "
                f"{self._num_readers}; more shards or fewer workers cost less",
                file=sys.stderr,
            )
