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

import contextlib
import itertools
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import torch.utils.data
from webdataset.filters import shuffle

from common.errors import UserError, printable, require
from common.files import open_regular
from pretrain.data.decode import Sample, ViewWriter
from pretrain.data.index import Notes, sample_hash, tar_samples
from pretrain.data.loader import BatchDataset, Reply, ViewBatch, WorkerLoader
from pretrain.data.order import share_of_rank
from pretrain.data.random_numbers import stable_hash
from pretrain.data.remote import Patience, displayed, download, look
from pretrain.data.sources import expand

_MAX_PASSES = 1 << 20  # per epoch; repeats count epochs and passes in one number
MAX_BUFFER_BYTES = 256 * 2**20  # of one reader's encoded pictures, by the size of its first ones
_NUM_LOOKED_AT = 64  # samples from which their size is judged
_MAX_INITIAL = 1000  # samples read before the first is given out; the buffer fills up on the way
_MAX_PARTS = 2  # of 8 MiB each, fetched and not yet read


# -- the bytes of a tar ---------------------------------------------------------------------------


def open_stream(url: str, patience: Patience) -> "BinaryIO | RemoteStream":
    """Open a tar that is read once.

    Args:
        url: A local path, a URL, or ``pipe:`` with a command.
        patience: How long to keep trying.
    Raises:
        UserError: If a local file cannot be opened. What servers and commands do wrong is raised by
            `read`.
    """
    if "://" in url or url.startswith("pipe:"):
        return RemoteStream(url, patience)
    try:
        return open_regular(url)
    except OSError as error:
        remedy = "check the path, and name a pipe as pipe:cat PIPE"
        raise UserError(f"{url}: cannot be opened ({error.strerror}); {remedy}") from error


class RemoteStream:
    """Bytes of a file on a server, or of a command's output, fetched by a thread.

    At most two parts of 8 MiB wait to be read.

    Args:
        url: A URL, or ``pipe:`` with a command.
        patience: How long to keep trying.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self._url, self._patience = url, patience
        self._parts: queue.Queue[bytes | Exception] = queue.Queue(_MAX_PARTS)
        self._part, self._is_closed = memoryview(b""), False
        self._end: bytes | Exception | None = None  # what came last: nothing, or why
        threading.Thread(target=self._run, name="shard-stream", daemon=True).start()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end.

        Raises:
            UserError: If the rest cannot be fetched.
        """
        if not self._part and self._end is None:
            part = self._parts.get()
            if isinstance(part, bytes) and part:
                self._part = memoryview(part)
            else:
                self._end = part
        if isinstance(self._end, Exception):
            raise self._end
        data, self._part = self._part[:size], self._part[size:]
        return bytes(data)

    def close(self) -> None:
        """Stop fetching; the thread ends at its next byte, or by its own time limit."""
        self._is_closed = True
        with contextlib.suppress(queue.Empty):  # a thread that waits for room goes on, and ends
            while True:
                self._parts.get_nowait()

    def _run(self) -> None:
        end: bytes | Exception = b""
        try:
            for part in download(look(self._url, self._patience), self._patience):
                if not self._is_closed:
                    self._parts.put(part)
                if self._is_closed:
                    return
        except Exception as error:
            end = error
        if not self._is_closed:
            self._parts.put(end)


# -- the samples of a reader ----------------------------------------------------------------------


@dataclass(frozen=True)
class StreamSource:
    """Tars that are read as one.

    Attributes:
        tars: Each tar with the number of the set it belongs to, which salts the keys.
        share: Of the samples of an epoch, about this part comes from here, relative to the others.
    """

    tars: Mapping[str, int]
    share: float = 1.0


def open_sources(
    spec: str | Sequence[str] | Mapping[str, float], patience: Patience
) -> list[StreamSource]:
    """Find the tars of what a user named.

    Sets in a list are read as one, so that a pass shows each sample of each of them once. Sets with
    weights are drawn from in proportion to these, whatever they hold.

    Raises:
        UserError: If a set cannot be found, or a tar is named twice.
    """
    names = [spec] if isinstance(spec, str) else list(spec)
    tars: dict[str, int] = {}
    for number, name in enumerate(names):
        for tar in expand(name, patience):
            require(tar not in tars, f"data.shards: {displayed(tar)} is named twice; name it once")
            tars[tar] = number
    if not isinstance(spec, Mapping):
        return [StreamSource(tars)]
    return [
        StreamSource({tar: of for tar, of in tars.items() if of == number}, weight)
        for number, weight in enumerate(spec.values())
    ]


@dataclass(frozen=True)
class Reader:
    """One of all workers of all ranks, and the samples that it gets.

    Attributes:
        sources: Where samples come from.
        number: Number of this reader.
        num_readers: Of how many.
        seed: Everything random follows from it.
        first_repeat: Repeat index of the first pass.
        shuffle_buffer: Encoded samples held back to be mixed; fewer where these would take more
            than MAX_BUFFER_BYTES.
        patience: How long to keep trying to read a shard.
    """

    sources: Sequence[StreamSource]
    number: int
    num_readers: int
    seed: tuple[int, ...]
    first_repeat: int
    shuffle_buffer: int
    patience: Patience

    def samples(self) -> Iterator[Sample]:
        """Samples without end.

        Raises:
            UserError: If a shard cannot be read, is damaged, or holds nothing.
        """
        rng = random.Random(_seed("shuffle", *self.seed, self.number))

        def endless(source: int) -> Iterator[Sample]:
            for number in itertools.count():
                yield from self._one_pass(source, number)

        # Draw from the sources (webdataset's RandomMix would use the process's one generator).
        streams = [endless(number) for number in range(len(self.sources))]
        shares = list(itertools.accumulate(source.share for source in self.sources))
        mixed = streams[0]
        if len(streams) > 1:
            mixed = (next(rng.choices(streams, cum_weights=shares)[0]) for _ in itertools.count())

        # Shuffle in a buffer whose size follows from the first samples.
        first = list(itertools.islice(mixed, min(_NUM_LOOKED_AT, self.shuffle_buffer)))
        mean = sum(len(sample.data or b"") for sample in first) / len(first)
        size = max(1, min(self.shuffle_buffer, int(MAX_BUFFER_BYTES / max(mean, 1))))
        initial = min(_MAX_INITIAL, max(1, size // 4))
        yield from shuffle(size, initial=initial, rng=rng)(itertools.chain(first, mixed))

    def _one_pass(self, source: int, number: int) -> Iterator[Sample]:
        """This reader's part of one pass over a source.

        All readers shuffle the shards in the same way and deal them out, another way each pass.
        Where there are fewer shards than readers they deal out the samples instead.
        """
        tars = list(self.sources[source].tars.items())
        random.Random(_seed("shards", *self.seed, source, number)).shuffle(tars)
        first, step = (self.number + number) % self.num_readers, self.num_readers
        is_by_sample = len(tars) < self.num_readers
        samples = itertools.chain.from_iterable(
            self._samples_of(url, number_of_set, self.first_repeat + number)
            for url, number_of_set in (tars if is_by_sample else tars[first::step])
        )
        return itertools.islice(samples, first, None, step) if is_by_sample else samples

    def _samples_of(self, url: str, number_of_set: int, repeat: int) -> Iterator[Sample]:
        """The samples of one tar; what is left out of it has no picture, and is counted as bad."""
        name, num_samples, salt, notes = displayed(url), 0, 0, Notes()
        if number_of_set:
            salt = int.from_bytes(stable_hash("source", number_of_set, num_bytes=8), "little")
        with contextlib.closing(open_stream(url, self.patience)) as stream:
            for one in tar_samples(stream, name, notes, with_pictures=True):
                num_samples += 1
                key, where, data = one.name, f"sample {one.name!r} in {name}", one.data
                if one.fault:
                    data = None
                    where = f"{one.name!r} in {name} ({one.fault})"
                    key = f"{one.name}@{one.offset}"
                hashed = sample_hash(key) ^ salt
                # Numbers are 63 bits of the hash: two names in 2**63 share one.
                yield Sample(hashed & (2**63 - 1), hashed, repeat, one.label, data, where)
        require(num_samples > 0, f"{name}: holds no files; make it again or leave it out")
        if repeat == 0:
            for item in notes.items():
                print(printable(f"{name}: {item['file']}: {item['reason']}"), file=sys.stderr)


def _seed(*parts: int | str) -> int:
    return int.from_bytes(stable_hash("streaming", *parts), "little")


# -- the loader ---------------------------------------------------------------------------------


class StreamRequest(NamedTuple):
    """A request for a worker's next batch.

    Attributes:
        run: Number of the call of `StreamingLoader.epoch`; a new one begins a new stream.
        seed: Everything random in this stream follows from it.
        first_repeat: Repeat index of its first pass.
    """

    run: int
    seed: tuple[int, ...]
    first_repeat: int


class StreamDataset(BatchDataset):
    """The work of a worker: it keeps a stream of samples, and makes each request a batch of them.

    Args:
        views: Decodes, crops and changes.
        make_reader: Makes the reader of a stream, but for its number, seed and first repeat.
        batch_size: Batch size of one rank.
        rank: Number of this rank.
        world_size: Number of ranks.
    """

    def __init__(
        self, views: ViewWriter, make_reader: Callable[..., Reader], batch_size: int, rank: int,
        world_size: int,
    ) -> None:  # fmt: skip
        super().__init__(views)
        self._make_reader, self._batch_size = make_reader, batch_size
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
            reader = self._make_reader(
                number=number * self._world_size + self._rank,
                num_readers=num_workers * self._world_size,
                seed=request.seed,
                first_repeat=request.first_repeat,
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


class StreamingLoader(WorkerLoader):
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
        num_workers, max_bad_samples, known_bad: See `WorkerLoader`.
        shuffle_buffer: Encoded samples that a worker holds back to mix them, at least 1.
        patience: How long to keep trying to read a shard.
        views: Arguments of `ViewWriter`.
    Attributes:
        num_steps: Global batches per epoch.
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
        known_bad: Mapping[Any, str] | None = None,
        patience: Patience,
        **views: Any,
    ) -> None:
        fills = f"data.samples_per_epoch: {samples_per_epoch}: must fill one batch of {batch_size}"
        require(samples_per_epoch >= batch_size, fills)
        sources = open_sources(spec, patience)
        self.num_steps = samples_per_epoch // batch_size
        writer, share = ViewWriter(**views), share_of_rank(batch_size, world_size)
        self._seed = writer.seed
        reader = partial(Reader, sources, shuffle_buffer=shuffle_buffer, patience=patience)
        dataset = StreamDataset(writer, reader, share, rank, world_size)
        self._requests: list[StreamRequest] = []  # of the epoch that is read
        self._runs = itertools.count()
        super().__init__(dataset, self._requests, num_workers, max_bad_samples, known_bad)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ViewBatch]:
        """Batches `start_step` .. of an epoch.

        Raises:
            UserError: If more samples are bad than allowed, or a shard cannot be read.
        """
        first_repeat = (epoch * self.num_steps + start_step) * _MAX_PASSES
        request = StreamRequest(next(self._runs), (self._seed, epoch, start_step), first_repeat)
        self._requests[:] = [request] * (self.num_steps - start_step)
        yield from map(self._batch_of, self._loader)
