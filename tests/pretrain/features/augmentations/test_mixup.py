"""Mixup: the distribution of lambda, for rows and partners that are unit vectors."""

import math

import numpy as np
import pytest
import torch

from tests.pretrain.features.helpers import augment, random_of, shares


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_mixup_lambda_has_the_moments_of_a_folded_beta(alpha, strength):
    """lambda = max(l, 1 - l), l ~ Beta(alpha, alpha): moments by numerical integration."""
    n = 1000
    z = torch.eye(n, dtype=torch.float64)
    out = augment("mixup", z, random_of(n), z.roll(-1, 0), alpha=alpha, strength=strength)
    own, theirs = shares(out)
    lam = 1 - theirs / (own + theirs) / strength
    # l = sin^2(u) takes the end points' singularity of alpha < 1 away
    u = (np.arange(200_000) + 0.5) / 200_000 * (math.pi / 2)
    density = np.sin(u) ** (2 * alpha - 1) * np.cos(u) ** (2 * alpha - 1)
    density /= density.sum()
    folded_beta = np.maximum(np.sin(u) ** 2, np.cos(u) ** 2)
    for moment in (1, 2, 4):
        values = folded_beta**moment
        mean = (values * density).sum()
        std = math.sqrt((values**2 * density).sum() - mean**2)
        assert abs(float((lam**moment).mean()) - mean) < 4 * std / math.sqrt(n), moment
    assert 0.5 - 1e-12 <= float(lam.min()) < float(lam.max()) <= 1
    assert len(set(lam.tolist())) > n - 10, "a lambda for each row"
    assert int((out > 0).sum()) == 2 * n, "own and partner's dimension, nothing else"
