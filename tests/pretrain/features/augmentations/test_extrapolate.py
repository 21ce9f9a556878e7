"""Extrapolation: the distribution of lambda."""

import math

import pytest
import torch

from tests.pretrain.features.helpers import augment, random_of, shares


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_extrapolate_lambda_is_a_scaled_beta_of_each_row(scale):
    n = 1000
    z = torch.eye(n, dtype=torch.float64)
    out = augment("extrapolate", z, random_of(n), z.roll(-1, 0), scale=scale, per_dimension=False)
    own, theirs = shares(out)  # (1 + lambda) and -lambda, times a factor
    lam = -theirs / (own + theirs) / scale
    assert -1e-12 <= float(lam.min()) < float(lam.max()) <= 1 + 1e-12
    assert abs(float(lam.mean()) - 0.5) < 4 * math.sqrt(0.05 / n)  # Beta(2, 2): variance 1/20
    assert abs(float(lam.var()) - 0.05) < 0.005


@pytest.mark.parametrize("per_dimension", [False, True])
def test_extrapolate_draws_for_each_dimension_if_it_shall(per_dimension):
    z, partner = torch.ones(50, 8, dtype=torch.float64), torch.zeros(50, 8, dtype=torch.float64)
    out = augment("extrapolate", z, random_of(50), partner, scale=1.0, per_dimension=per_dimension)
    spread = out.amax(dim=1) / out.amin(dim=1) - 1  # 1 + lambda is the same or differs
    assert bool((spread > 0.05).all()) if per_dimension else float(spread.abs().max()) < 1e-12
