"""SwAV: codes against the definition written out, their marginals, and what must not matter."""

import math
import re
from decimal import Decimal

import numpy as np
import pytest
import torch

from pretrain.objectives.losses import sinkhorn, swav_loss


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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
