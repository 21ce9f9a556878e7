"""Collapse figures of features whose figures are known."""

import math

import pytest
import torch

from pretrain.model.diagnostics import effective_rank, feature_std


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_spread_features_have_std_1_and_collapsed_ones_0():
    assert feature_std(gaussian(4000, 64)) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(50, 8)) == pytest.approx(0, abs=1e-6)
    assert feature_std(gaussian(50, 8) * 1e-3 + 5) < 0.01


def test_std_equals_its_definition_and_ignores_scale():
    z = gaussian(7, 3, seed=2)
    unit = [[x / math.sqrt(sum(v * v for v in row)) for x in row] for row in z.tolist()]
    total = 0.0
    for d in range(3):
        column = [row[d] for row in unit]
        mean = sum(column) / 7
        total += math.sqrt(sum((x - mean) ** 2 for x in column) / 7)
    expected = total / 3 * math.sqrt(3)
    assert feature_std(z) == pytest.approx(expected, rel=1e-5)
    assert feature_std(z * 100) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_rank_of_k_equal_directions_is_k(k):
    """Rows +-e_1 .. +-e_k: centred already, k equal singular values."""
    basis = torch.eye(16)[:k]
    assert effective_rank(torch.cat([basis, -basis])) == pytest.approx(k, rel=1e-9)


def test_rank_of_a_known_spectrum():
    """a rows +-e_1 and b rows +-e_2 have singular values sqrt(2 a) and sqrt(2 b)."""
    e = torch.eye(4)
    z = torch.cat([e[0].repeat(9, 1), -e[0].repeat(9, 1), e[1].repeat(1, 1), -e[1].repeat(1, 1)])
    shares = [3 / 4, 1 / 4]  # of sqrt(18) and sqrt(2)
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(z) == pytest.approx(expected, rel=1e-9)


def test_rank_ignores_scale_and_rotation():
    z = gaussian(40, 6, seed=1).double()
    rotation = torch.linalg.qr(gaussian(6, 6, seed=2).double()).Q
    scale = 0.1 + torch.rand(40, 1, generator=torch.Generator().manual_seed(0)).double()
    assert effective_rank(z @ rotation * scale) == pytest.approx(effective_rank(z), rel=1e-9)


def test_rank_of_a_collapsed_batch_is_0_and_of_noise_is_high():
    assert effective_rank(torch.ones(20, 8)) == 0.0
    assert effective_rank(gaussian(3, 8)[:1].repeat(20, 1)) == 0.0
    assert 7.9 < effective_rank(gaussian(5000, 8)) <= 8


def test_rank_is_at_most_the_samples_or_the_dimensions():
    assert effective_rank(gaussian(5, 100)) <= 4 + 1e-9  # centring takes one
    assert effective_rank(gaussian(100, 5)) <= 5 + 1e-9
