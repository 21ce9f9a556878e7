import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import (
    counter_rng,
    epoch_order,
    global_batch,
    num_steps_per_epoch,
    rank_slice,
    stable_hash,
)
from pretrain.errors import UserError
from tests.pretrain.data.picture_helpers import seeded

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def test_generator_depends_on_its_parts_alone() -> None:
    first = counter_rng("crop", 0, 3, 2**64 - 1, 1).random(5)
    np.random.default_rng().random(7)
    np.testing.assert_array_equal(first, counter_rng("crop", 0, 3, 2**64 - 1, 1).random(5))
    for other in [
        ("crop", 0, 3, 2**64 - 1, 0),
        ("crop", 1, 3, 2**64 - 1, 1),
        ("order", 0, 3, 7, 1),
    ]:
        assert not np.array_equal(first, counter_rng(*other).random(5))


def test_generator_keeps_its_values_from_version_to_version() -> None:
    assert stable_hash("order", 1, 2).hex() == "88a4a6cb4cb599d07316e91da6da797e"
    assert counter_rng("order", 1, 2).integers(0, 10**6, 3).tolist() == [895967, 223312, 452357]


@pytest.mark.parametrize(
    ("one", "other"), [(("ab", "c"), ("a", "bc")), ((1,), ("1",)), ((1, 23), (12, 3)), ((), ("",))]
)
def test_encoding_of_parts_is_unambiguous(one: tuple, other: tuple) -> None:
    assert stable_hash(*one) != stable_hash(*other)


def test_other_kinds_of_parts_are_refused() -> None:
    with pytest.raises(TypeError, match="must be int or str, got float"):
        stable_hash(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bool"):
        stable_hash(True)


@seeded
@given(shard_sizes, st.integers(0, 5), st.integers(0, 5), st.integers(1, 200))
def test_each_sample_once_and_repeatable(
    sizes: list[int], seed: int, epoch: int, window: int
) -> None:
    order = epoch_order(sizes, seed=seed, epoch=epoch, window=window)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    again = epoch_order(sizes, seed=seed, epoch=epoch, window=window)
    np.testing.assert_array_equal(order, again)


@seeded
@given(
    shard_sizes.filter(lambda sizes: sum(sizes) >= 12),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.data(),
)
def test_ranks_and_resume_see_the_same_batches(
    sizes: list[int], world_size: int, other_world_size: int, data: st.DataObject
) -> None:
    order = epoch_order(sizes, seed=1, epoch=2, window=16)
    num_steps = num_steps_per_epoch(len(order), 12)
    stop = data.draw(st.integers(0, num_steps))
    seen = []
    for step in range(num_steps):  # the run goes on at `stop` with another number of ranks
        size = world_size if step < stop else other_world_size
        batch = global_batch(order, step, 12)
        seen += [rank_slice(batch, rank, size) for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate(seen), order[: num_steps * 12])


def test_epochs_and_seeds_differ() -> None:
    orders = [
        epoch_order([50, 50], seed=seed, epoch=epoch, window=1000).tolist()
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert len({tuple(order) for order in orders}) == 3


@settings(seeded, max_examples=20)
@given(st.integers(0, 1000))
def test_window_keeps_reads_local(seed: int) -> None:
    order = epoch_order([10] * 30, seed=seed, epoch=0, window=20)
    shards_per_window = [len(set(order[i : i + 20] // 10)) for i in range(0, 300, 20)]
    assert shards_per_window == [2] * 15


def test_window_of_one_shuffles_shards_only() -> None:
    order = epoch_order([5, 7, 9], seed=3, epoch=0, window=1)
    pieces = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
    assert sorted(len(piece) for piece in pieces) in ([5, 7, 9], [5, 16], [9, 12], [21])
    assert any(
        epoch_order([5, 7, 9], seed=3, epoch=epoch, window=1)[0] != order[0]
        for epoch in range(1, 9)
    )


def test_every_sample_takes_every_place_equally_often() -> None:
    num_epochs = 3000
    counts = np.zeros((8, 8))
    for epoch in range(num_epochs):
        counts[np.arange(8), epoch_order([4, 4], seed=0, epoch=epoch, window=8)] += 1
    chi_square = ((counts - num_epochs / 8) ** 2 / (num_epochs / 8)).sum()
    assert (
        chi_square < 94
    )  # 99.9 % quantile of chi-square with 49 degrees of freedom: 85.4; some room


def test_remainder_is_dropped() -> None:
    assert num_steps_per_epoch(10, 3) == 3
    assert global_batch(np.arange(10), 2, 3).tolist() == [6, 7, 8]
    with pytest.raises(IndexError, match="batch 3 of an epoch with 3 batches"):
        global_batch(np.arange(10), 3, 3)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="5 samples do not fill one batch of 8: set a batch size"):
        num_steps_per_epoch(5, 8)
    with pytest.raises(UserError, match="batch size 0"):
        num_steps_per_epoch(5, 0)
    with pytest.raises(UserError, match="shuffle window 0"):
        epoch_order([3], seed=0, epoch=0, window=0)
    with pytest.raises(UserError, match="multiple of 3"):
        rank_slice(np.arange(8), 0, 3)
