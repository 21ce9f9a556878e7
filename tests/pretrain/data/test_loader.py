import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.pictures import decode
from pretrain.data.decode import center_crop
from pretrain.data.index import sample_hash
from pretrain.data.loader import (
    Loader,
    ViewBatch,
    ViewDataset,
    central_crops,
)
from pretrain.data.order import epoch_order
from pretrain.data.policy import Crop, SmallCrops, ViewPolicy
from pretrain.data.shards import Mixture, Samples, ShardIndex, open_samples
from tests.pretrain.data.picture_helpers import (
    NUM_PICTURES,
    encode,
    same,
    smooth_picture,
    write_tar,
)

SIZE = 16


VIEWS = (ViewPolicy(Crop((0.2, 1.0))), ViewPolicy(Crop((0.08, 1.0))))


def dataset(index: Samples, seed: int = 3) -> ViewDataset:
    return ViewDataset(index, image_size=SIZE, views=VIEWS, seed=seed)


def load(index: Samples, **options: Any) -> list[ViewBatch]:
    arguments = {"batch_size": 8, "shuffle_window": 20} | options
    epoch, start_step = arguments.pop("epoch", 0), arguments.pop("start_step", 0)
    return list(Loader(dataset(index), **arguments).epoch(epoch, start_step))


def test_batch_holds_what_it_says(index: ShardIndex) -> None:
    batches = load(index)
    assert len(batches) == NUM_PICTURES // 8
    batch = batches[0]
    assert batch.views.shape == (2, 8, 3, SIZE, SIZE)
    assert batch.views.dtype == torch.uint8
    assert batch.views[0].is_contiguous(memory_format=torch.channels_last)
    for row, sample_id in enumerate(batch.sample_ids.tolist()):
        name = index.key_name(sample_id)
        assert batch.sample_hashes[row].item() % 2**64 == sample_hash(name)
        assert batch.labels[row].item() == int(name[6])
    assert batch.sample_hashes.dtype == batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.num_bad == 0
    assert not torch.equal(batch.views[0], batch.views[1])


def test_workers_change_nothing_over_epochs_and_resume(index: ShardIndex) -> None:
    plain = Loader(dataset(index), batch_size=8, shuffle_window=20)
    parallel = Loader(dataset(index), batch_size=8, shuffle_window=20, num_workers=2)
    for epoch, start_step in [(0, 0), (1, 0), (2, 3), (0, 5)]:
        expected = list(plain.epoch(epoch, start_step))
        assert len(expected) == 5 - start_step
        assert same(expected, list(parallel.epoch(epoch, start_step)))
    next(iter(parallel.epoch(3)))  # an epoch that is left early
    assert same(list(plain.epoch(4, 2)), list(parallel.epoch(4, 2)))


def test_small_crops_follow_from_the_sample_whatever_the_workers_order_or_start(
    index: ShardIndex,
) -> None:
    def make(num_workers: int, num: int = 3, **options: Any) -> Loader:
        """With views that need every picture decoded whole."""
        small = SmallCrops(Crop((0.05, 0.14)), num=num, image_size=24)
        data = ViewDataset(index, image_size=40, views=VIEWS, seed=3, small_crops=small)
        arguments = {"batch_size": 8, "shuffle_window": 20} | options
        return Loader(data, num_workers=num_workers, **arguments)

    plain, parallel = make(0), make(2)
    for epoch, start_step in [(0, 0), (1, 3)]:
        expected = list(plain.epoch(epoch, start_step))
        assert same(expected, list(parallel.epoch(epoch, start_step)))
        assert [batch.small_views.shape for batch in expected] == [(3, 8, 3, 24, 24)] * (
            5 - start_step
        )
    batches = list(plain.epoch(0))
    two_views = list(make(0, num=0).epoch(0))
    assert all(batch.small_views is None for batch in two_views)
    assert same([replace(batch, small_views=None) for batch in batches], two_views)
    # In other batches, of another order, each sample has the same small crops.
    found = {
        int(sample): batch.small_views[:, row]
        for batch in make(0, batch_size=5, shuffle_window=40).epoch(0)
        for row, sample in enumerate(batch.sample_ids)
    }
    for batch in batches:
        for row, sample in enumerate(batch.sample_ids.tolist()):
            assert torch.equal(batch.small_views[:, row], found[sample])
    views = batches[0].small_views
    assert batches[0].to("meta").small_views.device.type == "meta"
    assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_opencv_s_threads_end_before_workers_are_forked(index: ShardIndex) -> None:
    """A worker that inherits their locks, but not the threads, can wait for ever."""
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 0)  # starts them
        num_threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
        loader = Loader(dataset(index), batch_size=8, shuffle_window=20, num_workers=1)
        assert cv2.getNumThreads() == 1
        if num_threads:
            assert len(os.listdir("/proc/self/task")) < num_threads
        assert len(list(loader.epoch(0))) == loader.num_steps
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("at_start", [True, False])
def test_workers_serve_on_when_a_cluster_signals_them(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, at_start: bool
) -> None:
    """SLURM sends SIGTERM to all processes; the parent needs batches until it has saved."""

    def send(worker: multiprocessing.Process) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)

    if at_start:  # before a worker has run a line
        start = multiprocessing.Process.start
        both = lambda worker: (start(worker), send(worker))  # noqa: E731
        monkeypatch.setattr(multiprocessing.Process, "start", both)
    loader = Loader(dataset(index), batch_size=8, shuffle_window=20, num_workers=2)
    expected = load(index, batch_size=8, shuffle_window=20)
    others = multiprocessing.active_children()  # another test's, about to end
    batches = loader.epoch(0)
    found = [next(batches)]
    workers = set(multiprocessing.active_children()) - set(others)
    assert len(workers) == 2
    if not at_start:
        for worker in workers:
            send(worker)
    found += list(batches)
    assert same(found, expected)
    assert all(worker.is_alive() for worker in workers)
    del batches, loader
    gc.collect()
    assert not workers & set(multiprocessing.active_children())  # they end with the loader


LEFT_EARLY = """
import sys
from pretrain.data.shards import ShardIndex
from pretrain.data.loader import Loader, ViewDataset
from pretrain.data.policy import AugmentationPolicy

index = ShardIndex.open(sys.argv[1])
views = AugmentationPolicy.of("crops").views
dataset = ViewDataset(index, image_size=16, views=views, seed=3)
loader = Loader(dataset, batch_size=8, num_workers=2)
batches = loader.epoch(0)
next(batches)
raise KeyError  # the traceback keeps the batches: nobody closes the loader
"""


@pytest.mark.slow
def test_process_that_fails_in_an_epoch_ends_at_once_with_its_workers(shard_folder: Path) -> None:
    command = [sys.executable, "-c", LEFT_EARLY, str(shard_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "KeyError" in done.stderr


def test_last_batch_padded_shows_every_sample(index: ShardIndex) -> None:
    batches = load(index, batch_size=12, last_batch="pad")
    assert len(batches) == 4
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert torch.equal(ids[40:], ids[:8])
    assert sorted(ids[:40].tolist()) == list(range(40))
    views = torch.cat([batch.views for batch in batches], dim=1)
    assert not any(torch.equal(views[:, 40 + i], views[:, i]) for i in range(8))
    dropped = load(index, batch_size=12)
    assert len(dropped) == 3
    assert same(dropped, batches[:3])


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    """12 samples without labels, some of them named as those of `index`."""
    folder = tmp_path / "other"
    folder.mkdir()
    pictures = {i: encode(smooth_picture(100 + i, 30, 40)) for i in range(12)}
    files = {f"class-0/picture-{2 * i:03d}.jpg": data for i, data in pictures.items()}
    write_tar(folder / "b.tar", files)
    return folder


def test_mixture_reads_what_its_sets_hold(shard_folder: Path, other_folder: Path) -> None:
    mixed = open_samples({str(shard_folder): 1, str(other_folder): 2.5})
    assert isinstance(mixed, Mixture)
    first, second = ShardIndex.open(shard_folder), ShardIndex.open(other_folder)
    assert mixed.num_samples == 52
    for i, (source, own) in {0: (first, 0), 39: (first, 39), 40: (second, 0)}.items():
        assert mixed.read_bytes(i) == source.read_bytes(own)
        assert mixed.key_name(i) == source.key_name(own)
        assert source.folder.name in mixed.describe(i)
    asked = np.array([50, 3, 41, 3])
    assert mixed.read_many(asked) == [mixed.read_bytes(int(i)) for i in asked]
    assert mixed.classes is None
    assert set(mixed.labels.tolist()) == {-1}  # the sets name their classes differently
    with pytest.raises(IndexError, match="sample 52 of 52"):
        mixed.read_bytes(52)


def test_mixture_keeps_labels_of_equal_classes(shard_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shard_folder, tmp_path / "copy")
    mixed = open_samples([str(shard_folder), str(copy)])
    plain = ShardIndex.open(shard_folder)
    assert (mixed.labels >= 0).all()
    assert mixed.classes == plain.classes
    assert mixed.labels.tolist() == [*plain.labels, *plain.labels]
    twin = mixed.samples[np.array([3, 43])]
    assert twin["label"][0] == twin["label"][1]
    assert twin["key"][0] != twin["key"][1]  # so that the twins are cropped independently


def test_loader_of_a_mixture(shard_folder: Path, other_folder: Path) -> None:
    mixed = open_samples({str(shard_folder): 1, str(other_folder): 2.5})
    batches = load(mixed, batch_size=10)
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert len(ids) == 70
    counts = torch.bincount(ids, minlength=52)
    assert counts[:40].tolist() == [1] * 40
    assert sorted(counts[40:].tolist()) == [2] * 6 + [3] * 6
    assert same(batches, load(mixed, batch_size=10, num_workers=2))
    assert same(batches[3:], load(mixed, batch_size=10, start_step=3))
    views = torch.cat([batch.views for batch in batches], dim=1)
    first, second = (ids == ids[ids >= 40][0]).nonzero()[:2, 0].tolist()
    assert not torch.equal(views[:, first], views[:, second])  # another repeat, another crop


def test_fingerprint_knows_samples_and_weights(shard_folder: Path, other_folder: Path) -> None:
    one, two = str(shard_folder), str(other_folder)
    specs = [one, two, [one, two], [two, one], {one: 1, two: 2}]
    prints = [open_samples(spec).fingerprint for spec in specs]
    assert len(set(prints)) == len(prints)
    assert open_samples({one: 1.0, two: 1.0}).fingerprint == prints[2]
    assert isinstance(open_samples({one: 1}), ShardIndex)
    assert open_samples([one]).fingerprint == prints[0]


@pytest.fixture
def shards_with_bad(tmp_path: Path) -> ShardIndex:
    """24 samples of which 5 and 11 do not decode."""
    files = {f"sample{i:02d}.jpg": encode(smooth_picture(i)) for i in range(24)}
    for name in ("sample05.jpg", "sample11.jpg"):
        files[name] = files[name][: len(files[name]) // 2]
    write_tar(tmp_path / "a.tar", files)
    return ShardIndex.open(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_first_bad_sample_stops_the_run(shards_with_bad: ShardIndex, num_workers: int) -> None:
    with pytest.raises(UserError) as error:
        load(shards_with_bad, num_workers=num_workers)
    text = str(error.value)
    del error  # its frames hold the loader; garbage collection would end the workers late
    assert "Traceback" not in text
    assert "'sample05'" in text or "'sample11'" in text
    assert "a.tar at byte" in text
    assert "does not decode" in text
    assert "raise data.max_bad_samples" in text


def test_bad_samples_are_replaced_and_counted(shards_with_bad: ShardIndex) -> None:
    plain = load(shards_with_bad, max_bad_samples=2)
    assert sum(batch.num_bad for batch in plain) == 2
    order = epoch_order([24], seed=3, epoch=0, window=20)
    ids = torch.cat([batch.sample_ids for batch in plain]).numpy()
    assert set(order[ids != order]) == {5, 11}
    assert not {5, 11} & set(ids.tolist())
    assert same(plain, load(shards_with_bad, max_bad_samples=2, num_workers=2))
    ranks = [load(shards_with_bad, max_bad_samples=2, rank=r, world_size=4) for r in range(4)]
    for step, batch in enumerate(plain):
        assert torch.equal(torch.cat([rank[step].views for rank in ranks], 1), batch.views)
    assert same(plain[2:], load(shards_with_bad, max_bad_samples=2, start_step=2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_lost_while_running(shard_folder: Path, index: ShardIndex, num_workers: int) -> None:
    (shard_folder / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000000.tar .*cannot be read \(No such file"):
        load(index, num_workers=num_workers, max_bad_samples=100)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_central_crops_of_all_in_order(index: ShardIndex, num_workers: int) -> None:
    batches = list(central_crops(index, 24, 16, num_workers))
    assert [batch.views.shape[:2] for batch in batches] == [(1, 16), (1, 16), (1, 8)]
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(40))
    assert torch.cat([batch.labels for batch in batches]).tolist() == index.labels.tolist()
    expected = center_crop(decode(index.read_bytes(20), where=""), 24)
    np.testing.assert_array_equal(batches[1].views[0, 4].permute(1, 2, 0).numpy(), expected)
