"""The ring buffer against a plain deque."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.features.memory_bank import SupportQueue


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
    torch.testing.assert_close(queue.features[queue.nearest_indices(z, k)], expected)


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
        queue.nearest_indices(torch.ones(1, 2), 1)
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
    assert not queue.features[queue.nearest_indices(rows, 2)].requires_grad


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


@pytest.mark.parametrize(
    ("saved", "wanted"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_another_precision_does_not_load(saved, wanted):
    state = torch.nn.ModuleDict({"queue": SupportQueue(7, 3, dtype=saved)}).state_dict()
    queue = torch.nn.ModuleDict({"queue": SupportQueue(7, 3, dtype=wanted)})
    with pytest.raises(RuntimeError, match=rf"was saved in {saved} and is {wanted} here"):
        queue.load_state_dict(state)


def test_half_precision_rows_are_stored_in_single():
    queue = SupportQueue(4, 3)
    queue.put(unit_rows(2, 3, 0).bfloat16())
    assert queue.features.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_finds_each_stored_vector_again(dtype, rounding):
    """Each component moves by a relative ``rounding`` at most, and so does the similarity."""
    queue, rows = SupportQueue(300, 32, dtype=dtype), unit_rows(300, 32, 3)
    queue.put(rows)
    assert queue.features.dtype == dtype
    assert torch.equal(queue.nearest_indices(rows, 1)[:, 0], torch.arange(300))
    similarity = (queue.features.float() * rows / rows.norm(dim=1, keepdim=True)).sum(dim=1)
    torch.testing.assert_close(similarity, torch.ones(300), atol=rounding, rtol=0)


def test_half_precision_is_normalised_before_it_is_rounded():
    """Of length 1e6, beyond the range of float16."""
    queue, rows = SupportQueue(4, 3, dtype=torch.float16), unit_rows(4, 3, 0)
    queue.put(1e6 * rows)
    expected = (rows / rows.norm(dim=1, keepdim=True)).half()
    torch.testing.assert_close(queue.features, expected, atol=0, rtol=2**-10)


def test_another_type_is_refused():
    with pytest.raises(ValueError, match=r"stores float32, float16 or bfloat16, got torch.float64"):
        SupportQueue(4, 3, dtype=torch.float64)


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 13),
    batches=st.lists(st.tuples(st.integers(0, 31), st.booleans(), st.booleans()), max_size=8),
)
def test_what_an_entry_came_from_travels_with_it(size, batches):
    """Row number r of all has the feature (cos r, sin r), the id 100 + r and the label r mod 3."""
    queue, model, row = SupportQueue(size, 2), deque(maxlen=size), 0
    for put, (n, has_ids, has_labels) in enumerate(batches, start=1):
        numbers = torch.arange(row, row + n)
        features = torch.stack([numbers.float().cos(), numbers.float().sin()], dim=1)
        ids = 100 + numbers if has_ids else None
        queue.put(features, ids, (numbers % 3).int() if has_labels else None)
        model.extend(
            (r, 100 + r if has_ids else -1, r % 3 if has_labels else -1, put)
            for r in numbers.tolist()
        )
        row += n
    count = int(queue.count)
    columns = (queue.sample_ids, queue.labels, queue.born)
    start = int(queue.position) if count == size else 0
    ids, labels, born = (torch.roll(c[:count], -start).tolist() for c in columns)
    angles = torch.tensor([float(r) for r, *_ in model])
    torch.testing.assert_close(contents(queue)[:, 0], angles.cos())
    assert list(zip(ids, labels, born, strict=True)) == [tuple(entry[1:]) for entry in model]
    assert int(queue.puts) == len(batches)
    assert set(queue.born[count:].tolist()) <= {0}
    assert set(queue.sample_ids[count:].tolist()) <= {-1}


def test_search_takes_the_distance_and_only_valid_entries():
    z = torch.ones(1, 64)
    z[0, 0] = 8.0
    wild_as_well, same_but_there = z.clone(), torch.ones(1, 64)
    wild_as_well[0, 1:13] = -1.0
    queue = SupportQueue(200, 64)
    queue.put(torch.cat([wild_as_well, same_but_there]))
    assert queue.nearest_indices(z, 2).tolist() == [[0, 1]]
    assert queue.nearest_indices(z, 2, distance="truncated").tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([1, 2], None, r"got sample ids \[2\] for 3 rows"),
        (None, [1, 2, 3, 4], r"got labels \[4\] for 3 rows"),
    ],
)
def test_one_id_and_one_label_for_each_row(ids, labels, message):
    ids, labels = (None if x is None else torch.tensor(x) for x in (ids, labels))
    queue = SupportQueue(4, 2)
    with pytest.raises(ValueError, match=message):
        queue.put(torch.ones(3, 2), ids, labels)
    assert int(queue.count) == int(queue.puts) == 0


# --- report


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
    assert three_puts.report(indices, ids, labels) == {
        "neighbour_age": pytest.approx((3 + 3 + 2 + 1 + 1) / 5),
        "self_hit_rate": pytest.approx(2 / 3),  # rows 0, 1 and 3 are known on both sides
        "neighbour_label_agreement": pytest.approx(2 / 3),
    }


def test_report_leaves_out_what_is_unknown(three_puts):
    assert three_puts.report(torch.tensor([4, 5])) == {"neighbour_age": 1.0}
    unknown = torch.tensor([-1, -1])
    assert set(three_puts.report(torch.tensor([0, 1]), unknown, unknown)) == {"neighbour_age"}
    known = torch.tensor([1, 1])  # entries 2 and 3 have no label, entry 3 no id
    figures = three_puts.report(torch.tensor([2, 3]), known, known)
    assert figures == {"neighbour_age": 2.0, "self_hit_rate": 0.0}
    assert three_puts.report(torch.zeros(0, dtype=torch.int64)) == {}


def test_report_is_the_same_after_a_round_trip(three_puts):
    again = SupportQueue(8, 2)
    again.load_state_dict(three_puts.state_dict())
    rows = torch.arange(6), torch.arange(10, 16), torch.tensor([0, 1, 0, 1, 0, 1])
    assert again.report(*rows) == three_puts.report(*rows)
    again.put(unit_rows(1, 2, 5))
    assert again.report(torch.tensor([6])) == {"neighbour_age": 1.0}
