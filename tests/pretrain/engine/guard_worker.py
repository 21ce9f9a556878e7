"""The command line in a process of its own to which something happens.

usage: guard_worker.py WHAT RANK STEPS ARGUMENTS...   (torchrun's variables in the environment)

WHAT happens in process RANK before the steps of STEPS ("3,7", numbered from 1 on):
`poison`: one pixel is NaN; `overflow`: a gradient is infinite, and all loss scales start at 256;
`sleep-in-forward`: it sleeps in the network. Its weights lie in OUT/rank-R.pth afterwards.
"""

import os
import sys
import time
from functools import partial

import torch

from pretrain.__main__ import main
from pretrain.engine.trainer import Trainer


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


def meddle(what, rank, steps):
    step, train = Trainer.step, Trainer.train

    def disturbed(self, batch):
        if int(os.environ.get("RANK", "0")) == rank and self.position.step + 1 in steps:
            happen(what, self, batch)
        return step(self, batch)

    def kept(self):
        try:
            train(self)
        finally:
            own = os.environ.get("RANK", "0")
            torch.save(self.task.model.state_dict(), self.task.folder / f"rank-{own}.pth")

    if what == "overflow":
        scaler = partial(torch.amp.GradScaler, init_scale=256.0)
        torch.amp.GradScaler = scaler  # type: ignore[misc]
    Trainer.step, Trainer.train = disturbed, kept  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    meddle(sys.argv[1], int(sys.argv[2]), [int(s) for s in sys.argv[3].split(",")])
    sys.exit(main(sys.argv[4:]))
