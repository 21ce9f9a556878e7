"""Small networks, batches and shards for the tests of pretraining."""

import numpy as np
import pytest
import torch

from pretrain.config import ArchConfig, FAConfig, HeadConfig, ObjectiveConfig
from pretrain.models.contrastive import FAContrastive

THIN = ArchConfig(depth=50, width_per_group=8, stem_channels=8, res2_channels=32)
TINY_HEADS = HeadConfig(projector_hidden_dim=24, predictor_hidden_dim=24, output_dim=12)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same global random state, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.default_rng(0)


@pytest.fixture
def make_model():
    """A factory of small assemblies: make_model("byol", method="nn", ..)."""

    def make(objective="infonce", *, seed=0, objective_options=None, heads=TINY_HEADS, **fa):
        fa.setdefault("queue_size", 64)
        fa.setdefault("min_fill", fa.get("top_k", 1))
        torch.manual_seed(seed)
        options = {"temperature": 0.2} | (objective_options or {})
        return FAContrastive(
            THIN, heads, ObjectiveConfig(name=objective, **options), FAConfig(**fa)
        )

    return make


@pytest.fixture
def make_views():
    """A factory of random views [2, n, 3, s, s], as normalised pictures would be."""

    def make(n=8, size=32, seed=0):
        generator = torch.Generator().manual_seed(1000 + seed)
        base = torch.randn(1, n, 3, size, size, generator=generator)
        return base + 0.3 * torch.randn(2, n, 3, size, size, generator=generator)

    return make
