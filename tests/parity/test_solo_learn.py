"""Twenty steps in float64 against solo-learn's own classes, which run in their own environment.

Measured differences stand in docs/benchmarks.md, with what is set so that both agree; `-s` prints
them.
"""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pretrain.config import FAConfig, HeadConfig
from pretrain.features.memory_bank import SupportQueue
from pretrain.model.backbones.base import Backbone
from pretrain.model.joint_embedding import FAContrastive
from pretrain.objectives.barlow import Barlow
from pretrain.objectives.base import EmaObjective, Objective
from pretrain.objectives.byol import Byol
from pretrain.objectives.deepclusterv2 import DeepClusterV2
from pretrain.objectives.infonce import InfoNce
from pretrain.objectives.moco import MoCo
from pretrain.objectives.simclr import SimClr
from pretrain.objectives.simsiam import SimSiam
from pretrain.objectives.swav import SwAV
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
SAMPLES, QUEUE_SIZE, TOLERANCE = NUM_STEPS * BATCH, 4 * BATCH, 1e-9
LR, SGD_MOMENTUM = 0.02, 0.9
WIDTHS = {"proj_hidden_dim": 32, "pred_hidden_dim": 32, "proj_output_dim": 16}  # theirs
EMA = {"ema_tau": 0.9, "ema_tau_end": 0.99}
NO_FA = FAConfig(method="none")
NN = FAConfig(method="nn", queue_size=QUEUE_SIZE, min_fill=QUEUE_SIZE)
NO_BN = {"projector_hidden_bn": False}
SIAM = {"projector_layers": 3, "projector_last_bn": True, "projector_last_bn_affine": False}


@dataclass(frozen=True)
class Case:
    """A method of solo-learn, and what is the same here.

    Attributes:
        method, log: Its name, and the name of its loss among what it logs.
        objective, heads, fa: Ours; ``heads`` without the widths.
        kwargs: Its settings but the widths.
        num_small: Small crops of each sample.
        scale: Its loss over ours.
    """

    method: str
    log: str
    objective: Objective
    heads: dict[str, Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    fa: FAConfig = NO_FA
    num_small: int = 0
    scale: float = 1.0


SWAV = (
    "swav", "train_swav_loss",
    SwAV(temperature=0.1, num_prototypes=10, frozen_prototype_steps=NUM_STEPS), {},
    {"temperature": 0.1, "num_prototypes": 10, "freeze_prototypes_epochs": 1, "queue_size": 0},
)  # fmt: skip
CASES = {
    "barlow": Case(
        "barlow_twins", "train_barlow_loss", Barlow(loss_weight=0.1), {"projector_layers": 3},
        {"lamb": 0.005, "scale_loss": 0.1},
    ),
    "vicreg": Case(
        "vicreg", "train_vicreg_loss", VicReg(), {"projector_layers": 3},
        {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0},
    ),
    "deepclusterv2": Case(
        "deepclusterv2", "train_deepcluster_loss",
        DeepClusterV2(num_prototypes=5, num_heads=3, kmeans_iterations=10), {},
        {"num_prototypes": [5, 5, 5], "temperature": 0.1, "kmeans_iters": 10},
    ),
    "simclr": Case(
        "simclr", "train_nce_loss", SimClr(temperature=0.2), NO_BN, {"temperature": 0.2}
    ),
    "moco": Case(
        "mocov2plus", "train_nce_loss",
        MoCo(temperature=0.2, num_negatives=QUEUE_SIZE, **EMA), NO_BN,
        {"temperature": 0.2, "queue_size": QUEUE_SIZE},
    ),
    "byol": Case("byol", "train_neg_cos_sim", Byol(**EMA), {}),
    "byol-small": Case("byol", "train_neg_cos_sim", Byol(**EMA), {}, num_small=2, scale=3.0),
    "simsiam": Case("simsiam", "train_neg_cos_sim", SimSiam(), SIAM),
    "swav": Case(*SWAV),
    "swav-small": Case(*SWAV, num_small=2),
    "nnclr": Case(
        "nnclr", "train_nnclr_loss", InfoNce(temperature=0.2),
        {"projector_layers": 3, "projector_last_bn": True},
        {"temperature": 0.2, "queue_size": QUEUE_SIZE}, NN,
    ),
    "nnbyol": Case(
        "nnbyol", "train_neg_cos_sim", Byol(**EMA), {}, {"queue_size": QUEUE_SIZE}, NN
    ),
    "nnsiam": Case(
        "nnsiam", "train_neg_cos_sim", SimSiam(), SIAM, {"queue_size": QUEUE_SIZE}, NN
    ),
}  # fmt: skip


def make_model(case):
    """Ours, with queues that are full of random entries, as solo-learn's are, and in float64."""
    torch.manual_seed(0)
    widths = {"projector_hidden_dim": 32, "predictor_hidden_dim": 32, "output_dim": 16}
    arch = cast(Backbone, SimpleNamespace(build=lambda gamma: TinyNetwork()))
    heads = HeadConfig(**widths, **case.heads)
    model = FAContrastive(arch, heads, case.objective, case.fa, num_samples=SAMPLES).double()
    for queue in model.modules():
        if isinstance(queue, SupportQueue):
            queue.put(torch.randn(QUEUE_SIZE, 16))
    return model


def state_of(model):
    """Weights, BN statistics, EMA and queues under solo-learn's names."""
    state = model.online.state_dict()
    if isinstance(model.objective, SwAV):
        state["prototypes.weight_v"] = state.pop("prototypes.weight")
    if model.ema is not None:
        state |= {f"momentum_{key}": v for key, v in model.ema.state_dict().items()}
    if model.queue is not None:
        state["queue"] = model.queue.features
    if isinstance(model.objective, MoCo):
        state["queue"] = torch.stack([queue.features.T for queue in model.memory])
    return {key: v.clone() for key, v in state.items() if v.is_floating_point()}


def generator_of(epoch):
    return torch.Generator().manual_seed(epoch)


def starts_of(epoch):
    """What our k-means draws: for each head an order of the samples."""
    generator = generator_of(epoch)
    return [torch.randperm(SAMPLES, generator=generator) for _ in range(3)]


def make_inputs(case):
    """Weights, views and orders of the samples, and solo-learn's settings."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(NUM_EPOCHS * NUM_STEPS, 1, BATCH, 3, 16, 16, generator=generator)
    noise = torch.randn(len(base), 2, BATCH, 3, 16, 16, generator=generator)
    orders = [torch.randperm(SAMPLES, generator=generator) for _ in range(NUM_EPOCHS)]
    views, small = base + 0.3 * noise, base[..., 2:14, 2:14].repeat(1, case.num_small, 1, 1, 1, 1)
    small = small + 0.3 * torch.randn(small.shape, generator=generator)
    ema = case.objective if isinstance(case.objective, EmaObjective) else EmaObjective()
    return {
        "method": case.method,
        "log": case.log,
        "weights": state_of(make_model(case)),
        "views": views,
        "small_crops": small,
        "orders": torch.stack(orders).view(NUM_EPOCHS, NUM_STEPS, BATCH),
        "starts": torch.stack([torch.stack(starts_of(e)) for e in range(NUM_EPOCHS)]),
        "method_kwargs": WIDTHS | case.kwargs,
        "lr": LR / case.scale,
        "sgd_momentum": SGD_MOMENTUM,
        "momentum": {"base_tau": ema.ema_tau, "final_tau": ema.ema_tau_end},
    }


@pytest.fixture(scope="module")
def inputs():
    with float64_is_kept():
        return {name: make_inputs(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def peer(inputs, tmp_path_factory):
    """solo-learn's results: {case: {name: tensor}}."""
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
    case, given, theirs, losses, states = CASES[name], inputs[name], peer[name], [], []
    with float64_is_kept():
        model = make_model(case)
        optimizer = torch.optim.SGD(model.online.parameters(), lr=LR, momentum=SGD_MOMENTUM)
        batches = zip(given["views"], given["small_crops"], strict=True)
        for epoch, order in enumerate(given["orders"]):
            if epoch:
                model.start_epoch(generator_of(epoch))
            for ids in order:
                large, small = next(batches)
                views = [*large, *small]
                loss_of = compare(model, views, torch.Generator())
                output = model.online(views, lambda z, c=loss_of, ids=ids: c(z, sample_ids=ids))
                optimizer.zero_grad()
                output.loss.backward()
                model.before_update(len(losses))
                optimizer.step()
                tau = case.objective.tau(len(losses), NUM_EPOCHS * NUM_STEPS)
                model.after_optimizer_step(tau, [output], ids)
                losses.append(case.scale * output.loss.detach())
                states.append(state_of(model))
    first = NUM_STEPS if name == "deepclusterv2" else 0  # solo-learn's are not numbers there
    assert bool(theirs["losses"][:first].isnan().all())
    assert [float(loss) for loss in losses[:first]] == [0.0] * first
    agree(f"{name}, losses", torch.stack(losses[first:]), theirs["losses"][first:], TOLERANCE)
    gaps, moved = {}, 0.0
    for key, start in given["weights"].items():
        ours = torch.stack([state[key] for state in states])
        gaps[key] = float((ours - theirs[key]).abs().max())
        if "running" not in key and key != "queue":
            moved = max(moved, float((ours[-1] - start).abs().max()))
    largest = max(gaps.values())
    print(f"\n{name}, state: largest difference {largest:.1e}, weights moved by {moved:.3f}")
    assert largest < TOLERANCE, gaps
    assert moved > 0.01
    if first:
        kept = dict(model.memory.named_buffers())
        agree("centroids", kept["centroids"], theirs["centroids"], TOLERANCE)
        assert torch.equal(kept["assignments"], theirs["assignments"])
        assert len(kept["assignments"].unique()) == 5
