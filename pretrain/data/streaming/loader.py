"""The loader for shards that cannot be cached: they are read from front to end, again and again.

It promises less than `pretrain.data.loader`, which knows all samples:

- Within one pass over a source each sample comes once, to one of all readers (workers of all
  ranks). But an epoch is a number of batches, not a pass: it may end within one, and the readers do
  not wait for each other, so that a sample may come twice before another comes at all.
- The batches of an epoch follow from (seed, epoch, start_step, ranks, workers). A run that resumes
  within an epoch goes on with other samples than an uninterrupted one, and so does a run with
  another number of ranks or workers.
- A source is never looked through beforehand: what is wrong with a shard shows when it is read.

docs/shards.md says when to use it and what it costs.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.utils.data

from common.errors import require
from pretrain.data.decode import Sample, ViewWriter
from pretrain.data.loader import BadSamples, BatchDataset, Reply, ViewBatch, start_workers
from pretrain.data.order import share_of_rank
from pretrain.data.sources.remote import Patience
from pretrain.data.streaming.reader import Reader, open_sources

_MAX_PASSES = 1 << 20  # per epoch; repeats count epochs and passes in one number


class StreamRequest(NamedTuple):
    """A request for a worker's next batch.

    Attributes:
        run: Number of the call of `StreamingLoader.epoch`; a new one begins a new stream.
        epoch: Epoch.
        start_step: First global batch of this stream.
    """

    run: int
    epoch: int
    start_step: int


class StreamDataset(BatchDataset):
    """The work of a worker: it keeps a stream of samples, and makes each request a batch of them.

    Args:
        make_reader: Makes the reader of a stream, but for its number, seed and first repeat.
        views: Decodes, crops and changes.
        num_steps: Global batches per epoch.
        batch_size: Batch size of one rank.
        rank: Number of this rank.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        make_reader: Callable[..., Reader],
        views: ViewWriter,
        *,
        num_steps: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(views)
        self._make_reader, self._num_steps, self._batch_size = make_reader, num_steps, batch_size
        self._rank, self._world_size = rank, world_size
        self._run = -1
        self._stream: Iterator[Sample] = iter(())
        self._error: str | None = None

    def __getitem__(self, request: StreamRequest) -> Reply:
        """The next batch; what is wrong stands in the reply, and is not raised."""
        if request.run != self._run:
            self._run, self._error = request.run, None
            worker = torch.utils.data.get_worker_info()
            number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
            first_step = request.epoch * self._num_steps + request.start_step
            reader = self._make_reader(
                number=number * self._world_size + self._rank,
                num_readers=num_workers * self._world_size,
                seed=(self.views.seed, request.epoch, request.start_step),
                first_repeat=first_step * _MAX_PASSES,
            )
            self._stream = reader.samples()
        reply = Reply(error=self._error)
        if reply.error is None:
            self.make_batch(self._take, self._batch_size, reply)
            self._error = reply.error  # there is no going on with a stream that broke
        return reply

    def _take(self, rows: slice) -> list[Sample]:
        return list(itertools.islice(self._stream, rows.stop - rows.start))

    def stand_in(self, sample: Sample, attempt: int) -> Sample:
        """The next one of the stream."""
        return next(self._stream)

    def describe(self, sample: Sample) -> str:
        """See `BatchDataset`."""
        return sample.name


class StreamingLoader:
    """Batches of two views from shards that are read from front to end (see the module's text).

    An epoch has the same number of batches on every rank, whatever the shards hold. Repeats number
    the passes over a source through all epochs, so that a sample that comes again is cropped in
    another way; sample numbers are hashes of the names.

    A worker holds `shuffle_buffer` encoded pictures, one batch of views, and for each set with a
    weight up to three parts of 8 MiB of a shard on a server.

    Args:
        spec: What to read: one set, several in a list (read as one), or sets with their shares.
        batch_size: Global batch size, over all ranks.
        samples_per_epoch: What an epoch is; the remainder below one batch is left out.
        rank: Number of this rank.
        world_size: Number of ranks.
        num_workers: Worker processes; 0 reads in this process.
        shuffle_buffer: Encoded samples that a worker holds back to mix them.
        max_bad_samples: How many different bad samples this rank replaces before it stops.
        known_bad: Bad samples of an earlier part of the run: {sample number: reason}.
        patience: How long to keep trying to read a shard.
        views: Arguments of `ViewWriter`.
    Attributes:
        num_steps: Global batches per epoch.
        bad_samples: Those replaced so far: {sample number: reason}.
    Raises:
        UserError: If there is nothing to read, or an option is impossible.
    """

    def __init__(
        self,
        spec: str | Sequence[str] | Mapping[str, float],
        *,
        batch_size: int,
        samples_per_epoch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_buffer: int = 2048,
        max_bad_samples: int = 0,
        known_bad: Mapping[int, str] | None = None,
        patience: Patience | None = None,
        **views: Any,
    ) -> None:
        require(batch_size >= 1, f"data.batch_size: {batch_size}: must be at least 1")
        require(
            samples_per_epoch >= batch_size,
            f"data.samples_per_epoch: {samples_per_epoch}: must fill one batch of {batch_size}",
        )
        require(
            shuffle_buffer >= 1, f"shuffle buffer of {shuffle_buffer}: must be at least 1 sample"
        )
        patience = patience or Patience()
        self._sources = open_sources(spec, patience)
        self._num_readers, self._rank = world_size * max(1, num_workers), rank
        self.num_steps = samples_per_epoch // batch_size
        self._bad = BadSamples(max_bad_samples, known_bad)
        self.bad_samples = self._bad.reasons
        dataset = StreamDataset(
            partial(Reader, self._sources, shuffle_buffer=shuffle_buffer, patience=patience),
            ViewWriter(**views),
            num_steps=self.num_steps,
            batch_size=share_of_rank(batch_size, world_size),
            rank=rank,
            world_size=world_size,
        )
        self._requests: list[StreamRequest] = []  # of the epoch that is read
        self._num_runs = 0
        self._loader = start_workers(dataset, self._requests, num_workers)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ViewBatch]:
        """Batches `start_step` .. of an epoch.

        Raises:
            UserError: If more samples are bad than allowed, or a shard cannot be read.
        """
        num_tars = min(len(source.tars) for source in self._sources)
        if self._num_runs == 0 and self._rank == 0 and num_tars < self._num_readers:
            print(
                f"streaming: fewer shards ({num_tars}) than readers ({self._num_readers}: ranks x "
                f"workers): every reader reads all shards and keeps one sample in "
                f"{self._num_readers}; more shards or fewer workers cost less",
                file=sys.stderr,
            )
        self._num_runs += 1
        request = StreamRequest(self._num_runs, epoch, start_step)
        self._requests[:] = [request] * (self.num_steps - start_step)
        for reply in self._loader:
            self._bad.count(reply)
            yield reply.batch
