import itertools

import numpy as np
import pytest
import torch

from common.pictures import decode
from pretrain.data import loader as samples
from pretrain.data.decode import crop, draw_crops
from pretrain.data.loader import Loader, ViewBatch, ViewDataset
from pretrain.data.order import OrderedSamples
from pretrain.data.policy import AugmentationPolicy, draw_parameters
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import NUM_PICTURES

SIZE = 24
VIEWS = AugmentationPolicy.of("asymmetric").views


def dataset(index: ShardIndex, *, in_workers: bool, size: int = SIZE) -> ViewDataset:
    return ViewDataset(index, image_size=size, views=VIEWS, seed=3, with_colours=in_workers)


def batch_of(data: ViewDataset, ids: np.ndarray, repeats: np.ndarray) -> ViewBatch:
    reply = data[OrderedSamples(ids, repeats)]
    assert reply.error is None
    assert reply.batch is not None
    return reply.batch


IDS = np.random.default_rng(0).permutation(NUM_PICTURES)
REPEATS = np.arange(NUM_PICTURES) % 3


def test_workers_make_the_changes_that_the_device_would_draw(index: ShardIndex) -> None:
    plain = batch_of(dataset(index, in_workers=False), IDS, REPEATS)
    done = batch_of(dataset(index, in_workers=True), IDS, REPEATS)
    assert not plain.is_augmented
    assert done.is_augmented
    assert done.to("cpu").is_augmented
    num_changed = 0
    for number, view in enumerate(VIEWS):
        hashes = plain.sample_hashes.numpy()
        drawn = draw_parameters(view, hashes, REPEATS, seed=3, view_index=number)
        steps = [operation.picture_steps(own, SIZE) for operation, own in drawn]
        for row in range(NUM_PICTURES):
            image = np.ascontiguousarray(plain.views[number, row].permute(1, 2, 0).numpy())
            before = image.copy()
            for step in itertools.chain(*(own[row] for own in steps)):
                step(image)
            np.testing.assert_array_equal(image, done.views[number, row].permute(1, 2, 0).numpy())
            num_changed += not np.array_equal(before, image)
    assert num_changed > NUM_PICTURES


def test_a_sample_does_not_know_its_batch(index, monkeypatch):
    whole = batch_of(dataset(index, in_workers=True), IDS, REPEATS)
    for row in (0, 7, 39):
        alone = batch_of(
            dataset(index, in_workers=True), IDS[row : row + 1], REPEATS[row : row + 1]
        )
        assert torch.equal(alone.views[:, 0], whole.views[:, row])
    monkeypatch.setattr(samples, "_CHUNK", 7)
    assert torch.equal(batch_of(dataset(index, in_workers=True), IDS, REPEATS).views, whole.views)


@pytest.mark.parametrize("size", [8, 16])
def test_views_of_reduced_pictures_show_the_same(index: ShardIndex, size: int) -> None:
    """Small views are cut from pictures decoded smaller: nearly those cut from whole ones."""
    batch = batch_of(dataset(index, in_workers=False, size=size), IDS, REPEATS)
    whole = [decode(index.read_bytes(int(i)), where="") for i in IDS]
    shapes = np.array([image.shape[:2] for image in whole])
    num_reduced, differences = 0, []
    for number, view in enumerate(VIEWS):
        hashes = batch.sample_hashes.numpy()
        drawn = draw_crops(view, shapes, hashes, REPEATS, seed=3, view_index=number)
        num_reduced += int((drawn.boxes[:, 2:].min(axis=1) >= 2 * (size + 1)).sum())
        for row, box in enumerate(drawn.boxes.tolist()):
            expected = crop(whole[row], tuple(box), size, is_flipped=bool(drawn.flips[row]))
            got = batch.views[number, row].permute(1, 2, 0).numpy().astype(int)
            mirrored = np.abs(got - expected[:, ::-1])
            assert np.abs(got - expected).mean() < mirrored.mean() / 2
            differences.append(np.abs(got - expected).mean())
    assert np.mean(differences) < 7  # half a reduced pixel of rounding is much at this size
    assert num_reduced > 0 or size == 16


@pytest.mark.parametrize("in_workers", [False, True])
def test_worker_processes_hand_over_shared_memory(index: ShardIndex, in_workers: bool) -> None:
    data = dataset(index, in_workers=in_workers)
    here = list(Loader(data, batch_size=8).epoch(2))
    there = list(Loader(data, batch_size=8, num_workers=2).epoch(2))
    assert len(here) == len(there) == NUM_PICTURES // 8
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.views, other.views)
        assert one.is_augmented == other.is_augmented == in_workers
        assert other.views.is_shared()
        assert other.views[0].is_contiguous(memory_format=torch.channels_last)
