"""Samples of shards that are read from front to end, pass after pass."""

import contextlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from webdataset.filters import shuffle

from common.errors import require
from pretrain.data.decode import Sample
from pretrain.data.index import NO_LABEL, is_picture, sample_hash, tar_samples
from pretrain.data.random_numbers import stable_hash
from pretrain.data.shards import check_weights
from pretrain.data.sources.locations import expand
from pretrain.data.sources.remote import Patience, displayed
from pretrain.data.streaming.byte_stream import open_stream

MAX_BUFFER_BYTES = 256 * 2**20  # of one reader's encoded pictures, by the size of its first ones
_NUM_LOOKED_AT = 64  # samples from which their size is judged
_MAX_INITIAL = 1000  # samples read before the first is given out; the buffer fills up on the way


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
        UserError: If nothing is named, a tar is named twice, or a weight is not above 0.
    """
    names = [spec] if isinstance(spec, str) else list(spec)
    require(bool(names), "data.shards: an empty list; name at least one shard set")
    tars: dict[str, int] = {}
    for number, name in enumerate(names):
        for tar in expand(name, patience):
            require(tar not in tars, f"data.shards: {displayed(tar)} is named twice; name it once")
            tars[tar] = number
    if not isinstance(spec, Mapping):
        return [StreamSource(tars)]
    check_weights(spec)
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
        size = buffer_size(first, self.shuffle_buffer)
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
        """The samples of one tar. A file that comes twice ends the run, as in webdataset."""
        name, num_samples, salt = displayed(url), 0, 0
        if number_of_set:
            salt = int.from_bytes(stable_hash("source", number_of_set, num_bytes=8), "little")
        with contextlib.closing(open_stream(url, self.patience)) as stream:
            for key, files in tar_samples(stream, name, lambda s: s == "cls" or is_picture(s)):
                num_samples += 1
                by_suffix = {suffix: data for suffix, _, data in files}
                require(
                    len(by_suffix) == len(files),
                    f"{name}: a file of sample {key!r} comes twice; make this shard again",
                )
                pictures = (data for suffix, data in by_suffix.items() if is_picture(suffix))
                try:
                    label = int(by_suffix["cls"][:32].decode()) if "cls" in by_suffix else NO_LABEL
                except ValueError:
                    label = NO_LABEL
                hashed = sample_hash(key) ^ salt
                # Numbers are 63 bits of the hash: two names in 2**63 share one.
                where = f"sample {key!r} in {name}"
                yield Sample(
                    hashed & (2**63 - 1), hashed, repeat, label, next(pictures, None), where
                )
        require(num_samples > 0, f"{name}: holds no files; make it again or leave it out")


def buffer_size(first: Sequence[Sample], most: int) -> int:
    """How many samples a reader holds back: `most`, or as many as fit in its memory.

    Args:
        first: The first samples of the stream, from which the size of all is judged.
        most: Upper bound.
    """
    mean = sum(len(sample.data or b"") for sample in first) / len(first)
    return max(1, min(most, int(MAX_BUFFER_BYTES / max(mean, 1))))


def _seed(*parts: int | str) -> int:
    return int.from_bytes(stable_hash("streaming", *parts), "little")
