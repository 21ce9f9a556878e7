"""The command line in a process of its own to which something happens.

usage: guard_worker.py WHAT RANK STEPS ARGUMENTS...   (torchrun's variables in the environment)

WHAT happens in process RANK before the steps of STEPS ("3,7", numbered from 1 on):
`poison`: one pixel is NaN; `sleep-in-forward`: it sleeps in the network. Its weights lie in
OUT/rank-R.pth afterwards.
"""

import os
import sys
import time

import torch

from pretrain.__main__ import main
from pretrain.engine.trainer import Trainer


def stand_still():
    time.sleep(600)


def happen(what, run, batch):
    if what == "poison":
        batch.views[0, 1, 2, 3, 4] = torch.nan
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

    Trainer.step, Trainer.train = disturbed, kept  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    meddle(sys.argv[1], int(sys.argv[2]), [int(s) for s in sys.argv[3].split(",")])
    sys.exit(main(sys.argv[4:]))
