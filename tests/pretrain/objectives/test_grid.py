"""The whole grid: every objective with every augmentation in every architecture makes two steps.

Those that cannot train are refused when the config is read, with the reason.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from pretrain.config import DataConfig, OptimConfig, PretrainConfig
from pretrain.engine.contrastive_task import ContrastiveTask
from pretrain.engine.trainer import Position
from pretrain.features.augmentations.base import FeatureAugmentation
from pretrain.objectives.base import Objective
from pretrain.run import make_model
from tests.pretrain.conftest import TINY_HEADS, make_fa, make_objective
from tests.pretrain.model.two_layers import TwoLayers

N, CPU = 4, torch.device("cpu")
METHODS = ("none", *FeatureAugmentation.registry.names(), "nn+mask", "nn|mixup")
PLACES = [
    ("basic", "target"), ("basic", "online"), ("pre", "auto"), ("post", "auto"),
    ("parallel", "auto"),
]  # fmt: skip
BASE = PretrainConfig()
BASE = replace(
    BASE, arch=TwoLayers(), heads=TINY_HEADS, data=DataConfig(batch_size=N, image_size=16),
    optim=OptimConfig(name="sgd", epochs=3, warmup_epochs=0, base_lr=1.0),
    engine=replace(BASE.engine, device="cpu", precision="fp32"),
)  # fmt: skip


def two_steps(config):
    """In epochs of one step, from the second on where the first only collects."""
    torch.manual_seed(0)
    model, optimizer = make_model(config, CPU, num_samples=N)
    pipeline = SimpleNamespace(num_steps=1, fingerprint=None)
    task = ContrastiveTask(config, model, optimizer, pipeline, Path("none"), CPU)  # type: ignore
    ids = torch.arange(N)
    samples = SimpleNamespace(sample_ids=ids, labels=ids, repeats=ids, sample_hashes=ids)
    first = 1 if config.objective.needs_sample_ids else 0
    moved = set()
    for number in range(first + 2):
        size = config.data.image_size
        batch = SimpleNamespace(views=torch.randn(2, N, 3, size, size), samples=samples)
        before = {k: v.clone() for k, v in model.online.named_parameters()}
        result = task.step(batch, Position(number, number), is_logged=False, is_saved=False)  # type: ignore
        assert bool(torch.isfinite(result.loss))
        now = dict(model.online.named_parameters())
        moved |= {k.partition(".")[0] for k, v in before.items() if not torch.equal(now[k], v)}
        assert number >= first or not moved
    return moved, result.output


def refusal(config, objective, fa):
    """Why the config is refused; empty if it is not."""
    try:
        replace(config, objective=objective, fa=fa)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("objective", Objective.registry.names())
def test_every_cell_trains_or_is_refused(objective):
    options = {"num_prototypes": 3, "num_negatives": 8, "frozen_prototype_steps": 0}
    trained, refused = 0, 0
    size = 33 if objective == "masked_prediction" else 16  # its map has 2 x 2 positions
    sized = replace(BASE, data=replace(BASE.data, image_size=size))
    for architecture, side in PLACES:
        for method in METHODS:
            fa = make_fa(
                method=method, architecture=architecture, side=side, queue_size=8, min_fill=2,
                strength=0.5,
            )  # fmt: skip
            base = make_objective(objective, **options)
            if objective == "masked_prediction" and method == "mask":
                fa = replace(fa, stop_gradient=False)
            reason = refusal(sized, base, fa)
            if reason:
                refused += 1
                if objective == "masked_prediction":  # it takes masks alone, in one architecture
                    assert "use fa." in reason
                    continue
                assert "cannot train: no gradient reaches the" in reason
                fa = replace(fa, stop_gradient=False)  # the remedy that it names
            moved, output = two_steps(replace(sized, objective=base, fa=fa))
            parts = {"backbone", "projector"} | ({"prototypes"} if objective == "swav" else set())
            parts |= set() if architecture == "basic" else {"predictor"}
            assert moved == parts, (architecture, side, method)
            assert output.is_augmented
            same = torch.equal(output.augmented, output.original)
            assert same == (method in ("none", "identity")), (architecture, side, method)
            trained += 1
    if objective == "masked_prediction":
        assert (trained, refused) == (1, len(PLACES) * len(METHODS) - 1)
        return
    assert trained == len(PLACES) * len(METHODS)
    # Without a target to learn through, FA's stop on the online side leaves none; `post` neither.
    stops = objective in ("byol", "moco", "simsiam", "swav", "deepclusterv2")
    assert refused == (3 if stops else 1) * (len(METHODS) - 1)
