"""Samples of shards that are read from front to end, pass after pass, on webdataset's pieces."""

import contextlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import SimpleShardList
from webdataset.tariterators import group_by_keys

from common.errors import UserError, require
from pretrain.data.decode import Sample
from pretrain.data.index import NO_LABEL, is_picture, sample_hash, split_name, tar_files
from pretrain.data.random_numbers import stable_hash
from pretrain.data.shards import check_weights
from pretrain.data.sources.locations import expand
from pretrain.data.sources.remote import Patience, displayed
from pretrain.data.streaming.byte_stream import open_stream

MAX_BUFFER_BYTES = 256 * 2**20  # of one reader's encoded pictures, by the size of its first ones
_NUM_LOOKED_AT = 64  # samples from which their size is judged
_MAX_INITIAL = 1000  # samples read before the first is given out; the buffer fills up on the way
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's names for what belongs to no sample


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
        streams = [self._endless(number) for number in range(len(self.sources))]
        mixed = streams[0] if len(streams) == 1 else self._mixed(streams, rng)
        first = list(itertools.islice(mixed, min(_NUM_LOOKED_AT, self.shuffle_buffer)))
        size = buffer_size(first, self.shuffle_buffer)
        initial = min(_MAX_INITIAL, max(1, size // 4))
        yield from shuffle(size, initial=initial, rng=rng)(itertools.chain(first, mixed))

    def _mixed(self, streams: list[Iterator[Sample]], rng: random.Random) -> Iterator[Sample]:
        """Draw from the sources; webdataset's RandomMix would use the process's one generator."""
        shares = list(itertools.accumulate(source.share for source in self.sources))
        while True:
            yield next(rng.choices(streams, cum_weights=shares)[0])

    def _endless(self, source: int) -> Iterator[Sample]:
        for number in itertools.count():
            yield from self._one_pass(source, number)

    def _one_pass(self, source: int, number: int) -> DataPipeline:
        """This reader's part of one pass over a source.

        All readers shuffle the shards in the same way and deal them out, another way each pass.
        Where there are fewer shards than readers they deal out the samples instead.
        """
        tars = self.sources[source].tars
        first = (self.number + number) % self.num_readers
        own = partial(_every, first=first, step=self.num_readers)
        is_by_sample = len(tars) < self.num_readers
        opened: list[str] = []
        return DataPipeline(
            SimpleShardList(list(tars), seed=_seed("shards", *self.seed, source, number)),
            None if is_by_sample else own,
            partial(self._files, opened=opened),
            partial(group_by_keys, keys=_key_and_suffix, handler=partial(_refuse, opened)),
            partial(self._to_samples, tars=tars, repeat=self.first_repeat + number),
            own if is_by_sample else None,
        )

    def _files(
        self, shards: Iterator[dict[str, str]], *, opened: list[str]
    ) -> Iterator[dict[str, Any]]:
        """Open shards and take their files out, as webdataset's own stages do (see `tar_files`)."""
        for shard in shards:
            url, num_files = shard["url"], 0
            opened[:] = [url]
            stream = open_stream(url, self.patience)
            with contextlib.closing(stream):
                for member, data in tar_files(stream, displayed(url), _is_needed):
                    if not _META.match(member.name):
                        num_files += 1
                        yield {"fname": member.name, "data": data, "__url__": url}
            require(
                num_files > 0,
                f"{displayed(url)}: holds no files; make it again or leave it out",
            )
            yield {}  # what follows belongs to another shard

    def _to_samples(
        self, groups: Iterator[dict[str, Any]], *, tars: Mapping[str, int], repeat: int
    ) -> Iterator[Sample]:
        for group in groups:
            name, url = group["__key__"], group["__url__"]
            key = sample_hash(name)
            if tars[url]:
                key ^= int.from_bytes(stable_hash("source", tars[url], num_bytes=8), "little")
            data = next((group[suffix] for suffix in group if is_picture(suffix)), None)
            try:
                label = int(group["cls"][:32].decode()) if "cls" in group else NO_LABEL
            except ValueError:
                label = NO_LABEL
            # Numbers are 63 bits of the hash: two names in 2**63 share one.
            where = f"sample {name!r} in {displayed(url)}"
            yield Sample(key & (2**63 - 1), key, repeat, label, data, where)


def buffer_size(first: Sequence[Sample], asked: int) -> int:
    """How many samples a reader holds back: as many as asked for, where they fit in its memory.

    Args:
        first: The first samples of the stream, from which the size of all is judged.
        asked: How many are wanted.
    """
    mean = sum(len(sample.data or b"") for sample in first) / len(first)
    return max(1, min(asked, int(MAX_BUFFER_BYTES / max(mean, 1))))


def _seed(*parts: int | str) -> int:
    return int.from_bytes(stable_hash("streaming", *parts), "little")


def _every(items: Iterator[Any], *, first: int, step: int) -> Iterator[Any]:
    return itertools.islice(items, first, None, step)


def _refuse(opened: list[str], error: Exception) -> NoReturn:
    """What becomes of an error that webdataset finds, a file that comes twice: it ends the run."""
    reason = str(error.args[0]).partition(" dict_keys")[0]
    raise UserError(f"{displayed(opened[0])}: {reason}; make this shard again") from error


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A file without a suffix is a sample without a picture, and counted as such."""
    return split_name(name) or (name, "")


def _is_needed(name: str) -> bool:
    suffix = _key_and_suffix(name)[1]
    return suffix == "cls" or is_picture(suffix)
