"""Gathering with gradient in two Gloo processes, against PyTorch's own, which it says is going."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed

from pretrain import collectives
from tests.ranks import assert_well, run_group


def compare_with_pytorch(folder: str) -> None:
    """In a group, and in a second one after it."""
    for number in (1, 2):
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{number}",
            rank=int(os.environ["RANK"]),
            world_size=2,
        )
        _compare()
        distributed.destroy_process_group()


def _compare() -> None:
    rank = distributed.get_rank()
    draws = torch.Generator().manual_seed(rank)
    ours = torch.randn(5, 3, 4, generator=draws, dtype=torch.float64).transpose(1, 2)
    theirs = ours.clone().requires_grad_()
    weights = torch.randn(10, 4, 3, generator=draws, dtype=torch.float64)  # others on each process
    ours.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gathered = collectives.gather(ours)
        (gathered**2 * weights).sum().backward()
        numbers = collectives.gather(torch.arange(3) + 3 * rank)
    assert numbers.tolist() == [*range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from torch.distributed.nn.functional import all_gather

        reference = torch.cat(all_gather(theirs.contiguous(), group=distributed.group.WORLD))
    (reference**2 * weights).sum().backward()
    assert torch.equal(gathered, reference)
    assert ours.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(gathered[5 * rank : 5 * rank + 5], ours)


@pytest.mark.slow
@pytest.mark.ddp
def test_gather_is_pytorchs(tmp_path: Path) -> None:
    assert_well(run_group(compare_with_pytorch, (str(tmp_path),)))
