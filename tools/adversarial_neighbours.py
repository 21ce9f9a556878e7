"""How easily do adversarial pictures lose their nearest neighbour, and what helps against it?

Some pictures of SHARDS are queries, the projections of all others fill the support queue. Each
query is changed by at most epsilon per pixel value so that its projection moves away from its
neighbour; as a control, every value is moved by epsilon up or down by chance. docs/robustness.md
has the definitions.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError, run_command
from common.files import write_json
from common.pictures import decode
from pretrain.data.decode import center_crop
from pretrain.data.shards import ShardIndex
from pretrain.engine import checkpoint
from pretrain.engine.device import choose_device
from pretrain.evaluation import robustness
from pretrain.evaluation.robustness import Attacked, Study

EXAMPLE = """\
example:
  .venv/bin/python tools/adversarial_neighbours.py runs/pretrain/checkpoint.pth runs/probe_val \\
      --num 256 --json robustness.json --picture robustness.jpg
Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
"""
TILE, GAP, ROWS = 96, 4, 6  # pixels, pixels, queries in the picture


def numbers(text: str) -> list[float]:
    """Comma-separated values of epsilon."""
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= 255 for value in values):
        raise ValueError(text)
    return values


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pth of a pretraining run")
    add("shards", type=Path, metavar="SHARDS", help="folder of shards, labelled if possible")
    add("--epsilon", type=numbers, default=[1.0, 2.0, 4.0, 8.0], metavar="LIST",
        help="largest changes of a pixel value, in 1/255 (default: 1,2,4,8)")  # fmt: skip
    add("--steps", type=int, default=1, metavar="N", help="1: FGSM (default); more: PGD")
    add("--num", type=int, default=512, metavar="N", help="queries (default: 512)")
    add("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    add("--seed", type=int, default=0, help="of the control and of FA's draws (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--json", type=Path, metavar="OUT", help="write the figures here")
    add("--picture", type=Path, metavar="OUT", help="some queries and neighbours, .jpg or .png")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is computed.

    Raises:
        UserError: A number below 1, a picture of another kind, an output without a folder.
    """
    for name in ("steps", "num", "batch_size"):
        value = getattr(arguments, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
    for name in ("json", "picture"):
        path = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{name} {path}: its folder does not exist")
    if arguments.picture is not None and arguments.picture.suffix not in (".jpg", ".png"):
        raise UserError(f"--picture {arguments.picture}: give a name that ends in .jpg or .png")


def study_all(
    study: Study, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[Attacked]]:
    """Figures for each epsilon, of the control and of the attack; and the attacks themselves."""
    rows, attacks = [], []
    with tqdm(total=2 * len(arguments.epsilon), unit="pass", file=sys.stderr) as bar:
        for epsilon in arguments.epsilon:
            row: dict[str, Any] = {"epsilon": epsilon}
            for kind in ("control", "attack"):
                bar.set_postfix_str(f"{kind}, epsilon {epsilon:g}")
                seen = robustness.look(
                    study, epsilon, num_steps=arguments.steps, seed=arguments.seed,
                    is_control=kind == "control",
                )  # fmt: skip
                row[kind] = robustness.summary(study, seen)
                bar.update()
            rows.append(row)
            attacks.append(seen)
    return rows, attacks


def print_table(rows: list[dict[str, Any]], study: Study, steps: int) -> None:
    """The table for people."""
    attack = "FGSM" if steps == 1 else f"PGD, {steps} steps"
    print(f"{len(study.images)} queries, {int(study.queue.count)} entries in the queue, {attack}; "
          "in brackets: random signs instead\n")  # fmt: skip
    print(f"{'epsilon, 1/255':42}" + "".join(f"{row['epsilon']:>18g}" for row in rows))
    for title, key in (("neighbour flips", "neighbour_flip"), ("its label flips", "label_flip"),
                       ("cos(clean, attacked neighbour)", "neighbour_cosine")):  # fmt: skip
        for distance in robustness.DISTANCES:
            cells = [(row["attack"][key][distance], row["control"][key][distance]) for row in rows]
            is_share = key != "neighbour_cosine"
            print(f"{title + ', ' + distance:42}" + "".join(_cell(*c, is_share) for c in cells))
    print("\ncos( A(clean), A(attacked) ) of the same draws")
    for name in robustness.MITIGATIONS:
        cells = [(row["attack"]["cosine"][name], row["control"]["cosine"][name]) for row in rows]
        print(f"{name:42}" + "".join(_cell(*cell, False) for cell in cells))


def _cell(attack: float | None, control: float | None, is_share: bool) -> str:
    if attack is None or control is None:
        return f"{'-':>18}"
    text = f"{attack:.1%} ({control:.1%})" if is_share else f"{attack:.3f} ({control:.3f})"
    return f"{text:>18}"


def save_picture(path: Path, study: Study, index: ShardIndex, seen: Attacked) -> None:
    """A row per query: clean, attacked, their difference, and both nearest neighbours."""
    shape = (1, 3, 1, 1)
    mean, std = (torch.tensor(x).view(shape) for x in (study.mean, study.std))
    attacked = ((seen.images * std + mean).clamp(0, 1) * 255).round().byte()
    difference = 128 + 8 * (attacked.int() - study.images.int())
    before, after = seen.clean_nearest["cosine"], seen.nearest["cosine"]
    flipped = torch.nonzero(before != after).flatten().tolist()
    chosen = (flipped + [i for i in range(len(before)) if i not in set(flipped)])[:ROWS]
    ids = study.queue.sample_ids.cpu()
    rows = []
    for i in chosen:
        own = [x[i].clamp(0, 255).byte().permute(1, 2, 0).numpy()
               for x in (study.images, attacked, difference)]  # fmt: skip
        entries = (int(ids[before[i]]), int(ids[after[i]]))
        rows.append([_tile(x) for x in (*own, *(_sample(index, entry) for entry in entries))])
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows])[:-GAP, :-GAP]
    done, data = cv2.imencode(path.suffix, sheet[:, :, ::-1])
    assert done
    path.write_bytes(data.tobytes())


def _sample(index: ShardIndex, number: int) -> np.ndarray:
    return center_crop(decode(index.read_bytes(number), where=index.describe(number)), TILE)


def _tile(image: np.ndarray) -> np.ndarray:
    """Of one size, with a white margin to the right and below."""
    tile = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
    return np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=255)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
    """
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        check(arguments)
        state = checkpoint.load(arguments.checkpoint)
        index = ShardIndex.open(arguments.shards)
        study = robustness.prepare(
            state, index, num_queries=arguments.num, device=choose_device(arguments.device),
            batch_size=arguments.batch_size,
        )  # fmt: skip
        rows, attacks = study_all(study, arguments)
        if arguments.json:
            figures = {
                "format": "fa-robustness-1",
                "checkpoint": arguments.checkpoint.name,
                "step": state["step"],
                "num_queries": len(study.images),
                "num_entries": int(study.queue.count),
                "num_steps": arguments.steps,
                "seed": arguments.seed,
                "rows": rows,
            }
            write_json(arguments.json, figures)
        if arguments.picture:
            save_picture(arguments.picture, study, index, attacks[-1])
        index.close()
        print_table(rows, study, arguments.steps)
        return 0

    return run_command(work, failures=(RuntimeError,))  # a GPU without memory


if __name__ == "__main__":
    sys.exit(main())
