"""Mask: share and place of the zeros."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pretrain.features.helpers import augment, features, random_of


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_mask_zeroes_its_share_and_scales_the_rest_alike(ratio, strength):
    z = features(n=400, d=64)
    out = augment("mask", z, random_of(400, 3), ratio=ratio, strength=strength)
    share = strength * ratio
    sigma = math.sqrt(max(share * (1 - share), 1e-9) / z.numel())
    assert abs(float((out == 0).double().mean()) - share) < 5 * sigma + 1e-4
    factor = out / z
    scaled = torch.where(out != 0, factor, factor.amax(dim=1, keepdim=True))
    torch.testing.assert_close(scaled, factor.amax(dim=1, keepdim=True).expand_as(z))


def test_mask_draws_each_dimension_of_each_row_on_its_own():
    kept = augment("mask", features(n=3000, d=8), random_of(3000, 4), ratio=0.3) != 0
    both = (kept[:, :-1] & kept[:, 1:]).double().mean()
    assert abs(float(both) - 0.49) < 0.01
    assert float((kept.double().mean(dim=0) - 0.7).abs().max()) < 0.04
    assert abs(float((kept[:-1] & kept[1:]).double().mean()) - 0.49) < 0.01


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 6),
    ratio=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**31),
)
def test_mask_keeps_at_least_one_dimension(n, d, ratio, seed):
    z = features(n, d, seed)
    out = augment("mask", z, random_of(n, seed), ratio=ratio)
    assert bool((out != 0).any(dim=1).all())
    torch.testing.assert_close(out.norm(dim=1), z.norm(dim=1))
