"""The ring buffer against a plain deque."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.support_queue import SupportQueue


def unit_rows(n, d, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x * (1 + seed % 5)


def contents(queue):
    """Valid entries, oldest first."""
    count, position = int(queue.count), int(queue.position)
    if count < queue.size:
        return queue.features[:count]
    return torch.cat([queue.features[position:], queue.features[:position]])


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 13),
    batches=st.lists(st.integers(0, 31), max_size=8),
    seed=st.integers(0, 1000),
)
def test_equals_a_deque_for_any_size_and_batches(size, batches, seed):
    queue, model = SupportQueue(size, 3), deque(maxlen=size)
    for number, n in enumerate(batches):
        rows = unit_rows(n, 3, seed + number)
        queue.put(rows)
        model.extend(rows / rows.norm(dim=1, keepdim=True))
        assert int(queue.count) == len(model)
        if model:
            torch.testing.assert_close(contents(queue), torch.stack(list(model)))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 20),
    batches=st.lists(st.integers(1, 15), min_size=1, max_size=5),
    data=st.data(),
)
def test_nearest_are_those_of_the_deque(size, batches, data):
    queue, model = SupportQueue(size, 4), deque(maxlen=size)
    for number, n in enumerate(batches):
        rows = unit_rows(n, 4, 100 + number)
        queue.put(rows)
        model.extend(rows / rows.norm(dim=1, keepdim=True))
    k = data.draw(st.integers(1, len(model)))
    z = unit_rows(6, 4, 7)
    entries = torch.stack(list(model))
    similarity = (z / z.norm(dim=1, keepdim=True)) @ entries.T
    expected = entries[similarity.sort(dim=1, descending=True).indices[:, :k]]
    torch.testing.assert_close(queue.nearest(z, k), expected)


def test_of_more_rows_than_entries_the_last_stay():
    queue = SupportQueue(4, 2)
    rows = unit_rows(11, 2, 0)
    queue.put(rows)
    expected = (rows / rows.norm(dim=1, keepdim=True))[-4:]
    torch.testing.assert_close(contents(queue), expected)
    assert int(queue.count) == 4


def test_starts_empty_and_searches_only_what_was_put_in():
    queue = SupportQueue(5, 2)
    assert int(queue.count) == 0
    with pytest.raises(ValueError, match=r"asked for the 1 nearest of 0 valid entries"):
        queue.nearest(torch.ones(1, 2), 1)
    queue.put(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"asked for the 3 nearest of 2 valid entries"):
        queue.nearest_indices(torch.ones(1, 2), 3)


@pytest.mark.parametrize("size", [0, -3])
def test_no_entries_are_refused(size):
    with pytest.raises(ValueError, match=rf"at least one entry, got size={size}"):
        SupportQueue(size, 2)


def test_entries_are_normalised_and_carry_no_gradient():
    queue = SupportQueue(8, 3)
    rows = unit_rows(5, 3, 4).requires_grad_()
    queue.put(rows)
    torch.testing.assert_close(queue.features[:5].norm(dim=1), torch.ones(5))
    assert not queue.features.requires_grad
    assert not queue.nearest(rows, 2).requires_grad


def test_state_dict_round_trip_goes_on_where_it_stopped():
    straight, stopped = SupportQueue(7, 3), SupportQueue(7, 3)
    for seed in range(3):
        straight.put(unit_rows(4, 3, seed))
        stopped.put(unit_rows(4, 3, seed))
    resumed = SupportQueue(7, 3)
    resumed.load_state_dict({k: v.clone() for k, v in stopped.state_dict().items()})
    for queue in (straight, resumed):
        queue.put(unit_rows(5, 3, 9))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    columns = {"features", "sample_ids", "labels", "born"}
    assert set(straight.state_dict()) == columns | {"position", "count", "puts"}


def test_another_size_does_not_load():
    with pytest.raises(RuntimeError, match="size mismatch for features"):
        SupportQueue(7, 3).load_state_dict(SupportQueue(8, 3).state_dict())


def test_half_precision_rows_are_stored_in_single():
    queue = SupportQueue(4, 3)
    queue.put(unit_rows(2, 3, 0).bfloat16())
    assert queue.features.dtype == torch.float32
