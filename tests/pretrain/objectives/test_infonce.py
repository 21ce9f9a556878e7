"""InfoNCE: its loss against a loop, the assembly against the definition, NNCLR."""

import copy

import numpy as np
import pytest
import torch

from pretrain.objectives.infonce import infonce_loss
from tests.pretrain.model import references
from tests.pretrain.model.references import (
    assert_same_gradients,
    cosine,
    cross_entropy_by_hand,
    draw,
    gradients,
    online,
    step,
)


def infonce_by_hand(rows, columns, temperature, first_positive=0):
    total = 0.0
    for i, row in enumerate(rows):
        logits = [cosine(row, column) / temperature for column in columns]
        positive = logits.pop(first_positive + i)
        total += cross_entropy_by_hand(positive, logits)
    return total / len(rows)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("n", "m", "first"), [(1, 1, 0), (4, 4, 0), (3, 9, 0), (3, 9, 3), (3, 9, 6)]
)
@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_infonce_equals_a_loop(n, m, first, temperature):
    rows, columns = draw(n, 6, seed=n), draw(m, 6, seed=m + 50)
    expected = infonce_by_hand(rows.tolist(), columns.tolist(), temperature, first)
    loss = infonce_loss(rows, columns, temperature=temperature, first_positive=first)
    assert abs(float(loss) - expected) < 1e-12
    single = infonce_loss(
        rows.float(), columns.float(), temperature=temperature, first_positive=first
    )
    assert abs(float(single) - expected) < 1e-6 * max(1.0, expected)


@pytest.mark.parity
def test_infonce_gradient_equals_the_formula_in_numpy():
    rows, columns, tau = draw(5, 4, seed=1), draw(5, 4, seed=2), 0.3
    rows.requires_grad_()
    columns.requires_grad_()
    infonce_loss(rows, columns, temperature=tau).backward()
    a, b = rows.detach().numpy(), columns.detach().numpy()
    na, nb = (np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    ua, ub = a / na, b / nb
    logits = ua @ ub.T / tau
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    d_logits = (shares - np.eye(5)) / 5 / tau
    for gradient, unit, norm, upstream in (
        (rows.grad, ua, na, d_logits @ ub),
        (columns.grad, ub, nb, d_logits.T @ ua),
    ):
        tangent = upstream - (upstream * unit).sum(1, keepdims=True) * unit
        np.testing.assert_allclose(gradient.numpy(), tangent / norm, atol=1e-12)


def test_infonce_rows_are_anchors():
    """Rows to columns only: NNCLR's form is not symmetric."""
    rows, columns = draw(4, 3, seed=1), draw(4, 3, seed=2)
    one_way = infonce_loss(rows, columns, temperature=0.2)
    assert not torch.isclose(one_way, infonce_loss(columns, rows, temperature=0.2))


@pytest.mark.parity
@pytest.mark.parametrize("training", [True, False])
def test_infonce_without_fa_equals_its_definition(make_model, make_views, training):
    """Both branches carry gradient: CE(z2 -> p1) and CE(z1 -> p2), halved."""
    model, views = make_model("infonce", method="none").train(training), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    z, p = online(twin, views)
    expected = (references.infonce(z[1], p[0], 0.2) + references.infonce(z[0], p[1], 0.2)) / 2
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(twin, expected))


@pytest.mark.parity
@pytest.mark.parametrize("training", [True, False])
def test_nnclr_equals_its_definition(make_model, make_views, bank, training):
    """1/2 CE(NN(z1) . p2 / tau) + 1/2 CE(NN(z2) . p1 / tau), neighbours without gradient."""
    model, views = make_model("infonce", method="nn").train(training), make_views()
    model.queue.put(bank)
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    z, p = online(twin, views)
    near = [references.nn(x.detach(), bank) for x in z]
    expected = (references.infonce(near[0], p[1], 0.2) + references.infonce(near[1], p[0], 0.2)) / 2
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(twin, expected))


@pytest.mark.parity
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_temperature_divides_the_similarities(make_model, make_views, temperature):
    model = make_model(method="none", objective_options={"temperature": temperature})
    twin, views = copy.deepcopy(model), make_views()
    z, p = online(twin, views)
    expected = sum(references.infonce(z[1 - v], p[v], temperature) for v in (0, 1)) / 2
    torch.testing.assert_close(step(model, views).loss, expected)
