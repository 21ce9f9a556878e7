r"""How easily do adversarial pictures lose their nearest neighbour?

Some pictures of SHARDS are queries, the projections of all others fill the support queue. Each
query is changed by at most epsilon per pixel value so that its projection moves away from its
neighbour; as a control, every value is moved by epsilon up or down at random. The figure is the
share of queries whose nearest neighbour is another one afterwards (docs/method.md).

Example:
  .venv/bin/python tools/adversarial_neighbours.py runs/pretrain/checkpoint.pth runs/probe_val \
      --num 256 --json robustness.json
Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.errors import command_parser, memory_remedy, require, run_command, whole
from common.files import write_json


def numbers(text: str) -> list[float]:
    """Comma-separated values of epsilon."""
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= 255 for value in values):
        raise ValueError(text)
    return values


def work(arguments: argparse.Namespace) -> None:
    """Attack the queries at every epsilon, print the table and write the figures."""
    out = arguments.json
    require(out is None or out.absolute().parent.is_dir(), f"--json {out}: no such folder")

    import torch

    from pretrain.collectives import choose_device
    from pretrain.data.shards import ShardIndex
    from pretrain.engine import checkpoint
    from pretrain.evaluation.neighbour_attack import NeighbourStudy

    state = checkpoint.load(arguments.checkpoint)
    device, index = choose_device(arguments.device), ShardIndex.open(arguments.shards)
    study = NeighbourStudy(state, index, arguments.num, device)
    rows = []
    print(f"{'epsilon, 1/255':>16}{'attack':>10}{'control':>10}   queries with another neighbour")
    for epsilon in arguments.epsilon:
        attack = study.flips(epsilon, arguments.steps)
        control = study.flips(epsilon, 1, torch.Generator().manual_seed(0))
        rows.append({"epsilon": epsilon, "attack": attack, "control": control})
        print(f"{epsilon:>16g}{attack:>10.1%}{control:>10.1%}", flush=True)
    figures = {"format": "fa-robustness-2", "checkpoint": arguments.checkpoint.name}
    figures |= {"step": state["step"], "num_steps": arguments.steps, "neighbour_flip": rows}
    figures |= {"num_queries": len(study.images), "num_entries": study.queue.num_entries}
    if out is not None:
        write_json(out, figures)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
    """
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pth of a pretraining run")
    add("shards", type=Path, metavar="SHARDS", help="folder of shards")
    add("--epsilon", type=numbers, default=[1.0, 2.0, 4.0, 8.0], metavar="LIST",
        help="largest changes of a pixel value, in 1/255 (default: 1,2,4,8)")  # fmt: skip
    add("--steps", type=whole(1), default=1, metavar="N", help="1: FGSM (default); more: PGD")
    add("--num", type=int, default=512, metavar="N", help="queries (default: 512)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--json", type=Path, metavar="OUT", help="write the figures here")
    arguments = parser.parse_args(argv)
    return run_command(memory_remedy("lower --num")(lambda: work(arguments)))


if __name__ == "__main__":
    sys.exit(main())
