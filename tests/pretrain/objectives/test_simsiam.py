"""SimSiam: its loss against a loop, the assembly against the definition."""

import copy

import pytest

from pretrain.objectives.simsiam import negative_cosine_loss
from tests.pretrain.model import references
from tests.pretrain.model.references import (
    assert_same,
    cosine,
    draw,
    online,
    step,
)


@pytest.mark.parity
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5), (7, 3), (16, 32)])
def test_negative_cosine_equals_a_loop(n, d):
    p, t = draw(n, d, seed=n), draw(n, d, seed=d + 100)
    expected = -sum(cosine(a, b) for a, b in zip(p.tolist(), t.tolist(), strict=True)) / n
    assert abs(float(negative_cosine_loss(p, t)) - expected) < 1e-12


@pytest.mark.parity
@pytest.mark.parametrize("training", [True, False])
def test_simsiam_equals_its_definition(make, make_views, training):
    """Half the sum of -cos(p_1, sg z_2) and -cos(p_2, sg z_1)."""
    model, views = make("simsiam", method="none").train(training), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    z, p = online(twin, views)
    cosine = references.negative_cosine
    assert_same(model, twin, loss, (cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())) / 2)


@pytest.mark.parity
def test_nnsiam_equals_its_definition(make, make_views):
    model, views = make("simsiam", method="nn", architecture="parallel"), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    z, p = online(twin, views)
    near = [references.nn(x.detach(), twin.queue.features[:40]) for x in z]
    cosine = references.negative_cosine
    assert_same(model, twin, loss, (cosine(p[0], near[1]) + cosine(p[1], near[0])) / 2)
