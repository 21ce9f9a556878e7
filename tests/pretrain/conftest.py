"""Small networks, batches and shards for the tests of pretraining."""

import dataclasses

import pytest
import torch

from pretrain.config import FAConfig, HeadConfig
from pretrain.features.augmentations.base import FeatureAugmentation
from pretrain.model.joint_embedding import FAContrastive
from pretrain.objectives.base import Objective
from tests.pretrain.data.picture_helpers import pack_pictures
from tests.pretrain.model.two_layers import TwoLayers

TINY_HEADS = HeadConfig(projector_hidden_dim=24, predictor_hidden_dim=24, output_dim=12)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _products_as_before():
    """A run sets the precision of products for its whole process."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn


def make_objective(name, **options):
    """An objective by name; options that are another objective's are left out."""
    cls = Objective.registry[name]
    own = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in options.items() if key in own})


def make_fa(**options):
    """Settings of FA: make_fa(method="nn", nn={"top_k": 3}, ..)."""
    methods = FeatureAugmentation.registry
    return FAConfig(**{
        key: methods[key](**value) if isinstance(value, dict) else value
        for key, value in options.items()
    })  # fmt: skip


@pytest.fixture
def bank():
    """40 features for a queue."""
    return torch.randn(40, 12, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def make_model():
    """A factory of small assemblies: make_model("byol", method="nn", ..)."""

    def make(
        objective="infonce", *, seed=0, objective_options=None, heads=TINY_HEADS,
        arch=TwoLayers(), **fa,  # noqa: B008
    ):  # fmt: skip
        fa.setdefault("queue_size", 64)
        nn = fa.get("nn", {})
        fa.setdefault("min_fill", nn.get("top_k", 1) if isinstance(nn, dict) else nn.top_k)
        torch.manual_seed(seed)
        options = {"temperature": 0.2} | (objective_options or {})
        objective = make_objective(objective, **options)
        return FAContrastive(arch, heads, objective, make_fa(**fa), num_samples=64)

    return make


@pytest.fixture
def make_views():
    """A factory of random views [2, n, 3, s, s], as normalised pictures would be."""

    def make(n=8, size=32, seed=0):
        generator = torch.Generator().manual_seed(1000 + seed)
        base = torch.randn(1, n, 3, size, size, generator=generator)
        return base + 0.3 * torch.randn(2, n, 3, size, size, generator=generator)

    return make


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory):
    """A factory of shard sets: make_shards("name", num=40, classes=["class-0", "class-1"])."""

    def make(name, **options):
        return pack_pictures(tmp_path_factory.mktemp(name), **options)

    return make


@pytest.fixture(scope="session")
def shards(make_shards):
    """40 labelled pictures of 2 classes in 4 shards; not to be changed."""
    return make_shards("shards")


@pytest.fixture(scope="session")
def unlabelled_shards(make_shards):
    """24 pictures without labels; not to be changed."""
    return make_shards("unlabelled", num=24, classes=None)
