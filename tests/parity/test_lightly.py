"""Losses, heads and queue against lightly, which computes the same inputs in its own environment.

Measured differences stand in docs/benchmarks.md; `-s` prints them.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from pretrain.features.memory_bank import SupportQueue
from pretrain.model.joint_embedding import mlp
from pretrain.objectives.byol import byol_loss
from pretrain.objectives.infonce import infonce_loss
from pretrain.objectives.moco import moco_loss
from pretrain.objectives.simclr import nt_xent_loss
from pretrain.objectives.simsiam import negative_cosine_loss
from pretrain.objectives.swav import prototype_scores, sinkhorn, swav_loss

PEER = os.environ.get("FA_PEER_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.skipif(
        PEER is None,
        reason="needs lightly: bash tests/parity/make_peer_env.sh DIR, then set FA_PEER_PYTHON to "
        "DIR/bin/python",
    ),
]
DOUBLE, SINGLE = 1e-12, 2e-6  # largest difference allowed, by precision of the computation
NUM_ROWS, DIM, TEMPERATURE, QUEUE_SIZE = 12, 16, 0.2, 48
SWAV = {"temperature": 0.1, "epsilon": 0.05, "num_iterations": 3}
HEADS = {
    "byol": {"num_layers": 2},
    "moco": {"num_layers": 2, "hidden_bn": False},
    "nnclr": {"num_layers": 3, "last_bn": True},
    "simsiam": {"num_layers": 3, "last_bn": True, "last_bn_affine": False},
}


def draw(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_head(kind):
    """A head whose BN layers do something: scales, shifts and running statistics are drawn."""
    torch.manual_seed(0)
    head = mlp(20, 32, 8, **HEADS[kind]).double()
    for i, (name, value) in enumerate(head.state_dict().items()):
        if value.is_floating_point() and value.ndim == 1:
            drawn = draw(len(value), seed=i)
            value.copy_(drawn.abs() + 0.5 if "var" in name else drawn)
    return head


def make_inputs():
    """Arguments of each case of peer_lightly.py."""
    z_1, z_2 = draw(NUM_ROWS, DIM, seed=1), draw(NUM_ROWS, DIM, seed=2)
    neighbours = functional.normalize(draw(NUM_ROWS, DIM, seed=3), dim=1)
    scores = torch.tanh(draw(2, NUM_ROWS, 10, seed=4))
    single = torch.float32  # lightly's bank is
    queries, keys = draw(2, 7, NUM_ROWS, DIM, seed=5, dtype=single)
    batches = functional.normalize(draw(6, NUM_ROWS, DIM, seed=6, dtype=single), dim=2)
    uneven = functional.normalize(draw(6, 10, DIM, seed=7, dtype=single), dim=2)
    x = draw(NUM_ROWS, DIM, seed=8, dtype=single)
    cases = {
        "cosine": {"z_1": z_1, "z_2": z_2},
        "nt_xent": {"z_1": z_1, "z_2": z_2, "temperature": TEMPERATURE},
        "nt_xent_of_neighbours": {"z_1": neighbours, "z_2": z_2, "temperature": TEMPERATURE},
        "moco": {"queries": queries, "keys": keys, "temperature": TEMPERATURE, "size": QUEUE_SIZE},
        "swav": {"scores_1": scores[0], "scores_2": scores[1], **SWAV},
        "neighbours": {"batches": batches, "queries": x, "size": QUEUE_SIZE},
        "neighbours_uneven": {"batches": uneven, "queries": x, "size": QUEUE_SIZE},
        "prototypes": {
            "x": z_1, "weight": draw(10, DIM, seed=9), "bias": draw(10, seed=10),
        },
    }  # fmt: skip
    for kind in HEADS:
        cases[f"head-{kind}"] = {"x": draw(NUM_ROWS, 20, seed=11), **make_head(kind).state_dict()}
    return {
        case: {name: torch.as_tensor(np.asarray(value)) for name, value in values.items()}
        for case, values in cases.items()
    }


@pytest.fixture(scope="module")
def inputs():
    return make_inputs()


@pytest.fixture(scope="module")
def peer(inputs, tmp_path_factory):
    """lightly's results: {case: {name: tensor}}."""
    folder = tmp_path_factory.mktemp("peer")
    arrays = {f"{c}/{name}": value.numpy() for c, v in inputs.items() for name, value in v.items()}
    np.savez(folder / "inputs.npz", **arrays)
    script = Path(__file__).with_name("peer_lightly.py")
    done = subprocess.run(
        [str(PEER), str(script), str(folder / "inputs.npz"), str(folder / "outputs.npz")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, torch.Tensor]] = {}
    with np.load(folder / "outputs.npz") as given:
        assert str(given["version"]) == "1.6.0"
        for key in given.files:
            if "/" in key:
                case, name = key.split("/")
                results.setdefault(case, {})[name] = torch.from_numpy(given[key])
    return results


def agree(what, ours, theirs, tolerance):
    """Equal shapes and values; the largest difference is printed."""
    assert ours.shape == theirs.shape
    difference = float((ours.detach() - theirs).abs().max())
    value = f", value {float(theirs):.6f}" if theirs.ndim == 0 else ""
    print(f"\n{what}: largest difference {difference:.1e} of {tolerance:.0e}{value}")
    assert difference <= tolerance


def agree_with_gradient(what, loss, inputs, theirs):
    """Both loss and gradients, in float64."""
    agree(f"{what}, loss", loss, theirs["loss"], DOUBLE)
    gradients = torch.stack(torch.autograd.grad(loss, inputs))
    agree(f"{what}, gradient", gradients, theirs["gradients"], DOUBLE)


def leaves(inputs, *names):
    return [inputs[name].clone().requires_grad_() for name in names]


def test_negative_cosine(inputs, peer):
    z = leaves(inputs["cosine"], "z_1", "z_2")
    agree_with_gradient("SimSiam", negative_cosine_loss(*z), z, peer["cosine"])
    scaled = {"loss": 2 + 2 * peer["cosine"]["loss"], "gradients": 2 * peer["cosine"]["gradients"]}
    agree_with_gradient("BYOL, as 2 + 2 x lightly's", byol_loss(*z), z, scaled)


def test_nt_xent(inputs, peer):
    z_1, z_2 = leaves(inputs["nt_xent"], "z_1", "z_2")
    one = nt_xent_loss(z_2, z_1, z_2, temperature=TEMPERATURE)
    other = nt_xent_loss(z_1, z_2, z_1, temperature=TEMPERATURE)
    agree_with_gradient("SimCLR", (one + other) / 2, (z_1, z_2), peer["nt_xent"])


def test_nnclr_has_more_terms_in_lightly(inputs, peer):
    """lightly's NNCLR is NT-Xent of (NN(z_1), p_2); the paper's has rows and columns only."""
    rows, p = leaves(inputs["nt_xent_of_neighbours"], "z_1", "z_2")
    theirs = peer["nt_xent_of_neighbours"]
    to_p = nt_xent_loss(rows, p, rows, temperature=TEMPERATURE)
    from_p = nt_xent_loss(p, rows, p, temperature=TEMPERATURE)
    agree_with_gradient("NNCLR, as lightly defines it", (to_p + from_p) / 2, (rows, p), theirs)
    gap = float(theirs["loss"] - infonce_loss(rows, p, temperature=TEMPERATURE).detach())
    print(f"\nNNCLR, lightly's definition above the paper's: {gap:.3f}")
    assert gap > 0.1


def test_moco_with_what_the_bank_held(inputs, peer):
    for i, (query, key) in enumerate(
        zip(inputs["moco"]["queries"], inputs["moco"]["keys"], strict=True)
    ):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        loss = moco_loss(q, k, peer["moco"]["banks"][i], temperature=TEMPERATURE)
        agree(f"MoCo, step {i}, loss", loss, peer["moco"]["losses"][i], SINGLE)
        gradients = torch.stack(torch.autograd.grad(loss, (q, k)))
        theirs = peer["moco"]["gradients"][2 * i : 2 * i + 2]
        agree(f"MoCo, step {i}, gradient", gradients, theirs, SINGLE)


def test_moco_with_our_queue_once_both_are_full(inputs, peer):
    """Before that lightly's negatives are random vectors, ours only those that were put in."""
    queue = SupportQueue(QUEUE_SIZE, DIM)
    pairs = zip(inputs["moco"]["queries"], inputs["moco"]["keys"], strict=True)
    for i, (query, key) in enumerate(pairs):
        loss = moco_loss(query, key, queue.features[: int(queue.count)], temperature=TEMPERATURE)
        theirs = peer["moco"]["losses"][i]
        if int(queue.count) == QUEUE_SIZE:
            agree(f"MoCo with our queue, step {i}, loss", loss, theirs, SINGLE)
        else:
            assert float(theirs - loss) > 0.01
        queue.put(key)
    assert int(queue.count) == QUEUE_SIZE


def test_swav(inputs, peer):
    scores = leaves(inputs["swav"], "scores_1", "scores_2")
    options = {"epsilon": SWAV["epsilon"], "num_iterations": SWAV["num_iterations"]}
    codes = [sinkhorn(s, **options) for s in scores]
    agree("Sinkhorn codes", codes[0], peer["swav"]["codes"], DOUBLE)
    one = swav_loss(scores[1], codes[0], temperature=SWAV["temperature"])
    other = swav_loss(scores[0], codes[1], temperature=SWAV["temperature"])
    agree_with_gradient("SwAV", (one + other) / 2, scores, peer["swav"])


def test_nearest_neighbours_in_a_filled_queue(inputs, peer):
    given, theirs = inputs["neighbours"], peer["neighbours"]
    queue = SupportQueue(QUEUE_SIZE, DIM)
    for batch in given["batches"]:
        queue.put(batch)
    assert int(queue.count) == QUEUE_SIZE
    assert int(queue.position) == int(theirs["pointer"]) == 24
    agree("queue, entries", queue.features, theirs["bank"], SINGLE)
    found = queue.features[queue.nearest_indices(given["queries"], 1)[:, 0]]
    agree("queue, nearest neighbours", found, theirs["nearest"], SINGLE)


def test_lightly_drops_what_does_not_fit_before_the_end(inputs, peer):
    """Batches of 10 in a bank of 48: 2 rows of the fifth are lost, and the sixth starts at 0."""
    batches, theirs = inputs["neighbours_uneven"]["batches"], peer["neighbours_uneven"]
    queue = SupportQueue(QUEUE_SIZE, DIM)
    for batch in batches:
        queue.put(batch)
    assert int(theirs["pointer"]) == 10
    assert int(queue.position) == 60 % QUEUE_SIZE
    torch.testing.assert_close(theirs["bank"][:10], batches[5])
    torch.testing.assert_close(queue.features[:12], torch.cat([batches[4][8:], batches[5]]))
    lost = batches[4][8:] @ theirs["bank"].T
    assert float(lost.max()) < 0.999


@pytest.mark.parametrize("kind", HEADS)
def test_head(inputs, peer, kind):
    """The same weights under the same names give the same outputs, with batch statistics or not."""
    x, head = inputs[f"head-{kind}"]["x"], make_head(kind)
    agree(f"{kind} head, training", head(x), peer[f"head-{kind}"]["train"], DOUBLE)
    agree(f"{kind} head, evaluation", head.eval()(x), peer[f"head-{kind}"]["eval"], DOUBLE)


def test_prototypes_have_no_bias_here(inputs, peer):
    """lightly adds a bias to the cosine similarities; without it both agree."""
    given = inputs["prototypes"]
    scores = prototype_scores(given["x"], given["weight"])
    theirs = peer["prototypes"]["scores"] - given["bias"]
    agree("prototypes, without lightly's bias", scores, theirs, DOUBLE)
