"""Losses against loops in float64, by gradient check, and by what must not matter."""

import math
import re

import pytest
import torch

from pretrain.objectives.byol import byol_loss
from pretrain.objectives.infonce import infonce_loss
from pretrain.objectives.moco import moco_loss
from pretrain.objectives.simclr import nt_xent_loss
from pretrain.objectives.simsiam import negative_cosine_loss
from tests.pretrain.model.references import (
    draw,
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
