"""SwAV: codes against the definition written out, their marginals, and what must not matter."""

import copy
import math
import re
from decimal import Decimal

import numpy as np
import pytest
import torch

from pretrain.objectives._prototypes import Prototypes
from pretrain.objectives.base import Pair
from pretrain.objectives.swav import SwAV, sinkhorn, swav_loss
from tests.pretrain.model import references
from tests.pretrain.model.references import (
    assert_same,
    draw,
    projections,
    step,
)


def cosines(n, num_prototypes, seed=0):
    """Scores as Prototypes gives them, in [-1, 1]."""
    return torch.tanh(draw(n, num_prototypes, seed=seed))


def sinkhorn_in_numpy(scores, epsilon, num_iterations):
    """The transport polytope's steps: prototypes of mass 1/K, samples of mass 1/n, times n."""
    n, k = scores.shape
    plan = np.exp(scores / epsilon)
    plan /= plan.sum()
    for _ in range(num_iterations):
        plan *= (1 / k) / plan.sum(axis=0, keepdims=True)
        plan *= (1 / n) / plan.sum(axis=1, keepdims=True)
    return plan * n


def sinkhorn_in_decimals(scores, epsilon, num_iterations):
    """The same with exponents of any size."""
    plan = [[(Decimal(x) / Decimal(epsilon)).exp() for x in row] for row in scores]
    for _ in range(num_iterations):
        columns = [sum(column) for column in zip(*plan, strict=True)]
        plan = [[x / c for x, c in zip(row, columns, strict=True)] for row in plan]
        plan = [[x / sum(row) for x in row] for row in plan]
    return [[float(x) for x in row] for row in plan]


def swav_by_hand(logits, codes, temperature):
    total = 0.0
    for row, code in zip(logits, codes, strict=True):
        scaled = [x / temperature for x in row]
        largest = max(scaled)
        log_sum = largest + math.log(sum(math.exp(x - largest) for x in scaled))
        total -= sum(c * (x - log_sum) for c, x in zip(code, scaled, strict=True))
    return total / len(logits)


@pytest.mark.parity
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (5, 1), (8, 5), (32, 60)])
@pytest.mark.parametrize("epsilon", [0.03, 0.05, 1.0])
@pytest.mark.parametrize("num_iterations", [1, 3, 10])
def test_sinkhorn_equals_numpy(n, k, epsilon, num_iterations):
    scores = cosines(n, k, seed=n + k)
    expected = sinkhorn_in_numpy(scores.numpy(), epsilon, num_iterations)
    codes = sinkhorn(scores, epsilon=epsilon, num_iterations=num_iterations)
    np.testing.assert_allclose(codes.numpy(), expected, atol=1e-12, rtol=1e-10)
    single = sinkhorn(scores.float(), epsilon=epsilon, num_iterations=num_iterations)
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_epsilon_is_too_small(dtype):
    """exp(1 / 1e-3) is beyond float64, and a prototype far from all would be divided by 0."""
    scores = cosines(6, 4, seed=3).to(dtype)
    scores[:, 2] -= 1
    codes = sinkhorn(scores, epsilon=1e-3, num_iterations=3)
    expected = sinkhorn_in_decimals(scores.tolist(), 1e-3, 3)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    np.testing.assert_allclose(codes.numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("num_iterations", [1, 3, 200])
def test_marginals(num_iterations):
    n, k = 24, 6
    codes = sinkhorn(cosines(n, k), epsilon=0.1, num_iterations=num_iterations)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(n, dtype=torch.float64))
    assert (codes >= 0).all()
    imbalance = float((codes.sum(dim=0) * k / n - 1).abs().max())
    assert imbalance < {1: 0.5, 3: 0.1, 200: 1e-9}[num_iterations]


def test_codes_are_balanced_where_plain_assignment_is_not():
    scores = cosines(24, 6)
    scores[:, 0] += 0.5  # everybody's favourite
    plain = torch.softmax(scores / 0.1, dim=1).sum(dim=0)[0]
    balanced = sinkhorn(scores, epsilon=0.1, num_iterations=50).sum(dim=0)[0]
    assert float(plain) > 2 * 24 / 6
    assert float(balanced) == pytest.approx(24 / 6, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_codes_follow_their_rows_and_prototypes(seed):
    scores = cosines(8, 5, seed=seed)
    options = {"epsilon": 0.05, "num_iterations": 3}
    codes = sinkhorn(scores, **options)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(8, generator=generator), torch.randperm(5, generator=generator)
    moved = sinkhorn(scores[rows][:, columns], **options)
    torch.testing.assert_close(moved, codes[rows][:, columns])
    torch.testing.assert_close(sinkhorn(scores + 7, **options), codes)
    towards = torch.linspace(-1, 1, 5, dtype=torch.float64)  # the same for every row
    torch.testing.assert_close(sinkhorn(scores + towards, **options), codes)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_precision_and_gradient_of_codes(given, computed):
    scores = cosines(4, 3).to(given).requires_grad_()
    kept = scores.detach().clone()
    codes = sinkhorn(scores, epsilon=0.05, num_iterations=3)
    assert codes.dtype == computed
    assert not codes.requires_grad
    assert torch.equal(scores, kept)


@pytest.mark.parity
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (16, 30)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_swav_loss_equals_a_loop(n, k, temperature):
    logits, codes = draw(n, k, seed=n), torch.softmax(draw(n, k, seed=k + 50), dim=1)
    expected = swav_by_hand(logits.tolist(), codes.tolist(), temperature)
    loss = swav_loss(logits, codes, temperature=temperature)
    assert abs(float(loss) - expected) < 1e-12 * max(1.0, expected)
    single = swav_loss(logits.float(), codes.float(), temperature=temperature)
    assert abs(float(single) - expected) < 1e-6 * max(1.0, expected)


def test_swav_loss_gradcheck_and_no_detach():
    logits, codes = draw(4, 3, seed=1).requires_grad_(), draw(4, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, q: swav_loss(x, q, temperature=0.3), (logits, codes))
    gradients = torch.autograd.grad(swav_loss(logits, codes, temperature=0.3), (logits, codes))
    assert all(float(g.abs().sum()) > 0 for g in gradients)


@pytest.mark.parametrize("seed", range(3))
def test_swav_loss_does_not_see_order_or_offset(seed):
    logits, codes = draw(8, 5, seed=seed), torch.softmax(draw(8, 5, seed=seed + 50), dim=1)
    loss = swav_loss(logits, codes, temperature=0.1)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(8, generator=generator), torch.randperm(5, generator=generator)
    moved = swav_loss(logits[rows][:, columns], codes[rows][:, columns], temperature=0.1)
    torch.testing.assert_close(moved, loss)
    torch.testing.assert_close(swav_loss(logits + draw(8, 1, seed=9), codes, temperature=0.1), loss)
    assert not torch.isclose(swav_loss(logits[rows], codes, temperature=0.1), loss)


def test_swav_loss_is_lowest_at_the_codes():
    codes = torch.softmax(draw(6, 4, seed=1), dim=1)
    entropy = float(-(codes * codes.log()).sum(dim=1).mean())
    at_codes = float(swav_loss(0.1 * codes.log(), codes, temperature=0.1))
    assert at_codes == pytest.approx(entropy)
    assert float(swav_loss(draw(6, 4, seed=2), codes, temperature=0.1)) > entropy


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_batches_that_are_none_are_refused(shape):
    ending = rf" must be \[n, d\] with n >= 1, got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match="scores" + ending):
        sinkhorn(torch.zeros(shape), epsilon=0.05, num_iterations=3)
    with pytest.raises(ValueError, match="logits" + ending):
        swav_loss(torch.zeros(shape), torch.zeros(4, 4), temperature=0.1)
    with pytest.raises(ValueError, match="codes" + ending):
        swav_loss(torch.zeros(4, 4), torch.zeros(shape), temperature=0.1)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"logits has 4 rows, codes has 1"):
        swav_loss(draw(4, 3), draw(1, 3), temperature=0.1)
    with pytest.raises(ValueError, match=r"logits has width 3, codes has 1"):
        swav_loss(draw(4, 3), draw(4, 1), temperature=0.1)


@pytest.mark.parametrize(("epsilon", "num_iterations"), [(0.0, 3), (-1.0, 3), (0.05, 0)])
def test_options_out_of_range_are_refused(epsilon, num_iterations):
    message = rf"got epsilon={epsilon}, num_iterations={num_iterations}"
    with pytest.raises(ValueError, match=message):
        sinkhorn(cosines(4, 3), epsilon=epsilon, num_iterations=num_iterations)


# -- prototypes


@pytest.mark.parity
@pytest.mark.parametrize("iterations", [1, 3])
def test_swav_equals_its_definition(make, make_views, iterations):
    """Each view's scores against the other's codes; gradients to the prototypes as well."""
    options = {"sinkhorn_epsilon": 0.1, "sinkhorn_iterations": iterations}
    model, views = make("swav", method="none", options=options), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    z, prototypes = projections(twin, views), twin.online.prototypes.weight
    one = references.swav(z[0], z[1], prototypes, 0.2, 0.1, iterations)
    two = references.swav(z[1], z[0], prototypes, 0.2, 0.1, iterations)
    assert_same(model, twin, loss, (one + two) / 2)


def test_prototypes_are_cosines():
    prototypes = Prototypes(3, 5).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    scores = prototypes(x).detach()
    for i, row in enumerate(x.tolist()):
        for k, weight in enumerate(prototypes.weight.tolist()):
            dot = sum(a * b for a, b in zip(row, weight, strict=True))
            cosine = dot / math.hypot(*row) / math.hypot(*weight)
            assert abs(float(scores[i, k]) - cosine) < 1e-12


def test_prototypes_see_directions_only():
    prototypes = Prototypes(6, 5)
    x = torch.randn(4, 5)
    scores = prototypes(x).detach()
    with torch.no_grad():
        prototypes.weight.mul_(torch.rand(6, 1) + 0.5)
    torch.testing.assert_close(prototypes(x * (torch.rand(4, 1) + 0.5)), scores)
    assert float(scores.abs().max()) <= 1 + 1e-6


def test_prototypes_start_on_the_sphere_and_learn():
    prototypes = Prototypes(7, 5)
    assert list(prototypes.state_dict()) == ["weight"]
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(7))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prototypes.double(), x)
    prototypes(x).square().sum().backward()
    assert float(prototypes.weight.grad.norm(dim=1).min()) > 0


@pytest.mark.parametrize("option", [{"sinkhorn_epsilon": 0.5}, {"sinkhorn_iterations": 1}])
def test_sinkhorn_options_reach_the_codes(option):
    online, target = draw(2, 8, 5, seed=1).float()
    pair = Pair(online, target, target, 1)
    state = SwAV(num_prototypes=6).make_state(5)
    assert state.weight.shape == (6, 5)
    losses = [SwAV(**options).loss(pair, state) for options in ({}, option)]
    assert not torch.isclose(*losses)


def test_prototypes_stand_still_for_so_many_steps():
    """Their gradient is taken away before the update; that of the projector stays."""
    objective = SwAV(frozen_prototype_steps=2)
    state = objective.make_state(5)
    for number in range(4):
        state.weight.grad = torch.ones_like(state.weight)
        objective.before_update(state, number)
        assert (state.weight.grad is None) == (number < 2)


def test_prototypes_are_trained_with_the_network(make_model):
    model = make_model("swav", method="none")
    assert [name for name, _ in model.online.named_children()][-1] == "prototypes"
    assert (model.memory, model.objective_state) == (None, model.online.prototypes)
