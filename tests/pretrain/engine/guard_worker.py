"""The command line in processes of their own to which something happens."""

import time
from functools import partial

import torch

import tests.pretrain.model.two_layers  # noqa: F401  a name that configs may say
from pretrain import collectives as dist
from pretrain.__main__ import main
from pretrain.engine.trainer import Trainer
from tests.ranks import run_group


def stand_still():
    time.sleep(600)


def happen(what, run, batch):
    if what == "poison":
        batch.views[0, 1, 2, 3, 4] = torch.nan
    elif what == "overflow":
        weight = run.task.model.online.projector[0].weight
        handle = weight.register_hook(lambda g: handle.remove() or torch.full_like(g, torch.inf))
    else:
        run.task.model.online.projector.register_forward_pre_hook(lambda *_: stand_still())


def disturbed_run(what: str, rank: int, step: int, words: list[str]) -> int:
    """The command line; weights of process R lie in OUT/rank-R.pth afterwards."""
    take_step, train = Trainer.step, Trainer.train

    def disturbed(self, batch):
        if dist.rank() == rank and self.position.step + 1 == step:
            happen(what, self, batch)
        return take_step(self, batch)

    def kept(self):
        number = dist.rank()
        try:
            train(self)
        finally:
            torch.save(self.task.model.state_dict(), self.task.folder / f"rank-{number}.pth")

    if what == "overflow":
        scaler = partial(torch.amp.GradScaler, init_scale=256.0)
        torch.amp.GradScaler = scaler  # type: ignore[misc]
    Trainer.step, Trainer.train = disturbed, kept  # type: ignore[method-assign]
    return main(words)


def run_disturbed_pair(what: str, rank: int, step: int, *words: object) -> list[tuple[int, str]]:
    """Exit status and what was printed, of two processes, by rank.

    Before a step (from 1 on) something happens in process `rank`. `poison`: one pixel is NaN;
    `overflow`: a gradient is infinite, and all loss scales start at 256; `sleep`: in the network.
    """
    return run_group(disturbed_run, (what, rank, step, [str(word) for word in words]))
