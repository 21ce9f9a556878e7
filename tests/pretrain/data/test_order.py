import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pretrain.data.order import (
    OrderedSamples,
    SourceSizes,
    epoch_order,
    epoch_samples,
    global_batch,
    num_steps_per_epoch,
    rank_slice,
)
from tests.pretrain.data.picture_helpers import seeded

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@seeded
@given(shard_sizes, st.integers(0, 5), st.integers(0, 5), st.integers(1, 200))
def test_each_sample_once_and_repeatable(sizes, seed, epoch, window):
    order = epoch_order(sizes, seed=seed, epoch=epoch, window=window)
    assert order.dtype == np.int32  # a set's largest array
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    again = epoch_order(sizes, seed=seed, epoch=epoch, window=window)
    np.testing.assert_array_equal(order, again)


def as_epoch(order: np.ndarray) -> OrderedSamples:
    return OrderedSamples(order, np.full(len(order), 3))


@seeded
@given(
    st.lists(st.tuples(shard_sizes, st.sampled_from([1.0, 0.5, 1.7, 3.0])), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from(["drop", "pad"]),
    st.data(),
)
def test_ranks_and_resume_see_the_same_batches(
    parts: list, world_size: int, other_world_size: int, last_batch, data: st.DataObject
) -> None:
    sources = [SourceSizes(sizes, weight) for sizes, weight in parts]
    sources.append(SourceSizes([12]))  # so that there is one batch at least
    whole = epoch_samples(sources, seed=1, epoch=2, window=16)
    num_steps = num_steps_per_epoch(len(whole), 12, last_batch)
    stop = data.draw(st.integers(0, num_steps))
    seen = []
    for step in range(num_steps):  # the run goes on at `stop` with another number of ranks
        size = world_size if step < stop else other_world_size
        again = epoch_samples(sources, seed=1, epoch=2, window=16)
        batch = global_batch(again, step, 12)
        seen += [rank_slice(batch, rank, size) for rank in range(size)]
    ids = np.concatenate([part.sample_ids for part in seen])
    repeats = np.concatenate([part.repeats for part in seen])
    num_whole = min(len(whole), len(ids))
    np.testing.assert_array_equal(ids[:num_whole], whole.sample_ids[:num_whole])
    np.testing.assert_array_equal(repeats[:num_whole], whole.repeats[:num_whole])
    assert len(ids) - len(whole) in range(12) if last_batch == "pad" else len(ids) <= len(whole)
    np.testing.assert_array_equal(ids[num_whole:], whole.sample_ids[: len(ids) - num_whole])
    assert len(set(zip(ids.tolist(), repeats.tolist(), strict=True))) == len(ids)  # no view twice


def brute_force_counts(sizes: list[int], weight: float, num_epochs: int) -> np.ndarray:
    """How often each sample of a source was due, from the definition: an endless row of cycles."""
    row = np.concatenate([np.arange(sum(sizes)) for _ in range(int(weight * num_epochs) + 2)])
    return np.bincount(row[: round(weight * sum(sizes)) * num_epochs], minlength=sum(sizes))


@seeded
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.sampled_from([1.0, 2.0, 0.5, 0.3, 2.7]),
    st.integers(1, 5),
    st.integers(1, 60),
)
def test_weights_say_how_often_each_sample_comes(one, other, weight, num_epochs, window):
    sources = [SourceSizes(one), SourceSizes(other, weight)]
    epochs = [
        epoch_samples(sources, seed=4, epoch=epoch, window=window) for epoch in range(num_epochs)
    ]
    ids = np.concatenate([epoch.sample_ids for epoch in epochs])
    counts = np.bincount(ids, minlength=sum(one) + sum(other))
    assert (counts[: sum(one)] == num_epochs).all()
    expected = brute_force_counts(other, weight, num_epochs)
    assert counts[sum(one) :].sum() == expected.sum()
    assert counts[sum(one) :].max() - counts[sum(one) :].min() <= 1
    assert sorted(counts[sum(one) :]) == sorted(expected)
    repeats = np.concatenate([epoch.repeats for epoch in epochs])
    for sample in np.unique(ids):  # repeats count up: 0, 1, 2, ..
        assert repeats[ids == sample].tolist() == list(range(counts[sample]))


def test_sources_of_equal_sizes_are_shuffled_differently() -> None:
    epoch = epoch_samples([SourceSizes([40]), SourceSizes([40])], seed=7, epoch=2, window=80)
    first = epoch.sample_ids[epoch.sample_ids < 40]
    second = epoch.sample_ids[epoch.sample_ids >= 40] - 40
    assert first.tolist() != second.tolist()


@settings(seeded, max_examples=20)
@given(st.integers(0, 1000))
def test_window_keeps_reads_local(seed: int) -> None:
    order = epoch_order([10] * 30, seed=seed, epoch=0, window=20)
    shards_per_window = [len(set(order[i : i + 20] // 10)) for i in range(0, 300, 20)]
    assert shards_per_window == [2] * 15


def test_remainder_is_dropped_or_padded() -> None:
    epoch = as_epoch(np.arange(10))
    assert num_steps_per_epoch(10, 3) == 3
    assert global_batch(epoch, 2, 3).sample_ids.tolist() == [6, 7, 8]
    narrow = global_batch(as_epoch(np.arange(10, dtype=np.int32)), 2, 3)
    assert narrow.sample_ids.dtype == narrow.repeats.dtype == np.int64
    assert num_steps_per_epoch(10, 3, "pad") == 4
    assert num_steps_per_epoch(9, 3, "pad") == 3
    padded = global_batch(epoch, 3, 3)
    assert padded.sample_ids.tolist() == [9, 0, 1]
    assert padded.repeats.tolist() == [3, -4, -4]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="5 samples do not fill one batch of 8"):
        num_steps_per_epoch(5, 8)
    with pytest.raises(UserError, match="multiple of 3"):
        rank_slice(as_epoch(np.arange(8)), 0, 3)
