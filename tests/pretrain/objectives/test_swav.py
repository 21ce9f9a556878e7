"""SwAV: codes against the definition written out, their marginals, the loss, the prototypes."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch

from pretrain.features.augmentations.base import RowRandom
from pretrain.objectives.swav import SwAV, prototype_scores, sinkhorn, swav_loss
from tests.golden.training import float64_is_kept
from tests.pretrain.model import references
from tests.pretrain.model.references import draw


def cosines(n, num_prototypes, seed=0):
    """Scores in [-1, 1]."""
    return torch.tanh(draw(n, num_prototypes, seed=seed))


def sinkhorn_in_decimals(scores, epsilon, num_iterations):
    """The definition with exponents of any size."""
    plan = [[(Decimal(x) / Decimal(epsilon)).exp() for x in row] for row in scores]
    for _ in range(num_iterations):
        columns = [sum(column) for column in zip(*plan, strict=True)]
        plan = [[x / c for x, c in zip(row, columns, strict=True)] for row in plan]
        plan = [[x / sum(row) for x in row] for row in plan]
    return [[float(x) for x in row] for row in plan]


@pytest.mark.parity
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (5, 1), (32, 60)])
@pytest.mark.parametrize(("epsilon", "num_iterations"), [(0.03, 3), (0.05, 10), (1.0, 1)])
def test_sinkhorn_equals_its_definition(n, k, epsilon, num_iterations):
    scores = cosines(n, k, seed=n + k)
    expected = references.sinkhorn(scores, epsilon, num_iterations)
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


@pytest.mark.parametrize(("num_iterations", "limit"), [(1, 0.5), (3, 0.1), (200, 1e-9)])
def test_prototypes_get_equal_shares(num_iterations, limit):
    n, k = 24, 6
    codes = sinkhorn(cosines(n, k), epsilon=0.1, num_iterations=num_iterations)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(n, dtype=torch.float64))
    assert float((codes.sum(dim=0) * k / n - 1).abs().max()) < limit


def test_codes_follow_their_rows_and_prototypes():
    scores, options = cosines(8, 5, seed=1), {"epsilon": 0.05, "num_iterations": 3}
    codes = sinkhorn(scores, **options)
    rows, columns = torch.randperm(8), torch.randperm(5)
    moved = sinkhorn(scores[rows][:, columns], **options)
    torch.testing.assert_close(moved, codes[rows][:, columns])
    towards = torch.linspace(6, 8, 5, dtype=torch.float64)  # the same for every row
    torch.testing.assert_close(sinkhorn(scores + towards, **options), codes)


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision_and_gradient_of_codes(given):
    scores = cosines(4, 3).to(given).requires_grad_()
    kept = scores.detach().clone()
    codes = sinkhorn(scores, epsilon=0.05, num_iterations=3)
    assert codes.dtype == (torch.float64 if given == torch.float64 else torch.float32)
    assert not codes.requires_grad
    assert torch.equal(scores, kept)


@pytest.mark.parity
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (16, 30)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_swav_loss_equals_a_loop(n, k, temperature):
    logits, codes = draw(n, k, seed=n), torch.softmax(draw(n, k, seed=k + 50), dim=1)
    expected = 0.0
    for row, code in zip(logits.tolist(), codes.tolist(), strict=True):
        scaled = [x / temperature for x in row]
        log_sum = max(scaled) + math.log(sum(math.exp(x - max(scaled)) for x in scaled))
        expected -= sum(c * (x - log_sum) for c, x in zip(code, scaled, strict=True)) / n
    loss = swav_loss(logits, codes, temperature=temperature)
    assert abs(float(loss) - expected) < 1e-12 * max(1.0, expected)


def test_swav_loss_gradcheck_and_no_detach():
    logits, codes = draw(4, 3, seed=1).requires_grad_(), draw(4, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, q: swav_loss(x, q, temperature=0.3), (logits, codes))
    gradients = torch.autograd.grad(swav_loss(logits, codes, temperature=0.3), (logits, codes))
    assert all(float(g.abs().sum()) > 0 for g in gradients)


def test_scores_are_cosines_and_learn():
    x, weight = draw(4, 5, seed=1).requires_grad_(), draw(3, 5, seed=2).requires_grad_()
    for row, scores in zip(x.tolist(), prototype_scores(x, weight).tolist(), strict=True):
        for direction, score in zip(weight.tolist(), scores, strict=True):
            dot = sum(a * b for a, b in zip(row, direction, strict=True))
            assert abs(score - dot / math.hypot(*row) / math.hypot(*direction)) < 1e-12
    assert torch.autograd.gradcheck(prototype_scores, (x, weight))


def test_prototypes_start_on_the_sphere():
    state = SwAV(num_prototypes=7).make_state(5)
    assert list(state.state_dict()) == ["weight"]
    torch.testing.assert_close(state["weight"].norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("option", [{"sinkhorn_epsilon": 0.5}, {"sinkhorn_iterations": 1}])
def test_sinkhorn_options_reach_the_codes(option):
    target, state = draw(8, 5, seed=1).float(), SwAV(num_prototypes=6).make_state(5)
    codes = [SwAV(**options).prepare(target, state) for options in ({}, option)]
    assert not torch.allclose(*codes)


@pytest.mark.parity
@pytest.mark.parametrize("num_small", [0, 1, 6])
def test_multi_crop_is_the_mean_of_each_views_cross_entropy_to_each_other_large_ones_codes(
    make_model, num_small
):
    """arXiv 2006.09882, multi-crop, summed one by one; its code divides by the number of pairs."""
    with float64_is_kept():
        z, num_views = draw(2 + num_small, 6, 12, seed=4), 2 + num_small
        options = {"num_prototypes": 5, "temperature": 0.1}
        model = make_model("swav", method="none", objective_options=options).double()
        random = RowRandom.whole(torch.Generator(), 6)
        loss = float(model.compare(z, None, random, 1.0).loss.detach())
        weight = references.unit(model.online.prototypes["weight"].detach())
        scores = [(references.unit(x) @ weight.T).tolist() for x in z]
    total = 0.0
    for large in (0, 1):
        codes = sinkhorn_in_decimals(scores[large], 0.05, 3)
        for view in set(range(num_views)) - {large}:
            for code, row in zip(codes, scores[view], strict=True):
                log_sum = math.log(sum(math.exp(x / 0.1) for x in row))
                total -= sum(q * (x / 0.1 - log_sum) for q, x in zip(code, row, strict=True)) / 6
    assert abs(loss - total / 2 / (num_views - 1)) < 1e-12


def test_prototypes_stand_still_for_so_many_steps():
    """Their gradient is taken away before the update; that of the projector stays."""
    objective = SwAV(frozen_prototype_steps=2)
    state = objective.make_state(5)
    for number in range(4):
        state["weight"].grad = torch.ones_like(state["weight"])
        objective.before_update(state, number)
        assert (state["weight"].grad is None) == (number < 2)


def test_prototypes_are_trained_with_the_network(make_model):
    model = make_model("swav", method="none")
    assert [name for name, _ in model.online.named_children()][-1] == "prototypes"
    assert (model.memory, model.objective_state) == (None, model.online.prototypes)
