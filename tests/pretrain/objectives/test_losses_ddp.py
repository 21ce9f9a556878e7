"""Losses that look at the global batch: two Gloo processes against one.

usage of a process: test_losses_ddp.py FOLDER RANK
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain import collectives as dist
from pretrain.engine import rendezvous
from pretrain.objectives.simclr import nt_xent_loss
from pretrain.objectives.swav import sinkhorn
from tests.pretrain.engine.run_helpers import wait_for_workers

pytestmark = pytest.mark.ddp
ROOT = Path(__file__).parents[3]
BATCH, DIM, NUM_PROTOTYPES = 8, 5, 6


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def compute(rows):
    """Codes and NT-Xent of some rows of the same batch, and the gradient of the mean loss."""
    scores = draw(BATCH, NUM_PROTOTYPES, seed=1)
    scores[BATCH // 2 :, 0] += 5  # the largest scores are all in the second half
    z_1, z_2 = (draw(BATCH, DIM, seed=seed)[rows].requires_grad_() for seed in (2, 3))
    loss = nt_xent_loss(
        z_2, dist.gather(z_1), dist.gather(z_2), temperature=0.2, first_positive=rows.start
    )
    gradients = torch.autograd.grad(loss, (z_1, z_2))
    return {
        "codes": sinkhorn(scores[rows], epsilon=0.05, num_iterations=3),
        "loss": dist.mean(loss),
        "gradients": torch.stack(gradients) / dist.world_size(),
        "total": dist.total(scores[rows].sum(dim=0)),
    }


def work(folder, rank):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.save(compute(dist.local_rows(BATCH // 2)), f"{folder}/{rank}.pth")
    rendezvous.stop()


def start_worker(folder, rank):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), str(rank)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """What rank 0 and rank 1 of two processes computed."""
    folder = tmp_path_factory.mktemp("losses")
    workers = [start_worker(folder, rank) for rank in (0, 1)]
    wait_for_workers(workers, timeout=300)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in (0, 1)]


def test_codes_are_balanced_over_the_batch_of_all_processes(halves):
    codes = torch.cat([half["codes"] for half in halves])
    torch.testing.assert_close(codes, compute(slice(0, BATCH))["codes"])


def test_nt_xent_and_its_gradient_equal_one_process(halves):
    whole = compute(slice(0, BATCH))
    gradients = torch.cat([half["gradients"] for half in halves], dim=1)
    torch.testing.assert_close(gradients, whole["gradients"])
    for half in halves:
        torch.testing.assert_close(half["loss"], whole["loss"])


def test_total_sums_over_the_processes(halves):
    for half in halves:
        torch.testing.assert_close(half["total"], compute(slice(0, BATCH))["total"])


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
