"""One of two Gloo ranks of test_losses.py.

usage: losses_worker.py OUT   (torchrun's variables in the environment)
"""

import json
import sys
from pathlib import Path

import torch

from pretrain import collectives as dist
from pretrain.engine import rendezvous
from tests.golden.training import CELLS, NUM_STEPS_OF_RANKS, TWO_RANKS, float64_is_kept, run


def main(out: str) -> None:
    torch.set_num_threads(1)
    rendezvous.start("cpu")
    with float64_is_kept():
        results = {name: run(CELLS[name], NUM_STEPS_OF_RANKS) for name in TWO_RANKS}
    if dist.rank() == 0:
        Path(out).write_text(json.dumps(results))
    rendezvous.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
