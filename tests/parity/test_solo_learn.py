"""Twenty steps in float64 against solo-learn's own classes, which run in their own environment.

Measured differences stand in docs/benchmarks.md; `-s` prints them.
"""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from pretrain.config import FAConfig, HeadConfig
from pretrain.model.backbones.base import Backbone
from pretrain.model.joint_embedding import FAContrastive
from pretrain.objectives.barlow import Barlow
from pretrain.objectives.deepclusterv2 import DeepClusterV2
from pretrain.objectives.vicreg import VicReg
from tests.golden.training import float64_is_kept
from tests.parity.test_lightly import agree
from tests.parity.tiny_network import TinyNetwork
from tests.pretrain.model.references import compare

PEER = os.environ.get("FA_SOLO_LEARN_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.skipif(
        PEER is None,
        reason="needs solo-learn: bash tests/parity/make_peer_env.sh DIR CHECKOUT, then set "
        "FA_SOLO_LEARN_PYTHON to DIR/bin/python",
    ),
]
NUM_EPOCHS, NUM_STEPS, BATCH = 5, 4, 8
SAMPLES, TOLERANCE = NUM_STEPS * BATCH, 1e-9
SGD = {"lr": 0.02, "momentum": 0.9}
HEADS = {"proj_hidden_dim": 32, "proj_output_dim": 16}
CASES = {
    "barlow": (Barlow(loss_weight=0.1), 3, "barlow", HEADS | {"lamb": 0.005, "scale_loss": 0.1}),
    "vicreg": (
        VicReg(), 3, "vicreg",
        HEADS | {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0},
    ),
    "deepclusterv2": (
        DeepClusterV2(num_prototypes=5, num_heads=3, kmeans_iterations=10), 2, "deepcluster",
        HEADS | {"num_prototypes": [5, 5, 5], "temperature": 0.1, "kmeans_iters": 10},
    ),
}  # fmt: skip


def make_model(name):
    objective, num_layers, _, _ = CASES[name]
    torch.manual_seed(0)
    heads = HeadConfig(projector_layers=num_layers, projector_hidden_dim=32, output_dim=16)
    arch = cast(Backbone, SimpleNamespace(build=lambda gamma: TinyNetwork()))
    return FAContrastive(arch, heads, objective, FAConfig(method="none"), num_samples=SAMPLES)


def generator_of(epoch):
    return torch.Generator().manual_seed(epoch)


def starts_of(epoch):
    """What our k-means draws: for each head an order of the samples."""
    generator = generator_of(epoch)
    return [torch.randperm(SAMPLES, generator=generator) for _ in range(3)]


def make_inputs(name):
    """Weights, views and orders of the samples."""
    _, _, log, method_kwargs = CASES[name]
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(NUM_EPOCHS * NUM_STEPS, 1, BATCH, 3, 16, 16, generator=generator)
    noise = torch.randn(len(base), 2, BATCH, 3, 16, 16, generator=generator)
    orders = [torch.randperm(SAMPLES, generator=generator) for _ in range(NUM_EPOCHS)]
    return {
        "weights": make_model(name).online.state_dict(),
        "views": base + 0.3 * noise,
        "orders": torch.stack(orders).view(NUM_EPOCHS, NUM_STEPS, BATCH),
        "starts": torch.stack([torch.stack(starts_of(e)) for e in range(NUM_EPOCHS)]),
        "method_kwargs": method_kwargs,
        "sgd": SGD,
        "log": log,
    }


@pytest.fixture(scope="module")
def inputs():
    with float64_is_kept():
        return {name: make_inputs(name) for name in CASES}


@pytest.fixture(scope="module")
def peer(inputs, tmp_path_factory):
    """solo-learn's results: {method: {name: tensor}}."""
    folder = tmp_path_factory.mktemp("peer")
    torch.save(inputs, folder / "inputs.pth")
    script = Path(__file__).with_name("peer_solo_learn.py")
    done = subprocess.run(
        [str(PEER), str(script), str(folder / "inputs.pth"), str(folder / "outputs.pth")],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "outputs.pth", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_agree(inputs, peer, name):
    torch.set_num_threads(1)
    given, theirs, losses = inputs[name], peer[name], []
    with float64_is_kept():
        model = make_model(name)
        optimizer = torch.optim.SGD(model.online.parameters(), **SGD)
        batches = iter(given["views"])
        for epoch, order in enumerate(given["orders"]):
            if epoch:
                model.start_epoch(generator_of(epoch))
            for ids in order:
                views = next(batches)
                loss_of = compare(model, views, torch.Generator())
                output = model.online(views, lambda z, c=loss_of, ids=ids: c(z, sample_ids=ids))
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
                model.after_optimizer_step(1.0, [output], ids)
                losses.append(output.loss.detach())
    first = NUM_STEPS if name == "deepclusterv2" else 0  # solo-learn's are not numbers there
    assert bool(theirs["losses"][:first].isnan().all())
    assert [float(loss) for loss in losses[:first]] == [0.0] * first
    agree(f"{name}, losses", torch.stack(losses[first:]), theirs["losses"][first:], TOLERANCE)
    weights = {k: v for k, v in model.online.state_dict().items() if v.is_floating_point()}
    gaps = {key: float((v - theirs[f"weights.{key}"]).abs().max()) for key, v in weights.items()}
    moved = max(float((v - given["weights"][key]).abs().max()) for key, v in weights.items())
    print(f"\n{name}, weights: largest difference {max(gaps.values()):.1e}, moved by {moved:.3f}")
    assert max(gaps.values()) < TOLERANCE, gaps
    assert moved > 0.01
    if first:
        kept = dict(model.memory.named_buffers())
        agree("centroids", kept["centroids"], theirs["centroids"], TOLERANCE)
        assert torch.equal(kept["assignments"], theirs["assignments"])
        assert len(kept["assignments"].unique()) == 5
