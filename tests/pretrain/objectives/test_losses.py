"""Losses against loops in float64, by gradient check, and by what must not matter."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.objectives.losses import (
    byol_loss,
    infonce_loss,
    moco_loss,
    negative_cosine_loss,
    nt_xent_loss,
)

# Every loss as a function of predictions p, targets t and further features e, all [n, d].
LOSSES = {
    "byol": lambda p, t, e: byol_loss(p, t),
    "simsiam": lambda p, t, e: negative_cosine_loss(p, t),
    "infonce": lambda p, t, e: infonce_loss(t, p, temperature=0.2),
    "nt_xent": lambda p, t, e: nt_xent_loss(t, p, e, temperature=0.2),
    "moco": lambda p, t, e: moco_loss(p, t, e, temperature=0.2),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def byol_by_hand(p, t):
    return sum(2 - 2 * cosine(a, b) for a, b in zip(p, t, strict=True)) / len(p)


def cross_entropy_by_hand(positive, negatives):
    """-log of the positive's share."""
    largest = max([positive, *negatives])
    total = sum(math.exp(x - largest) for x in [positive, *negatives])
    return largest + math.log(total) - positive


def infonce_by_hand(rows, columns, temperature, first_positive=0):
    total = 0.0
    for i, row in enumerate(rows):
        logits = [cosine(row, column) / temperature for column in columns]
        positive = logits.pop(first_positive + i)
        total += cross_entropy_by_hand(positive, logits)
    return total / len(rows)


def nt_xent_by_hand(rows, columns, others, temperature, first_positive=0):
    total = 0.0
    for own, row in enumerate(rows, start=first_positive):
        negatives = []
        for j in range(len(columns)):
            if j != own:
                negatives.append(cosine(row, columns[j]) / temperature)
                negatives.append(cosine(row, others[j]) / temperature)
        total += cross_entropy_by_hand(cosine(row, columns[own]) / temperature, negatives)
    return total / len(rows)


def textbook_nt_xent(z_1, z_2, temperature):
    """SimCLR, algorithm 1: samples 2k and 2k + 1 are the views of picture k."""
    samples = [row for pair in zip(z_1, z_2, strict=True) for row in pair]
    total = 0.0
    for i, anchor in enumerate(samples):
        partner = i + 1 if i % 2 == 0 else i - 1
        similarity = [cosine(anchor, sample) / temperature for sample in samples]
        negatives = [s for k, s in enumerate(similarity) if k not in (i, partner)]
        total += cross_entropy_by_hand(similarity[partner], negatives)
    return total / len(samples)


def moco_by_hand(queries, keys, negatives, temperature):
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        similarities = [cosine(query, negative) / temperature for negative in negatives]
        total += cross_entropy_by_hand(cosine(query, key) / temperature, similarities)
    return total / len(queries)


@pytest.mark.parity
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5), (7, 3), (16, 32)])
def test_byol_equals_a_loop(n, d):
    p, t = draw(n, d, seed=n), draw(n, d, seed=d + 100)
    expected = byol_by_hand(p.tolist(), t.tolist())
    assert abs(float(byol_loss(p, t)) - expected) < 1e-12
    assert abs(float(byol_loss(p.float(), t.float())) - expected) < 1e-6
    assert abs(float(negative_cosine_loss(p, t)) - (expected / 2 - 1)) < 1e-12


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


@pytest.mark.parity
@pytest.mark.parametrize(
    ("n", "m", "first"), [(1, 1, 0), (4, 4, 0), (3, 9, 0), (3, 9, 3), (3, 9, 6)]
)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_a_loop(n, m, first, temperature):
    rows, columns, others = draw(n, 6, seed=n), draw(m, 6, seed=m + 50), draw(m, 6, seed=m + 70)
    expected = nt_xent_by_hand(rows.tolist(), columns.tolist(), others.tolist(), temperature, first)
    options = {"temperature": temperature, "first_positive": first}
    assert abs(float(nt_xent_loss(rows, columns, others, **options)) - expected) < 1e-12
    single = nt_xent_loss(rows.float(), columns.float(), others.float(), **options)
    assert abs(float(single) - expected) < 1e-6 * max(1.0, expected)


@pytest.mark.parity
@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 8),
    d=st.integers(1, 6),
    temperature=st.floats(0.05, 2.0),
    seed=st.integers(0, 2**31),
)
def test_nt_xent_of_both_orders_is_the_textbook_loss(n, d, temperature, seed):
    z_1, z_2 = draw(2, n, d, seed=seed)
    one = nt_xent_loss(z_2, z_1, z_2, temperature=temperature)
    other = nt_xent_loss(z_1, z_2, z_1, temperature=temperature)
    expected = textbook_nt_xent(z_1.tolist(), z_2.tolist(), temperature)
    assert abs(float(one + other) / 2 - expected) < 1e-11


def test_nt_xent_of_the_parts_is_that_of_the_batch():
    rows, columns, others = (draw(6, 4, seed=seed) for seed in (1, 2, 3))
    parts = [
        nt_xent_loss(rows[i : i + 2], columns, others, temperature=0.2, first_positive=i)
        for i in (0, 2, 4)
    ]
    whole = nt_xent_loss(rows, columns, others, temperature=0.2)
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_nt_xent_never_sees_a_rows_own_other():
    rows, columns, others = (draw(3, 4, seed=seed) for seed in (1, 2, 3))
    others.requires_grad_()
    row_loss = nt_xent_loss(rows[1:2], columns, others, temperature=0.2, first_positive=1)
    (gradient,) = torch.autograd.grad(row_loss, others)
    assert gradient.abs().sum(dim=1).gt(0).tolist() == [True, False, True]


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


def test_gradcheck_where_rows_are_a_part_of_the_batch():
    rows, columns, others = draw(3, 3, seed=4), draw(6, 3, seed=5), draw(6, 3, seed=6)
    inputs = [x.requires_grad_() for x in (rows, columns, others)]
    options = {"temperature": 0.2, "first_positive": 2}
    assert torch.autograd.gradcheck(lambda r, c: infonce_loss(r, c, **options), inputs[:2])
    assert torch.autograd.gradcheck(lambda r, c, o: nt_xent_loss(r, c, o, **options), inputs)
    assert torch.autograd.gradcheck(
        lambda k, q, e: moco_loss(q, k, e, temperature=0.2),
        (rows, draw(3, 3, seed=7).requires_grad_(), others),
    )


@every_loss
def test_gradcheck(loss):
    inputs = [draw(4, 3, seed=seed).requires_grad_() for seed in (3, 4, 5)]
    assert torch.autograd.gradcheck(loss, inputs)


@every_loss
def test_losses_never_detach(loss):
    p, t, e = (draw(4, 3, seed=seed).requires_grad_() for seed in (0, 9, 10))
    gradients = torch.autograd.grad(loss(p, t, e), (p, t, e), allow_unused=True)
    used = [g for g in gradients if g is not None]
    assert len(used) == (3 if loss in (LOSSES["nt_xent"], LOSSES["moco"]) else 2)
    assert all(float(g.abs().sum()) > 0 for g in used)


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_samples_does_not_matter(loss, seed):
    p, t, e = draw(3, 8, 5, seed=seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(p[order], t[order], e[order]), loss(p, t, e))
    assert not torch.isclose(loss(p, t[order], e), loss(p, t, e))


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_only_directions_matter(loss, seed):
    p, t, e = draw(3, 8, 5, seed=seed)
    scale = draw(3, 8, 1, seed=seed + 100).abs() + 0.1
    torch.testing.assert_close(loss(p * scale[0], t * scale[1], e * scale[2]), loss(p, t, e))


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_rotation_of_the_feature_space_does_not_matter(loss, seed):
    p, t, e = draw(3, 8, 5, seed=seed)
    rotation = torch.linalg.qr(draw(5, 5, seed=seed + 200)).Q
    torch.testing.assert_close(loss(p @ rotation, t @ rotation, e @ rotation), loss(p, t, e))
    assert not torch.isclose(loss(p @ rotation, t, e), loss(p, t, e))


def test_order_of_mocos_negatives_does_not_matter():
    q, k, negatives = draw(4, 3, seed=1), draw(4, 3, seed=2), draw(9, 3, seed=3)
    whole = moco_loss(q, k, negatives, temperature=0.2)
    torch.testing.assert_close(moco_loss(q, k, negatives.flip(0), temperature=0.2), whole)


def test_known_values():
    p = draw(8, 5, seed=6)
    assert float(byol_loss(p, p)) == pytest.approx(0, abs=1e-12)
    assert float(byol_loss(p, -p)) == pytest.approx(4)
    same = torch.ones(6, 3, dtype=torch.float64)
    assert float(infonce_loss(same, same, temperature=0.1)) == pytest.approx(math.log(6))
    assert float(nt_xent_loss(same, same, same, temperature=0.1)) == pytest.approx(math.log(11))
    assert float(moco_loss(same, same, same, temperature=0.1)) == pytest.approx(math.log(7))
    assert float(moco_loss(p, -p, p[:0], temperature=0.1)) == 0
    assert float(negative_cosine_loss(p, p)) == pytest.approx(-1)
    assert float(negative_cosine_loss(p, -p)) == pytest.approx(1)


def test_infonce_rows_are_anchors():
    """Rows to columns only: NNCLR's form is not symmetric."""
    rows, columns = draw(4, 3, seed=1), draw(4, 3, seed=2)
    one_way = infonce_loss(rows, columns, temperature=0.2)
    assert not torch.isclose(one_way, infonce_loss(columns, rows, temperature=0.2))


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_batches_that_are_none_are_refused(shape):
    good, bad = torch.randn(4, 4), torch.zeros(shape)
    ending = rf" must be \[n, d\] with n >= 1, got shape {re.escape(str(shape))}"
    for pairwise in (byol_loss, negative_cosine_loss):
        with pytest.raises(ValueError, match="p" + ending):
            pairwise(bad, good)
        with pytest.raises(ValueError, match="t" + ending):
            pairwise(good, bad)
    with pytest.raises(ValueError, match="rows" + ending):
        infonce_loss(bad, good, temperature=0.1)
    with pytest.raises(ValueError, match="columns" + ending):
        infonce_loss(good, bad, temperature=0.1)
    with pytest.raises(ValueError, match="rows" + ending):
        nt_xent_loss(bad, good, good, temperature=0.1)
    with pytest.raises(ValueError, match="columns" + ending):
        nt_xent_loss(good, bad, bad, temperature=0.1)
    with pytest.raises(ValueError, match="queries" + ending):
        moco_loss(bad, good, good, temperature=0.1)
    with pytest.raises(ValueError, match="keys" + ending):
        moco_loss(good, bad, good, temperature=0.1)


@pytest.mark.parametrize("first", [-1, 3, 100])
def test_rows_without_a_positive_are_refused(first):
    rows, columns = draw(4, 3), draw(6, 3)
    message = rf"rows {first}\.\.{first + 3} have no positive among 6"
    with pytest.raises(ValueError, match=message):
        infonce_loss(rows, columns, temperature=0.1, first_positive=first)
    with pytest.raises(ValueError, match=message):
        nt_xent_loss(rows, columns, columns, temperature=0.1, first_positive=first)


@pytest.mark.parametrize("shape", [(5, 3), (6, 2), (6,), (0, 3)])
def test_others_that_are_not_as_the_columns_are_refused(shape):
    message = rf"others must be as columns, \(6, 3\), got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        nt_xent_loss(draw(4, 3), draw(6, 3), torch.zeros(shape), temperature=0.1)


def test_unequal_batches_are_refused():
    for pairwise in (byol_loss, negative_cosine_loss):
        with pytest.raises(ValueError, match=r"p has 4 rows, t has 1: one target per prediction"):
            pairwise(draw(4, 3), draw(1, 3))
    with pytest.raises(ValueError, match=r"queries has 4 rows, keys has 5"):
        moco_loss(draw(4, 3), draw(5, 3), draw(9, 3), temperature=0.1)


def test_unequal_widths_are_refused():
    for pairwise in (byol_loss, negative_cosine_loss):
        with pytest.raises(ValueError, match=r"p has width 3, t has 1"):
            pairwise(draw(4, 3), draw(4, 1))
    with pytest.raises(ValueError, match=r"rows has width 3, columns has 5"):
        infonce_loss(draw(4, 3), draw(4, 5), temperature=0.1)
    with pytest.raises(ValueError, match=r"queries has width 3, negatives has 2"):
        moco_loss(draw(4, 3), draw(4, 3), draw(9, 2), temperature=0.1)
    with pytest.raises(ValueError, match=r"negatives must be \[K, d\], got shape \(3,\)"):
        moco_loss(draw(4, 3), draw(4, 3), draw(3), temperature=0.1)
