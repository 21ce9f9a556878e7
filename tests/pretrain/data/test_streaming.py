import io
import itertools
import shlex
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pretrain.data import remote
from pretrain.data.decode import Sample
from pretrain.data.index import sample_hash
from pretrain.data.loader import ViewBatch, ViewDataset
from pretrain.data.order import OrderedSamples
from pretrain.data.policy import AugmentationPolicy
from pretrain.data.remote import Patience
from pretrain.data.shards import open_samples
from pretrain.data.streaming import (
    Reader,
    RemoteStream,
    StreamingLoader,
    StreamSource,
    open_sources,
)
from tests.pretrain.data.picture_helpers import (
    NUM_PICTURES,
    encode,
    same,
    seeded,
    smooth_picture,
    write_tar,
)
from tests.pretrain.data.servers import faulty

SIZE = 16
VIEWS = AugmentationPolicy.of("asymmetric").views
PATIENCE = Patience(retries=1, timeout_seconds=2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)


def picture(seed: int) -> bytes:
    return encode(smooth_picture(seed), quality=90)


def loader(spec: Any, **options: Any) -> StreamingLoader:
    defaults: dict[str, Any] = {
        "image_size": SIZE, "views": VIEWS, "seed": 3, "batch_size": 8,
        "samples_per_epoch": NUM_PICTURES, "shuffle_buffer": 10, "patience": PATIENCE,
    }  # fmt: skip
    return StreamingLoader(spec, **(defaults | options))


def keys_of(batches: Sequence[ViewBatch]) -> list[int]:
    return [key % 2**64 for batch in batches for key in batch.sample_hashes.tolist()]


def reader(sources: list[StreamSource], number: int = 0, num: int = 1, **options: Any) -> Reader:
    defaults = {"seed": (3, 0, 0), "first_repeat": 0, "shuffle_buffer": 1, "patience": PATIENCE}
    return Reader(sources, number=number, num_readers=num, **(defaults | options))


def in_pass(samples: Iterator[Sample], number: int) -> list[Sample]:
    """The samples of one pass; those of earlier passes must have been taken."""
    return list(itertools.takewhile(lambda sample: sample.repeat <= number, samples))


def refusal(batches: Iterator[ViewBatch]) -> str:
    try:
        list(batches)
    except UserError as error:  # with pytest.raises, a cycle would keep the workers for a while
        return str(error)
    pytest.fail("no UserError")


def wait_until_none_streams() -> None:
    end = time.monotonic() + 5
    while any(thread.name == "shard-stream" for thread in threading.enumerate()):
        assert time.monotonic() < end, "a thread goes on fetching"
        time.sleep(0.01)


@settings(seeded, max_examples=25)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), num_readers=st.integers(1, 7))
def test_each_pass_deals_each_sample_to_one_reader(tmp_path_factory, sizes, num_readers):
    folder = tmp_path_factory.mktemp("tars")
    for number, size in enumerate(sizes):
        write_tar(folder / f"{number}.tar", {f"{number}-{i}.jpg": b"x" for i in range(size)})
    names = [f"{number}-{i}" for number, size in enumerate(sizes) for i in range(size)]
    expected = Counter(sample_hash(name) for name in names)
    sources = open_sources(str(folder), PATIENCE)
    passes: dict[int, Counter[int]] = {number: Counter() for number in range(3)}
    for number in range(num_readers):
        endless = reader(sources, number, num_readers).samples()
        for sample in itertools.takewhile(lambda sample: sample.repeat < 3, endless):
            passes[sample.repeat][sample.sample_hash] += 1
    assert all(found == expected for found in passes.values())


def test_order_follows_from_the_seed_and_changes_with_the_pass(shard_folder: Path) -> None:
    sources = open_sources(str(shard_folder), PATIENCE)

    def order(num: int = 3 * NUM_PICTURES, **options: Any) -> list[int]:
        endless = reader(sources, **options).samples()
        return [sample.sample_hash for sample in itertools.islice(endless, num)]

    plain = order()
    assert order() == plain
    passes = [plain[i : i + NUM_PICTURES] for i in range(0, len(plain), NUM_PICTURES)]
    assert len({tuple(keys) for keys in passes}) == 3
    assert len({tuple(sorted(keys)) for keys in passes}) == 1
    assert order(seed=(3, 1, 0)) != plain
    assert order(seed=(4, 0, 0)) != plain


def test_weights_are_shares_of_the_samples(tmp_path: Path) -> None:
    names = {}
    for name, num, weight in (("a", 5, 3.0), ("b", 50, 1.0)):
        files = {f"{name}{i}.jpg": b"x" for i in range(num)}
        names[write_tar(tmp_path / f"{name}.tar", files)] = weight
    sources = open_sources(names, PATIENCE)
    own = [sample_hash(f"a{i}") for i in range(5)]
    drawn = [sample.sample_hash for sample in itertools.islice(reader(sources).samples(), 2000)]
    share = sum(key in own for key in drawn) / len(drawn)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    again = [sample.sample_hash for sample in itertools.islice(reader(sources).samples(), 2000)]
    assert drawn == again


def test_sets_in_a_list_are_read_as_one_with_the_exact_loaders_keys(shard_folder, tmp_path):
    files = {f"{i}.{suffix}": data for i in range(3)
             for suffix, data in (("jpg", picture(i)), ("cls", b"1"))}  # fmt: skip
    more = tmp_path / "more"
    more.mkdir()
    write_tar(more / "a.tar", files)
    names = [str(shard_folder), str(more)]
    found = in_pass(reader(open_sources(names, PATIENCE)).samples(), 0)
    expected = open_samples(names).samples[np.arange(NUM_PICTURES + 3)]["key"]
    assert sorted(sample.sample_hash for sample in found) == sorted(expected.tolist())


@pytest.mark.parametrize("with_colours", [False, True])
def test_batches_hold_what_the_exact_loader_would_make(index, with_colours):
    streaming = loader(str(index.folder), shuffle_buffer=1, with_colours=with_colours)
    batches = list(streaming.epoch(0))
    assert len(batches) == streaming.num_steps == NUM_PICTURES // 8
    exact = ViewDataset(index, image_size=SIZE, views=VIEWS, seed=3, with_colours=with_colours)
    places = {int(key): i for i, key in enumerate(index.samples["key"])}
    assert len(set(keys_of(batches))) == NUM_PICTURES
    for batch in batches:
        assert batch.views.shape == (2, 8, 3, SIZE, SIZE)
        assert batch.views[0].is_contiguous(memory_format=torch.channels_last)
        ids = np.array([places[key] for key in keys_of([batch])])
        expected = exact[OrderedSamples(ids, batch.repeats.numpy())].batch
        np.testing.assert_array_equal(batch.views, expected.views)
        np.testing.assert_array_equal(batch.labels, index.labels[ids])
        assert batch.sample_ids.tolist() == [key % 2**63 for key in keys_of([batch])]
        assert batch.sample_hashes.dtype == batch.labels.dtype == batch.repeats.dtype == torch.int64
        assert batch.num_bad == 0
        assert batch.is_augmented == with_colours


def test_sample_that_comes_again_is_cropped_in_another_way(tmp_path: Path) -> None:
    spec = write_tar(tmp_path / "a.tar", {"a.jpg": picture(1), "b.jpg": picture(2)})
    streaming = loader(spec, batch_size=2, samples_per_epoch=6)
    batches = [*streaming.epoch(0), *streaming.epoch(1), *streaming.epoch(1, 1)]
    assert len(batches) == 3 + 3 + 2
    pairs = [
        (k, v)
        for b in batches
        for k, v in zip(b.sample_hashes.tolist(), b.repeats.tolist(), strict=True)
    ]
    views = {b.views[:, i].numpy().tobytes() for b in batches for i in range(2)}
    assert len(set(pairs)) == len(pairs) == len(views) == 16


def test_epochs_are_reproducible_and_resume_with_the_right_number(shard_folder: Path) -> None:
    streaming = loader(str(shard_folder))
    first = list(streaming.epoch(2))
    assert same(first, list(streaming.epoch(2)))
    assert same(first, list(loader(str(shard_folder)).epoch(2)))
    assert not same(first, list(streaming.epoch(3)))
    assert not same(first, list(loader(str(shard_folder), seed=4).epoch(2)))
    assert len(list(streaming.epoch(2, 3))) == 2
    assert list(streaming.epoch(2, 5)) == []


@pytest.mark.slow
def test_workers_of_two_ranks(shard_folder: Path) -> None:
    options = {"num_workers": 2, "world_size": 2, "shuffle_buffer": 1}  # a shard for each reader
    ranks = [loader(str(shard_folder), rank=rank, **options) for rank in range(2)]
    for epoch in range(2):
        found = [list(rank.epoch(epoch)) for rank in ranks]
        assert [len(batches) for batches in found] == [5, 5]
        assert all(batch.views.shape[1] == 4 for batches in found for batch in batches)
        full = [keys_of(batches[:4]) for batches in found]  # two batches of each worker
        assert len({*full[0], *full[1]}) == 32
        again = [list(loader(str(shard_folder), rank=i, **options).epoch(epoch)) for i in range(2)]
        assert all(map(same, found, again))
    next(iter(ranks[0].epoch(5)))  # an epoch that is left early
    assert same(found[0], list(ranks[0].epoch(1)))


def test_server_and_command_give_the_same_as_the_disk(shard_folder: Path) -> None:
    expected = list(loader(f"{shard_folder}/shard-{{000000..000003}}.tar").epoch(0))
    with faulty(shard_folder) as server:
        for folder in (f"{server.url}/", f"pipe:cat {shlex.quote(str(shard_folder))}/"):
            batches = list(loader(folder + "shard-{000000..000003}.tar").epoch(0))
            assert same(expected, batches)
        assert same(expected, list(loader(server.url).epoch(0)))  # a folder, by its index.json


def test_left_streams_are_closed(shard_folder: Path) -> None:
    streaming = loader(f"pipe:cat {shard_folder}/shard-{{000000..000003}}.tar")
    next(iter(streaming.epoch(0)))
    del streaming
    wait_until_none_streams()


@pytest.fixture
def bad_tar(tmp_path: Path) -> str:
    """Ten good samples and three bad ones: broken, without a picture, without a suffix."""
    files = {f"good-{i}.jpg": picture(i) for i in range(5)}
    files |= {"broken.jpg": picture(5)[:200], "none.cls": b"3", "README": b"text"}
    files |= {f"good-{i}.jpg": picture(i) for i in range(5, 10)}
    files |= {"__meta__": b"{}", "good-9.cls": b"no number"}
    return write_tar(tmp_path / "a.tar", files)


def test_bad_samples_are_replaced_and_counted(bad_tar: str) -> None:
    streaming = loader(bad_tar, max_bad_samples=3, batch_size=10, samples_per_epoch=10)
    (batch,) = streaming.epoch(0)
    good = {sample_hash(f"good-{i}") for i in range(10)}
    assert set(keys_of([batch])) <= good
    everything = list(loader(bad_tar, max_bad_samples=3, samples_per_epoch=80).epoch(0))
    assert set(keys_of(everything)) == good
    assert sum(batch.num_bad for batch in everything) >= 3 * 6
    more = loader(bad_tar, max_bad_samples=3, samples_per_epoch=80)
    list(more.epoch(0))
    reasons = sorted(more.bad_samples.values())
    assert [reason.partition(f" in {bad_tar}")[0] for reason in reasons] == [
        "'README'", "'none'", "sample 'broken'",
    ]  # fmt: skip
    assert [reason.count("holds no picture") for reason in reasons] == [1, 1, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_bad_samples_than_allowed_stop_the_run(bad_tar: str, num_workers: int) -> None:
    streaming = loader(bad_tar, max_bad_samples=2, samples_per_epoch=80, num_workers=num_workers)
    message = refusal(streaming.epoch(0))
    assert f" in {bad_tar}" in message
    assert "3 bad samples, allowed are 2" in message
    assert "raise data.max_bad_samples" in message


def test_missing_and_truncated_on_a_server(shard_folder: Path) -> None:
    tar = shard_folder / "shard-000001.tar"
    spec = "shard-{000000..000003}.tar"
    with faulty(shard_folder) as server:
        tar.write_bytes(tar.read_bytes()[:5000])
        message = refusal(loader(f"{server.url}/{spec}", num_workers=1).epoch(0))
        assert f"{server.url}/shard-000001.tar: the tar is cut short" in message
        tar.unlink()
        message = refusal(loader(str(shard_folder), num_workers=2).epoch(0))
        assert message.startswith(f"{tar}: cannot be opened (No such file or directory); check the")
        message = refusal(loader(f"{server.url}/{spec}", num_workers=1).epoch(0))
        assert f"{server.url}/shard-000001.tar: there is no such file (HTTP 404)" in message
        assert "Traceback" not in message


def test_shard_without_files_and_file_that_comes_twice(tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "empty.tar", {})
    assert f"{empty}: holds no files" in refusal(loader(empty).epoch(0))
    with tarfile.open(twice := tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("a.jpg")
            info.size = len(picture(1))
            tar.addfile(info, io.BytesIO(picture(1)))
    message = refusal(loader(str(twice)).epoch(0))
    assert "a file of sample 'a' comes twice" in message
    assert str(twice) in message


def test_reading_ahead_is_bounded_and_ends_when_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_STREAM_BYTES", 10_000)
    log = tmp_path / "log"
    command = f"head -c 3000000 /dev/zero | tee {shlex.quote(str(log))}"
    stream = RemoteStream(f"pipe:{command}", PATIENCE)
    assert stream.read(100) == bytes(100)
    size = -1
    while size != (size := log.stat().st_size):
        time.sleep(0.2)
    assert 0 < size < 400_000  # parts of 10 kB here, two pipes of 64 kB, what tee and head hold
    stream.close()
    wait_until_none_streams()
