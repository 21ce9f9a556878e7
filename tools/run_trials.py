"""Detection trials: several initialisations x seeds, compared pairwise, beside published rows."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import provenance
from common.errors import UserError, run_command
from pipeline.grid import trials
from pipeline.grid.jobs import Executor
from pipeline.grid.schedule import (
    FOLDER,
    Key,
    Store,
    add_run_options,
    check_run_options,
    exit_status,
    run_work,
)
from pipeline.grid.trials import Arm, Protocol
from pipeline.stages import lock

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "configs/studies/published/voc0712.yaml"
EXAMPLE = """\
examples:
  .venv/bin/python tools/run_trials.py --init random --init byol=runs/byol/backbone.pkl \\
      --init ours=runs/fa/checkpoint.pth --compare ours:byol --seeds 5 \\
      --config configs/detection/thin_R50_C4.yaml --data data/photos --out runs/trials
  .venv/bin/python tools/run_trials.py --init random --init supervised=resnet50.pth --seeds 5 \\
      --config configs/detection/voc0712_R50_C4_24k.yaml --data VOCdevkit --out runs/voc \\
      --cluster slurm --gpus-per-run 8 --parallel 10 -- --num-gpus 8

{seed} in FILE or in --data stands for the seed: a pretraining run or a split for each.
Words after -- go to tools/train_voc.sh. Weights without a card are converted first. The same
command goes on where the last one stopped. DIR/results.json and DIR/tables.md hold what they say.
Exit status: 0 all is finished; 1 runs failed; 2 wrong arguments or input; 3 time is up, call it
again; 128 + number: stopped by a signal.
"""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    main_parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = main_parser.add_argument
    add("--init", action="append", required=True, metavar="NAME=FILE",
        help="random, or a name and weights: converted ones, a checkpoint, torchvision's; "
        "repeat it")  # fmt: skip
    add("--control", metavar="NAME", help="the one that all are compared with (default: the first)")
    add("--compare", action="append", default=[], metavar="A:B", help="a further comparison, A - B")
    add("--config", type=Path, required=True, help="a YAML of configs/detection/")
    add("--data", required=True, metavar="DIR",
        help="data set with dataset.json, or a VOC devkit")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the trials")
    add("--seeds", type=int, default=5, metavar="N", help="seeds 0..N-1 (default: 5)")
    add("--published", metavar="FILE|none",
        help="published rows to show (default: those of VOC07+12 for its config)")  # fmt: skip
    add_run_options(main_parser)
    return main_parser


def main(arguments: Sequence[str] | None = None, executor: Executor | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        arguments: Of the command line.
        executor: Takes the runs instead of submitit; for tests.
    """
    started = time.monotonic()
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:cut])
    options.out = options.out.resolve()

    def work() -> int:
        check_run_options(options)
        with lock(options.out):
            return _run(options, tuple(words[cut + 1 :]), executor, started)

    return run_command(work)


def _run(
    options: argparse.Namespace, words: tuple[str, ...], executor: Executor | None, started: float
) -> int:
    inits = trials.read_inits(options.init)
    control = options.control or next(iter(inits))
    if control not in inits:
        raise UserError(f"--control {control}: give one of {', '.join(inits)}")
    pairs = trials.read_pairs(options.compare, list(inits), control)
    published = read_published(options)
    protocol = Protocol(options.config.resolve(), options.data, words)
    arms = [
        trials.make_arm(name, file, seed, protocol, options.out)
        for seed in range(options.seeds)
        for name, file in inits.items()
    ]
    refuse_twins(arms)
    store = Store(options.out / FOLDER)
    todo = []
    for arm in arms:
        work = trials.make_work(arm, protocol, options.out, ROOT)
        settings = {"weights": arm.weights_digest, "words": list(words)}
        row = store.plan(arm.key, arm.name, {}, settings)
        is_finished = row.status == "finished" and work.steps[0].product.exists()
        if not is_finished and (row.status != "failed" or options.retry_failed):
            todo.append(work)
    outcome = run_work(todo, store, options, executor, started)
    about: dict[str, Any] = {
        "config": options.config.name,
        "data": Path(options.data).name,
        "words": list(words),
        "published": published,
        **provenance.describe(ROOT),
    }
    found = trials.summarise(arms, store.rows(), pairs, about)
    for path in trials.write(options.out, found):
        print(path)
    return exit_status(outcome, found["counts"])


def read_published(options: argparse.Namespace) -> dict[str, Any] | None:
    """The published rows to show, or None.

    Raises:
        UserError: If the file is missing or not of the right form.
    """
    if options.published == "none":
        return None
    if options.published is not None:
        return trials.read_published(Path(options.published))
    if options.config.name.startswith("voc0712_R50_C4"):
        return trials.read_published(PUBLISHED)
    return None


def refuse_twins(arms: Sequence[Arm]) -> None:
    """Two names for the same weights would be one arm.

    Raises:
        UserError: Naming them.
    """
    seen: dict[Key, str] = {}
    for arm in arms:
        other = seen.setdefault(arm.key, arm.name)
        if other != arm.name:
            raise UserError(f"--init {arm.name}: the same weights as {other}")


if __name__ == "__main__":
    sys.exit(main())
