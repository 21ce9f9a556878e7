"""Two Gloo processes, with micro-batches too, against one process on the joined batch.

BN is in eval mode: its batch statistics are per process and micro-batch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.files import read_json_lines
from pretrain import collectives as dist
from tests.pretrain.engine.run_helpers import free_port, wait_for_workers

pytestmark = pytest.mark.ddp
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
OTHERS = ("simclr", "moco", "simsiam", "swav")  # fewer methods of each
PLAIN = {"micro_batch_size": 4, "accumulation": "plain"}  # 2 of 2 rows on each rank
CACHED = PLAIN | {"accumulation": "cached"}
MICRO_BATCHES = {
    "byol-plain": ("byol", METHODS["nn-any_of_3"], PLAIN),
    "simsiam-plain": ("simsiam", METHODS["mask"], PLAIN),
    "infonce-cached": ("infonce", METHODS["nn"], CACHED),
    "simclr-cached": ("simclr", METHODS["mixup-pass"], CACHED),
    "swav-cached": ("swav", METHODS["none"], CACHED),
    "byol-cached": ("byol", METHODS["mixup"], CACHED),
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
    | MICRO_BATCHES
)  # fmt: skip


def start_worker(out, rank, world_size, port):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("ddp_worker.py"))]
    return subprocess.Popen(
        [*command, str(out), json.dumps(CELLS)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the single process, of rank 0 and of rank 1, by cell."""
    out, port = tmp_path_factory.mktemp("ddp") / "run", free_port()
    workers = [start_worker(out, 0, 1, port)]
    workers += [start_worker(out, rank, 2, port) for rank in (0, 1)]
    wait_for_workers(workers, timeout=600)
    names = ("1-0", "2-0", "2-1")
    return [torch.load(f"{out}-{name}.pth", weights_only=True) for name in names]


@pytest.mark.parametrize("cell", CELLS)
def test_loss_equals_one_process(results, cell):
    single, rank_0, rank_1 = (r[cell] for r in results)
    assert rank_0["losses"] == rank_1["losses"]
    assert rank_0["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert rank_0["active"] == rank_1["active"] == single["active"]
    assert single["active"][1:] == [True, True]


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_equals_one_process(results, cell):
    single, rank_0, rank_1 = (r[cell]["gradients"] for r in results)
    for name, gradient in single.items():
        assert torch.equal(rank_0[name], rank_1[name]), name
        assert float(gradient.norm()) > 0, name
        difference = float((rank_0[name] - gradient).norm() / gradient.norm())
        assert difference < 1e-3, f"{name}: relative difference {difference}"


@pytest.mark.parametrize("cell", [c for c, (_, fa, _) in CELLS.items() if fa["method"] == "nn"])
def test_queue_is_that_of_one_process_on_both_ranks(results, cell):
    single, rank_0, rank_1 = (r[cell]["queue"] for r in results)
    for name, value in single.items():
        assert torch.equal(rank_0[name], rank_1[name]), name
        torch.testing.assert_close(rank_0[name], value, rtol=1e-4, atol=1e-5)
    assert int(single["count"]) == 20
    assert int(single["position"]) == 4


@pytest.mark.parametrize("part", ["ema", "negatives"])
@pytest.mark.parametrize("cell", [c for c in CELLS if c.startswith(("byol", "moco"))])
def test_ema_and_keys_are_those_of_one_process_on_both_ranks(results, cell, part):
    single, rank_0, rank_1 = (r[cell][part] for r in results)
    assert bool(single) == (part == "ema" or cell.startswith("moco"))
    for name, value in single.items():
        assert torch.equal(rank_0[name], rank_1[name]), name
        torch.testing.assert_close(
            rank_0[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


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


def shell(num_processes, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NPROC": str(num_processes)}
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "pretrain.sh"), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_with_two_processes_and_resume_with_one(shards, tmp_path):
    options = [
        ROOT / "configs" / "pretrain" / "demo.yaml", f"data.shards={shards}", f"out={tmp_path}/run",
        "arch.width_per_group=8", "arch.stem_channels=8", "arch.res2_channels=32",
        "data.image_size=32", "data.batch_size=8", "data.num_workers=0", "fa.min_fill=16",
        "optim.epochs=2", "engine.log_every_steps=1", "engine.device=cpu", "eval.num_pictures=2",
        "engine.checkpoint_every_steps=5",
    ]  # fmt: skip
    done = shell(2, *options)
    assert done.returncode == 0, done.stderr
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    steps = [r["step"] for r in rows if r["kind"] == "train"]
    assert steps == list(range(1, 11))  # one log, of rank 0
    assert (tmp_path / "run" / "summary.json").exists()
    resumed = shell(1, *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr
