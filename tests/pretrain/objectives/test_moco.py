"""MoCo: its loss against a loop, the assembly against the definition over steps, its queues."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.model.diagnostics import mean_cosine
from pretrain.objectives.moco import MoCo, moco_loss
from tests.pretrain.model import references
from tests.pretrain.model.references import (
    TINY,
    assert_same_gradients,
    cosine,
    cross_entropy_by_hand,
    draw,
    ema_projections,
    gradients,
    projections,
    step,
    unit,
)


def moco_by_hand(queries, keys, negatives, temperature):
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        similarities = [cosine(query, negative) / temperature for negative in negatives]
        total += cross_entropy_by_hand(cosine(query, key) / temperature, similarities)
    return total / len(queries)


@pytest.mark.parity
@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 6),
    num_negatives=st.integers(0, 12),
    d=st.integers(1, 6),
    temperature=st.floats(0.05, 2.0),
    seed=st.integers(0, 2**31),
)
def test_moco_equals_a_loop(n, num_negatives, d, temperature, seed):
    queries, keys = draw(2, n, d, seed=seed)
    negatives = draw(num_negatives, d, seed=seed + 1)
    expected = moco_by_hand(queries.tolist(), keys.tolist(), negatives.tolist(), temperature)
    loss = moco_loss(queries, keys, negatives, temperature=temperature)
    assert abs(float(loss) - expected) < 1e-11


def test_order_of_mocos_negatives_does_not_matter():
    q, k, negatives = draw(4, 3, seed=1), draw(4, 3, seed=2), draw(9, 3, seed=3)
    whole = moco_loss(q, k, negatives, temperature=0.2)
    torch.testing.assert_close(moco_loss(q, k, negatives.flip(0), temperature=0.2), whole)


@pytest.mark.parity
def test_moco_equals_its_definition_over_steps(make_model, make_views):
    """Keys of an EMA network, two queues of 20 plain keys that start empty, symmetric loss."""
    model = make_model(
        "moco", arch=TINY, method="none", objective_options={"num_negatives": 20}
    )  # fmt: skip
    twin = copy.deepcopy(model)
    entered = [torch.zeros(0, 12), torch.zeros(0, 12)]
    for number in range(4):
        views = make_views(seed=number)
        output = step(model, views, number=number)
        q, k = projections(twin, views), ema_projections(twin, views)
        bank = [keys[-20:] for keys in entered]
        expected = references.moco(q[0], k[1], bank[1], 0.2)
        expected = (expected + references.moco(q[1], k[0], bank[0], 0.2)) / 2
        torch.testing.assert_close(output.loss, expected)
        steps = gradients(model, output.loss)
        if number:
            assert_same_gradients(steps, gradients(twin, expected))
        with torch.no_grad():
            for parameter, gradient in zip(model.online.parameters(), steps, strict=True):
                parameter.sub_(0.05 * gradient)
        model.after_optimizer_step(0.9, [output])
        twin.online.load_state_dict(model.online.state_dict())
        with torch.no_grad():
            for slow, fast in zip(twin.ema.parameters(), twin.online.parameters(), strict=True):
                slow.copy_(0.9 * slow + 0.1 * fast)
        entered = [torch.cat([old, unit(new)]) for old, new in zip(entered, k, strict=True)]
    for keys, queue in zip(entered, model.memory, strict=True):
        assert (int(queue.count), int(queue.position)) == (20, 12)
        for place in range(12, 32):  # the oldest 12 were overwritten
            torch.testing.assert_close(queue.features[place % 20], keys[place])


@pytest.mark.parametrize("method", ["mask", "nn"])
def test_mocos_negatives_are_plain_keys(make, make_views, method):
    """FA makes the positive key only."""
    model, views = make("moco", method=method), make_views()
    twin = copy.deepcopy(model)
    output = step(model, views)
    assert mean_cosine(output.target, output.projection) < 0.99
    model.after_optimizer_step(0.5, [output])
    for keys, queue in zip(ema_projections(twin, views), model.memory, strict=True):
        torch.testing.assert_close(queue.features[[16, 17, 18, 19, 0, 1, 2, 3]], unit(keys))
    pairs = zip(
        model.ema.parameters(), twin.ema.parameters(), twin.online.parameters(), strict=True
    )
    for slow, before, fast in pairs:
        torch.testing.assert_close(slow, 0.5 * before + 0.5 * fast)


def test_tau_ends_where_the_config_says():
    objective = MoCo(ema_tau=0.9, ema_tau_end=0.99)
    assert [objective.tau(step, 10) for step in (0, 5, 10)] == pytest.approx([0.9, 0.945, 0.99])


def test_num_negatives_is_the_size_of_both_queues():
    state = MoCo(num_negatives=21).make_state(12)
    assert [queue.features.shape for queue in state] == [(21, 12)] * 2
