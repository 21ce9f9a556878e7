"""BYOL and InfoNCE against loops in float64, by gradient check, and by what must not matter."""

import math

import numpy as np
import pytest
import torch

from pretrain.models.losses import byol_loss, infonce_loss


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def byol_by_hand(p, t):
    return sum(2 - 2 * cosine(a, b) for a, b in zip(p, t, strict=True)) / len(p)


def infonce_by_hand(rows, columns, temperature, first_positive=0):
    total = 0.0
    for i, row in enumerate(rows):
        logits = [cosine(row, column) / temperature for column in columns]
        largest = max(logits)
        log_sum = largest + math.log(sum(math.exp(x - largest) for x in logits))
        total += log_sum - logits[first_positive + i]
    return total / len(rows)


@pytest.mark.parity
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5), (7, 3), (16, 32)])
def test_byol_equals_a_loop(n, d):
    p, t = draw(n, d, seed=n), draw(n, d, seed=d + 100)
    expected = byol_by_hand(p.tolist(), t.tolist())
    assert abs(float(byol_loss(p, t)) - expected) < 1e-12
    assert abs(float(byol_loss(p.float(), t.float())) - expected) < 1e-6


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


def test_gradcheck():
    p = draw(4, 3, seed=3).requires_grad_()
    t = draw(4, 3, seed=4).requires_grad_()
    columns = draw(6, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(byol_loss, (p, t))
    assert torch.autograd.gradcheck(
        lambda rows, cols: infonce_loss(rows, cols, temperature=0.2, first_positive=2), (p, columns)
    )


def test_losses_never_detach():
    p, t = draw(4, 3).requires_grad_(), draw(4, 3, seed=9).requires_grad_()
    for loss in (byol_loss(p, t), infonce_loss(t, p, temperature=0.2)):
        gradients = torch.autograd.grad(loss, (p, t))
        assert all(float(g.abs().sum()) > 0 for g in gradients)


def test_order_of_the_samples_does_not_matter():
    p, t = draw(8, 5, seed=6), draw(8, 5, seed=7)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(byol_loss(p[order], t[order]), byol_loss(p, t))
    torch.testing.assert_close(
        infonce_loss(t[order], p[order], temperature=0.1), infonce_loss(t, p, temperature=0.1)
    )
    wrong = infonce_loss(t[order], p, temperature=0.1)
    assert not torch.isclose(wrong, infonce_loss(t, p, temperature=0.1))


def test_only_directions_matter():
    p, t = draw(8, 5, seed=6), draw(8, 5, seed=7)
    scale = torch.rand(8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    torch.testing.assert_close(byol_loss(p * scale, t / scale), byol_loss(p, t))
    torch.testing.assert_close(
        infonce_loss(t / scale, p * scale, temperature=0.1), infonce_loss(t, p, temperature=0.1)
    )


def test_known_values():
    p = draw(8, 5, seed=6)
    assert float(byol_loss(p, p)) == pytest.approx(0, abs=1e-12)
    assert float(byol_loss(p, -p)) == pytest.approx(4)
    same = torch.ones(6, 3, dtype=torch.float64)
    assert float(infonce_loss(same, same, temperature=0.1)) == pytest.approx(math.log(6))


def test_infonce_rows_are_anchors():
    """Rows to columns only: NNCLR's form is not symmetric."""
    rows, columns = draw(4, 3, seed=1), draw(4, 3, seed=2)
    one_way = infonce_loss(rows, columns, temperature=0.2)
    assert not torch.isclose(one_way, infonce_loss(columns, rows, temperature=0.2))


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_batches_that_are_none_are_refused(shape):
    good, bad = torch.randn(4, 4), torch.zeros(shape)
    with pytest.raises(ValueError, match=r"p must be \[n, d\] with n >= 1, got shape"):
        byol_loss(bad, good)
    with pytest.raises(ValueError, match=r"t must be \[n, d\]"):
        byol_loss(good, bad)
    with pytest.raises(ValueError, match=r"rows must be \[n, d\]"):
        infonce_loss(bad, good, temperature=0.1)
    with pytest.raises(ValueError, match=r"columns must be \[n, d\]"):
        infonce_loss(good, bad, temperature=0.1)


@pytest.mark.parametrize("first", [-1, 3, 100])
def test_rows_without_a_positive_are_refused(first):
    with pytest.raises(ValueError, match=rf"rows {first}\.\.{first + 3} have no positive among 6"):
        infonce_loss(draw(4, 3), draw(6, 3), temperature=0.1, first_positive=first)


def test_unequal_batches_are_refused():
    with pytest.raises(ValueError, match=r"p has 4 rows, t has 1"):
        byol_loss(draw(4, 3), draw(1, 3))
