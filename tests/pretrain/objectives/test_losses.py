"""Losses against loops in float64, by gradient check, and by what must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.objectives.barlow import Barlow, barlow_loss
from pretrain.objectives.base import Pair
from pretrain.objectives.byol import byol_loss
from pretrain.objectives.infonce import infonce_loss
from pretrain.objectives.moco import moco_loss
from pretrain.objectives.simclr import nt_xent_loss
from pretrain.objectives.simsiam import negative_cosine_loss
from pretrain.objectives.vicreg import VicReg, covariance, invariance, variance
from tests.pretrain.model.references import cosine, draw


def cross_entropy(positive, negatives):
    """-log of the positive's share."""
    largest = max([positive, *negatives])
    total = sum(math.exp(x - largest) for x in [positive, *negatives])
    return largest + math.log(total) - positive


def mean_cosine_by_hand(p, t):
    return sum(cosine(a, b) for a, b in zip(p, t, strict=True)) / len(p)


def infonce_by_hand(rows, columns, temperature, first_positive):
    total = 0.0
    for own, row in enumerate(rows, start=first_positive):
        logits = [cosine(row, column) / temperature for column in columns]
        total += cross_entropy(logits.pop(own), logits)
    return total / len(rows)


def nt_xent_by_hand(rows, columns, others, temperature, first_positive):
    total = 0.0
    for own, row in enumerate(rows, start=first_positive):
        negatives = []
        for j in range(len(columns)):
            if j != own:
                negatives.append(cosine(row, columns[j]) / temperature)
                negatives.append(cosine(row, others[j]) / temperature)
        total += cross_entropy(cosine(row, columns[own]) / temperature, negatives)
    return total / len(rows)


def textbook_nt_xent(z_1, z_2, temperature):
    """SimCLR, algorithm 1: samples 2k and 2k + 1 are the views of picture k."""
    samples = [row for pair in zip(z_1, z_2, strict=True) for row in pair]
    total = 0.0
    for i, anchor in enumerate(samples):
        partner = i + 1 if i % 2 == 0 else i - 1
        similarity = [cosine(anchor, sample) / temperature for sample in samples]
        negatives = [s for k, s in enumerate(similarity) if k not in (i, partner)]
        total += cross_entropy(similarity[partner], negatives)
    return total / len(samples)


def moco_by_hand(queries, keys, negatives, temperature):
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        similarities = [cosine(query, negative) / temperature for negative in negatives]
        total += cross_entropy(cosine(query, key) / temperature, similarities)
    return total / len(queries)


def columns_of(rows):
    """Each dimension: its values less their mean."""
    return [[x - sum(column) / len(rows) for x in column] for column in zip(*rows, strict=True)]


def barlow_by_hand(o, t, off_diagonal_weight):
    """arXiv 2103.03230, algorithm 1: z-scores, D x D products over N, squared distance to 1."""
    scores = []
    for view in (o, t):
        columns = columns_of(view)
        stds = [math.sqrt(sum(x * x for x in c) / len(c) + 1e-5) for c in columns]
        scores.append([[x / s for x in c] for c, s in zip(columns, stds, strict=True)])
    total = 0.0
    for i, first in enumerate(scores[0]):
        for j, second in enumerate(scores[1]):
            entry = sum(x * y for x, y in zip(first, second, strict=True)) / len(o)
            total += (1 - entry) ** 2 if i == j else off_diagonal_weight * entry**2
    return total


def vicreg_by_hand(o, t, weights):
    """arXiv 2105.04906, algorithm 1."""
    n, d = len(o), len(o[0])
    pairs = [(x, y) for a, b in zip(o, t, strict=True) for x, y in zip(a, b, strict=True)]
    terms = [sum((x - y) ** 2 for x, y in pairs) / len(pairs), 0.0, 0.0]
    for columns in (columns_of(o), columns_of(t)):
        for i, first in enumerate(columns):
            for j, second in enumerate(columns):
                entry = sum(x * y for x, y in zip(first, second, strict=True)) / (n - 1)
                if i == j:
                    terms[1] += max(0.0, 1 - math.sqrt(entry + 1e-4)) / d
                else:
                    terms[2] += entry**2 / d
    return sum(w * term for w, term in zip(weights, terms, strict=True))


@pytest.mark.parity
@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 5), (9, 3)])
def test_barlow_and_vicreg_equal_a_loop(n, d):
    o, t = draw(2, n, d, seed=n + d) * torch.tensor([0.3, 1.2]).view(2, 1, 1)
    pair, rows = Pair(o, t, t, 1), (o.tolist(), t.tolist())
    for weights in ((25.0, 25.0, 1.0), (1.0, 0.5, 3.0)):
        names = ("invariance_weight", "variance_weight", "covariance_weight")
        loss = VicReg(**dict(zip(names, weights, strict=True))).loss(pair, None)
        assert float(loss) == pytest.approx(vicreg_by_hand(*rows, weights), rel=1e-12)
    for off_diagonal_weight, loss_weight in ((0.005, 0.025), (0.5, 1.0)):
        objective = Barlow(off_diagonal_weight=off_diagonal_weight, loss_weight=loss_weight)
        expected = loss_weight * barlow_by_hand(*rows, off_diagonal_weight)
        assert float(objective.loss(pair, None)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5), (7, 3)])
def test_byol_and_simsiam_equal_a_loop(n, d):
    p, t = draw(n, d, seed=n), draw(n, d, seed=d + 100)
    expected = mean_cosine_by_hand(p.tolist(), t.tolist())
    assert abs(float(byol_loss(p, t)) - (2 - 2 * expected)) < 1e-12
    assert abs(float(negative_cosine_loss(p, t)) + expected) < 1e-12


@pytest.mark.parity
@pytest.mark.parametrize(("n", "m", "first"), [(1, 1, 0), (4, 4, 0), (3, 9, 3), (3, 9, 6)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_infonce_and_nt_xent_equal_a_loop(n, m, first, temperature):
    rows, columns, others = draw(n, 6, seed=1), draw(m, 6, seed=2), draw(m, 6, seed=3)
    options = {"temperature": temperature, "first_positive": first}
    losses: list = [(infonce_loss, infonce_by_hand, [rows, columns])]
    losses += [(nt_xent_loss, nt_xent_by_hand, [rows, columns, others])]
    for loss, by_hand, inputs in losses:
        expected = by_hand(*(x.tolist() for x in inputs), temperature, first)
        assert abs(float(loss(*inputs, **options)) - expected) < 1e-12
        single = loss(*(x.float() for x in inputs), **options)
        assert abs(float(single) - expected) < 1e-6 * max(1.0, expected)


@pytest.mark.parity
@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(1, 6),
    num_negatives=st.integers(0, 12),
    d=st.integers(1, 6),
    temperature=st.floats(0.05, 2.0),
    seed=st.integers(0, 2**31),
)
def test_nt_xent_is_the_textbook_s_and_moco_equals_a_loop(n, num_negatives, d, temperature, seed):
    z_1, z_2 = draw(2, n, d, seed=seed)
    one = nt_xent_loss(z_2, z_1, z_2, temperature=temperature)
    other = nt_xent_loss(z_1, z_2, z_1, temperature=temperature)
    expected = textbook_nt_xent(z_1.tolist(), z_2.tolist(), temperature)
    assert abs(float(one + other) / 2 - expected) < 1e-11
    negatives = draw(num_negatives, d, seed=seed + 1)
    expected = moco_by_hand(z_1.tolist(), z_2.tolist(), negatives.tolist(), temperature)
    assert abs(float(moco_loss(z_1, z_2, negatives, temperature=temperature)) - expected) < 1e-11


# --- every loss as a function of predictions p, targets t and further features e, all [n, d]

LOSSES = {
    "byol": lambda p, t, e: byol_loss(p, t),
    "simsiam": lambda p, t, e: negative_cosine_loss(p, t),
    "infonce": lambda p, t, e: infonce_loss(t, p, temperature=0.2),
    "nt_xent": lambda p, t, e: nt_xent_loss(t, p, e, temperature=0.2),
    "moco": lambda p, t, e: moco_loss(p, t, e, temperature=0.2),
}
OF_BATCH = {
    "barlow": lambda p, t, e: barlow_loss(p, t, off_diagonal_weight=0.3),
    "vicreg": lambda p, t, e: invariance(p, t) + variance(p / 3) + covariance(p) + covariance(t),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.mark.parametrize("loss", (LOSSES | OF_BATCH).values(), ids=LOSSES | OF_BATCH)
def test_gradient_reaches_all_inputs(loss):
    """The caller decides what is detached. Gradients equal finite differences."""
    inputs = [draw(4, 3, seed=seed).requires_grad_() for seed in (3, 4, 5)]
    assert torch.autograd.gradcheck(loss, inputs)
    gradients = torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)
    used = [g for g in gradients if g is not None]
    assert len(used) == (3 if loss in (LOSSES["nt_xent"], LOSSES["moco"]) else 2)
    assert all(float(g.abs().sum()) > 0 for g in used)


@every_loss
def test_order_length_and_rotation_do_not_matter(loss):
    p, t, e = draw(3, 8, 5, seed=1)
    value = loss(p, t, e)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(p[order], t[order], e[order]), value)
    assert not torch.isclose(loss(p, t[order], e), value)
    scale = draw(3, 8, 1, seed=101).abs() + 0.1
    torch.testing.assert_close(loss(p * scale[0], t * scale[1], e * scale[2]), value)
    rotation = torch.linalg.qr(draw(5, 5, seed=201)).Q
    torch.testing.assert_close(loss(p @ rotation, t @ rotation, e @ rotation), value)
    assert not torch.isclose(loss(p @ rotation, t, e), value)


def test_known_values():
    p = draw(8, 5, seed=6)
    assert float(byol_loss(p, p)) == pytest.approx(0, abs=1e-12)
    assert float(byol_loss(p, -p)) == pytest.approx(4)
    same = torch.ones(6, 3, dtype=torch.float64)
    assert float(infonce_loss(same, same, temperature=0.1)) == pytest.approx(math.log(6))
    assert float(nt_xent_loss(same, same, same, temperature=0.1)) == pytest.approx(math.log(11))
    assert float(moco_loss(same, same, same, temperature=0.1)) == pytest.approx(math.log(7))
    assert float(moco_loss(p, -p, p[:0], temperature=0.1)) == 0
    assert float(negative_cosine_loss(p, -p)) == pytest.approx(1)
    # Two uncorrelated dimensions; the other view's are swapped.
    square = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    options = {"off_diagonal_weight": 0.5}
    assert float(barlow_loss(square, square, **options)) == pytest.approx(0, abs=1e-9)
    assert float(barlow_loss(square, square.flip(1), **options)) == pytest.approx(3, abs=1e-3)
    assert float(covariance(square)) == pytest.approx(0, abs=1e-12)
    assert float(variance(0 * square)) == pytest.approx(0.99)
    assert float(variance(2 * square)) == 0


@pytest.mark.parametrize("loss", [byol_loss, negative_cosine_loss])
@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (5, 3)])
def test_unequal_shapes_are_never_broadcast(loss, shape):
    with pytest.raises(AssertionError):
        loss(draw(4, 3), draw(*shape))
    with pytest.raises(AssertionError):
        moco_loss(draw(4, 3), draw(*shape), draw(9, 3), temperature=0.1)
