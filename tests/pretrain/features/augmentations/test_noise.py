"""Noise: its size."""

import numpy as np
import pytest

from tests.pretrain.features.helpers import augment, features, random_of


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_noise_has_the_size_that_is_defined(sigma):
    """|noise| is about sigma |z|: undo the renormalisation by projecting on z's direction."""
    z = features(n=2000, d=64)
    out = augment("noise", z, random_of(2000, 5), sigma=sigma)
    unit = z / z.norm(dim=1, keepdim=True)
    along = (out * unit).sum(dim=1, keepdim=True)
    # out = c (z + e) with |out| = |z|; e's part across z is sigma |z| / sqrt(d) eps with d - 1 dims
    tangent = ((out - along * unit).norm(dim=1) / along.abs().squeeze(1)).numpy()
    simulated = np.random.default_rng(0)
    across = sigma * np.sqrt(simulated.chisquare(63, 200_000) / 64)
    lengthwise = np.abs(1 + sigma / 8 * simulated.standard_normal(200_000))
    assert abs(np.median(tangent) / np.median(across / lengthwise) - 1) < 0.02
