"""SimCLR: its loss against loops, the assembly against the definition."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.objectives.simclr import nt_xent_loss
from tests.pretrain.model import references
from tests.pretrain.model.references import (
    assert_same,
    cosine,
    cross_entropy_by_hand,
    draw,
    projections,
    step,
)


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


@pytest.mark.parametrize("shape", [(5, 3), (6, 2), (6,), (0, 3)])
def test_others_that_are_not_as_the_columns_are_refused(shape):
    message = rf"others must be as columns, \(6, 3\), got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        nt_xent_loss(draw(4, 3), draw(6, 3), torch.zeros(shape), temperature=0.1)


@pytest.mark.parity
@pytest.mark.parametrize("training", [True, False])
def test_simclr_equals_its_definition(make, make_views, training):
    model, views = make("simclr", method="none").train(training), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    first, second = projections(twin, views)
    assert_same(model, twin, loss, references.nt_xent(first, second, 0.2))
