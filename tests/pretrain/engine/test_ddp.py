"""Two Gloo processes, with micro-batches too, against one process on the joined batch.

BN is in eval mode: its batch statistics are per process and micro-batch.
"""

import copy
from pathlib import Path

import pytest
import torch

from pretrain import collectives as dist
from tests.pretrain.engine.ddp_worker import run_cell, run_cells
from tests.ranks import Rank, assert_well, ends_of, free_port

pytestmark = [pytest.mark.ddp, pytest.mark.slow]
ROOT = Path(__file__).parents[3]
METHODS = {
    "none": {"method": "none"},
    "nn": {"method": "nn"},
    "nn-any_of_3": {"method": "nn", "nn": {"top_k": 3}},
    "nn-3_features": {
        "method": "nn",
        "nn": {"top_k": 3},
        "num_features": 3,
        "feature_loss": "free",
    },
    "mask": {"method": "mask", "num_features": 2},
    "mixup": {"method": "mixup", "mixup": {"alpha": 0.5}},
    "mixup-pass": {"method": "mixup", "stop_gradient": False},
}
OTHERS = ("simclr", "moco", "simsiam", "swav", "barlow", "vicreg", "deepclusterv2")  # fewer of each
PLAIN = {"micro_batch_size": 4, "accumulation": "plain"}  # 2 of 2 rows on each rank
CACHED = PLAIN | {"accumulation": "cached"}
MASKED = {"method": "mask", "stop_gradient": False}
MIXING = {
    "method": "none",
    "mixing": {"num_hardest": 3, "num_pairs": 4, "num_with_anchor": 2, "extrapolate": 2.0,
               "interpolate": 1.6},
}  # fmt: skip
MICRO_BATCHES = {
    "byol-plain": ("byol", METHODS["nn-any_of_3"], PLAIN),
    "simsiam-plain": ("simsiam", METHODS["mask"], PLAIN),
    "infonce-cached": ("infonce", METHODS["nn"], CACHED),
    "simclr-cached": ("simclr", METHODS["mixup-pass"], CACHED),
    "swav-cached": ("swav", METHODS["none"], CACHED),
    "barlow-cached": ("barlow", METHODS["mixup-pass"], CACHED),
    "byol-cached": ("byol", METHODS["mixup"], CACHED),
    "byol-small-plain": ("byol", METHODS["mask"], PLAIN, 2),
    "infonce-small": ("infonce", METHODS["nn"], {}, 2),
    "swav-small-cached": ("swav", METHODS["nn"], CACHED, 2),
    "masked_prediction-plain": ("masked_prediction", MASKED, PLAIN),
    "masked_prediction-cached": ("masked_prediction", MASKED, CACHED),
    "moco-mixing-plain": ("moco", MIXING, PLAIN),
    "infonce-mixing-cached": ("infonce", MIXING, CACHED),
}
CELLS = (
    {
        f"{objective}-{name}": (objective, fa, {})
        for objective in ("infonce", "byol")
        for name, fa in METHODS.items()
        if objective == "infonce" or not name.endswith("pass")
    }
    | {
        f"{objective}-{name}": (objective, METHODS[name], {})
        for objective in OTHERS
        for name in ("nn", "mixup")
    }
    | {
        f"byol-{architecture}": (
            "byol", {"method": "nn", "architecture": architecture, "stop_gradient": False}, {}
        )
        for architecture in ("pre", "post")
    }
    | {f"{name}-mixing": (name, MIXING, {}) for name in ("infonce", "simclr", "moco")}
    | {"masked_prediction": ("masked_prediction", MASKED | {"num_features": 2}, {})}
    | MICRO_BATCHES
)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the single process, of rank 0 and of rank 1, by cell."""
    out, port = tmp_path_factory.mktemp("ddp") / "run", free_port()
    ranks = [Rank(run_cells, (str(out), CELLS), rank, 2, port) for rank in (0, 1)]
    single = {name: run_cell(*cell) for name, cell in copy.deepcopy(CELLS).items()}
    assert_well(ends_of(ranks, 600))
    return [single, *(torch.load(f"{out}-{rank}.pth", weights_only=True) for rank in (0, 1))]


@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_equal_one(results, cell):
    """Loss, gradients, queues and EMA: equal on both ranks, and those of one process."""
    single, rank_0, rank_1 = (r[cell] for r in results)
    assert rank_0["losses"] == rank_1["losses"]
    assert rank_0["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert rank_0["active"] == rank_1["active"] == single["active"]
    assert single["active"][1:] == [True, True]
    assert rank_0["num_outputs"] == (2 if cell.endswith("-plain") else 1)
    for name, gradient in single["gradients"].items():
        ours = rank_0["gradients"][name]
        assert torch.equal(ours, rank_1["gradients"][name]), name
        if cell.startswith("barlow") and name == "projector.3.bias":
            continue  # the loss takes the means away: the gradient is rounding
        assert float(gradient.norm()) > 0, name
        difference = float((ours - gradient).norm() / gradient.norm())
        assert difference < 1e-3, f"{name}: relative difference {difference}"
    for part in ("queue", "ema", "negatives"):
        for name, value in single[part].items():
            assert torch.equal(rank_0[part][name], rank_1[part][name]), (part, name)
            torch.testing.assert_close(rank_0[part][name], value, rtol=1e-4, atol=1e-5)
    objective, fa = CELLS[cell][:2]
    assert bool(single["ema"]) == (objective in ("byol", "moco", "masked_prediction"))
    assert bool(single["negatives"]) == (objective in ("moco", "deepclusterv2"))
    if fa["method"] == "nn":
        assert (int(single["queue"]["count"]), int(single["queue"]["position"])) == (20, 4)


def test_cells_differ(results):
    """Equal figures in all cells would prove nothing."""
    last = [c["losses"][-1] for name, c in results[0].items() if name not in MICRO_BATCHES]
    assert len({round(x, 9) for x in last}) >= len(last) - 4


def test_one_process_needs_no_group():
    x = torch.ones(3, 2, requires_grad=True)
    assert dist.gather(x) is x
    assert not dist.is_on()
    assert (dist.rank(), dist.world_size()) == (0, 1)
    assert dist.local_rows(3) == slice(0, 3)
    assert torch.equal(dist.mean(x), torch.ones(3, 2))
    dist.stop()
