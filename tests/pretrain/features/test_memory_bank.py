"""The ring buffer against a plain deque; what it reports."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.features.memory_bank import SupportQueue


def unit_rows(n, d, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x * (1 + seed % 5)


def in_order(queue, column):
    """Values of the valid entries, oldest first."""
    count = int(queue.count)
    return torch.roll(column[:count], -int(queue.position) if count == queue.size else 0, dims=0)


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 13),
    batches=st.lists(st.tuples(st.integers(0, 31), st.booleans(), st.booleans()), max_size=8),
    data=st.data(),
)
def test_equals_a_deque_for_any_size_and_batches(size, batches, data):
    """Features of unit length with ids, labels and the put they came with; then a search."""
    queue, model, row = SupportQueue(size, 4), deque(maxlen=size), 0
    for put, (n, has_ids, has_labels) in enumerate(batches, start=1):
        rows, numbers = unit_rows(n, 4, put).requires_grad_(), torch.arange(row, row + n)
        ids = 100 + numbers if has_ids else None
        queue.put(rows, ids, (numbers % 3).int() if has_labels else None)
        unit = rows.detach() / rows.detach().norm(dim=1, keepdim=True)
        model.extend(
            (feature, 100 + r if has_ids else -1, r % 3 if has_labels else -1, put)
            for r, feature in zip(numbers.tolist(), unit, strict=True)
        )
        row += n
    assert int(queue.count) == queue.num_entries == len(model)
    assert int(queue.puts) == len(batches)
    columns = (queue.sample_ids, queue.labels, queue.born)
    notes = zip(*(in_order(queue, column).tolist() for column in columns), strict=True)
    assert list(notes) == [entry[1:] for entry in model]
    assert set(queue.sample_ids[len(model) :].tolist()) <= {-1}
    if not model:
        return
    entries = torch.stack([entry[0] for entry in model])
    torch.testing.assert_close(in_order(queue, queue.features), entries)
    k = data.draw(st.integers(1, len(model)))
    z = unit_rows(6, 4, 7)
    similarity = (z / z.norm(dim=1, keepdim=True)) @ entries.T
    expected = entries[similarity.sort(dim=1, descending=True).indices[:, :k]]
    torch.testing.assert_close(queue.features[queue.nearest_indices(z, k)], expected)
    assert not queue.features.requires_grad


def test_only_what_was_put_in_is_searched():
    queue = SupportQueue(5, 2)
    with pytest.raises(ValueError, match=r"asked for the 1 nearest of 0 valid entries"):
        queue.nearest_indices(torch.ones(1, 2), 1)
    queue.put(-torch.ones(2, 2))  # worse than the zeros of empty slots
    assert queue.nearest_indices(torch.ones(1, 2), 2).sum() == 1
    with pytest.raises(ValueError, match=r"asked for the 3 nearest of 2 valid entries"):
        queue.nearest_indices(torch.ones(1, 2), 3)


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
    assert resumed.num_entries == 7
    columns = {"features", "sample_ids", "labels", "born"}
    assert set(straight.state_dict()) == columns | {"position", "count", "puts"}
    with pytest.raises(RuntimeError, match="size mismatch for features"):
        SupportQueue(8, 3).load_state_dict(straight.state_dict())


def test_half_precision_finds_each_stored_vector_again():
    """Each component moves by 2^-11 at most, and so does the similarity."""
    queue, rows = SupportQueue(300, 32, dtype=torch.float16), unit_rows(300, 32, 3)
    queue.put(1e6 * rows)  # beyond the range of float16: normalised before it is rounded
    assert queue.features.dtype == torch.float16
    assert torch.equal(queue.nearest_indices(rows, 1)[:, 0], torch.arange(300))
    similarity = (queue.features.float() * rows / rows.norm(dim=1, keepdim=True)).sum(dim=1)
    torch.testing.assert_close(similarity, torch.ones(300), atol=2**-11, rtol=0)


def test_half_precision_rows_are_stored_in_single():
    queue = SupportQueue(4, 3)
    queue.put(unit_rows(2, 3, 0).bfloat16())
    assert queue.features.dtype == torch.float32


@pytest.fixture
def three_puts():
    """Ids 10, 11 | 12, unknown | 14, 15; labels 0, 1 | none, none | 1, none."""
    queue = SupportQueue(8, 2)
    queue.put(unit_rows(2, 2, 0), torch.tensor([10, 11]), torch.tensor([0, 1]))
    queue.put(unit_rows(2, 2, 1), torch.tensor([12, -1]))
    queue.put(unit_rows(2, 2, 2), torch.tensor([14, 15]), torch.tensor([1, -1]))
    return queue


def test_report_on_a_hand_made_queue(three_puts):
    indices = torch.tensor([0, 1, 3, 4, 5])  # born in puts 1, 1, 2, 3, 3
    ids, labels = torch.tensor([10, 99, 99, 14, -1]), torch.tensor([0, 0, 1, 1, 1])
    expected = {
        "neighbour_age": pytest.approx((3 + 3 + 2 + 1 + 1) / 5),
        "self_hit_rate": pytest.approx(2 / 3),  # rows 0, 1 and 3 are known on both sides
        "neighbour_label_agreement": pytest.approx(2 / 3),
    }
    assert three_puts.report(indices, ids, labels) == expected
    again = SupportQueue(8, 2)
    again.load_state_dict(three_puts.state_dict())
    assert again.report(indices, ids, labels) == expected


def test_report_leaves_out_what_is_unknown(three_puts):
    unknown = torch.tensor([-1, -1])
    figures = three_puts.report(torch.tensor([4, 5]), unknown, unknown)
    assert figures == {"neighbour_age": 1.0}
    known = torch.tensor([1, 1])  # entries 2 and 3 have no label, entry 3 no id
    figures = three_puts.report(torch.tensor([2, 3]), known, known)
    assert figures == {"neighbour_age": 2.0, "self_hit_rate": 0.0}
