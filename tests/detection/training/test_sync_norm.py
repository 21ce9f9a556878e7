"""naiveSyncBN on two CPU processes equals one batch norm over both halves of the batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed
from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import Tensor
from torch.multiprocessing.spawn import spawn

NUM_PROCESSES = 2


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, 5, generator=generator) * 3 + 1


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES
    )
    comm.create_local_process_group(NUM_PROCESSES)
    norm = get_norm("naiveSyncBN", 3)
    assert norm is not None
    half = batch()[2 * rank : 2 * rank + 2].requires_grad_()
    out = norm(half)
    (out**3).sum().backward()
    state = {"out": out.detach(), "grad": half.grad, "mean": norm.running_mean}
    torch.save(state, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_equal_one_batch(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), NUM_PROCESSES)
    parts = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1)]
    whole = batch().requires_grad_()
    norm = torch.nn.BatchNorm2d(3)
    out = norm(whole)
    (out**3).sum().backward()
    assert whole.grad is not None
    for name, expected in (("out", out), ("grad", whole.grad)):
        assert torch.allclose(torch.cat([part[name] for part in parts]), expected, atol=1e-4)
    for part in parts:
        assert torch.allclose(part["mean"], norm.get_buffer("running_mean"), atol=1e-5)
