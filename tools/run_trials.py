r"""Detection trials: several initialisations x seeds, compared pairwise, beside published rows.

Examples:
  .venv/bin/python tools/run_trials.py --init random --init byol=runs/byol/backbone.pkl \
      --init ours=runs/fa/checkpoint.pth --compare ours:byol --seeds 5 \
      --config thin_R50_C4 --data data/photos --out runs/trials

{seed} in FILE or in --data stands for the seed: a pretraining run or a split for each.
Words after -- go to tools/train_voc.sh. The same command goes on where the last one stopped.
DIR/report.html shows what came out.
Exit status: 0 all is finished; 1 runs failed; 2 wrong arguments or input; 3 time is up, call it
again; 128 + number: stopped by a signal.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import find_config
from common.errors import command_parser, run_command, whole
from pipeline import study
from pipeline.experiment import ROOT, add_run_options, limits_of, run_experiment

PUBLISHED = ROOT / "configs/studies/published/voc0712.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--init", action="append", required=True, metavar="NAME=FILE",
        help="random, or a name and weights: converted ones, a checkpoint, torchvision's; "
        "repeat it")  # fmt: skip
    add("--control", metavar="NAME", help="the one that all are compared with (default: the first)")
    add("--compare", action="append", default=[], metavar="A:B", help="a further comparison, A - B")
    add("--config", required=True, help="a YAML file, or a preset of configs/detection/")
    add("--data", required=True, metavar="DIR",
        help="labelled pictures, as train_voc.sh takes them")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the trials")
    add("--seeds", type=whole(1), default=5, metavar="N", help="seeds 0..N-1 (default: 5)")
    add("--published", metavar="FILE|none",
        help="published rows to show (default: those of VOC07+12 for its config)")  # fmt: skip
    add("--dry-run", action="store_true", help="check everything; show what would run, and why")
    add_run_options(parser, max_failures=3)
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    return run_command(lambda: run(options, words[cut + 1 :]))


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Make an experiment of the initialisations and run it."""
    limits = limits_of(options, threads=1)
    detector = find_config(options.config, "detection")
    config = study.trials_config(
        *(options.init, options.control, options.compare, options.seeds),
        *(detector, options.data, words),
    )
    default = PUBLISHED if detector.name.startswith("voc0712_R50_C4") else "none"
    source = str(options.published or default)
    return run_experiment(
        config, options.out.resolve(), [sys.executable, *sys.argv], limits, is_dry=options.dry_run,
        published=None if source == "none" else study.read_published(Path(source)),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
