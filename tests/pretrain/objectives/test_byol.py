"""BYOL: its loss against a loop, the assembly against the definition, the schedule of tau."""

import copy
import math

import pytest
import torch

from pretrain.objectives.byol import Byol, byol_loss
from tests.pretrain.model import references
from tests.pretrain.model.references import (
    assert_same_gradients,
    cosine,
    draw,
    ema_projections,
    gradients,
    move_ema,
    online,
    step,
    unit,
)


def byol_by_hand(p, t):
    return sum(2 - 2 * cosine(a, b) for a, b in zip(p, t, strict=True)) / len(p)


@pytest.mark.parity
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5), (7, 3), (16, 32)])
def test_byol_equals_a_loop(n, d):
    p, t = draw(n, d, seed=n), draw(n, d, seed=d + 100)
    expected = byol_by_hand(p.tolist(), t.tolist())
    assert abs(float(byol_loss(p, t)) - expected) < 1e-12
    assert abs(float(byol_loss(p.float(), t.float())) - expected) < 1e-6


@pytest.mark.parity
def test_byol_equals_its_definition(make_model, make_views):
    """|q(z_u) - z'_v|^2 of unit vectors, summed over both pairs; z' from the EMA network."""
    model, views = make_model("byol", method="none"), make_views()
    move_ema(model)
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    _, p = online(twin, views)
    t = ema_projections(twin, views)
    expected = references.byol(p[0], t[1]) + references.byol(p[1], t[0])
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(twin, expected))


@pytest.mark.parity
def test_nnbyol_equals_its_definition(make_model, make_views, bank):
    """The target is the neighbour of the EMA projection in a queue of EMA projections."""
    model, views = make_model("byol", method="nn"), make_views()
    move_ema(model)
    model.queue.put(bank)
    twin = copy.deepcopy(model)
    output = step(model, views)
    loss = output.loss
    _, p = online(twin, views)
    t = [references.nn(x, bank) for x in ema_projections(twin, views)]
    expected = references.byol(p[0], t[1]) + references.byol(p[1], t[0])
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(twin, expected))
    model.after_optimizer_step(0.99, [output])
    entered = unit(ema_projections(twin, views)[0])
    torch.testing.assert_close(model.queue.features[40:48], entered)


@pytest.mark.parity
@pytest.mark.parametrize("tau_1", [1.0, 0.999])
@pytest.mark.parametrize("tau_0", [0.0, 0.99, 0.996])
def test_ema_tau_equals_the_closed_form(tau_0, tau_1):
    objective = Byol(ema_tau=tau_0, ema_tau_end=tau_1)
    for number in range(0, 1001, 10):
        expected = tau_0 + (tau_1 - tau_0) * (1 - math.cos(math.pi * number / 1000)) / 2
        assert objective.tau(number, 1000) == pytest.approx(expected, abs=1e-12)
    assert objective.tau(0, 1000) == pytest.approx(tau_0)
    assert objective.tau(1000, 1000) == tau_1
    values = [objective.tau(number, 50) for number in range(51)]
    assert values == sorted(values)
