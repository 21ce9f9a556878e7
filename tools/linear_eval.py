r"""How good are frozen features? A linear classifier or nearest neighbours, on labelled shards.

cached: features are computed once and kept; classifiers with ten learning rates are trained on them
at once. full: the published protocol, pictures are cropped anew in every epoch. knn: every k with
every temperature. A part of the training set selects the rate, the validation set never does.

Examples:
  .venv/bin/python tools/linear_eval.py runs/first/checkpoint.pth --train data/in100_train \
      --val data/in100_val --out runs/first/linear
  .venv/bin/python tools/linear_eval.py random:R18 --train A --val B --out C --fraction 0.1
  .venv/bin/python tools/linear_eval.py resnet50.pth --train A --val B --out C --protocol knn
  .venv/bin/torchrun --standalone --nproc-per-node=8 tools/linear_eval.py CHECKPOINT --train A \
      --val B --out C --config imagenet1k_lars --resume

CHECKPOINT is a checkpoint.pth of ours, a ResNet's weights in any layout that tools/convert_to_d2.py
reads, or random: with R18, R34, R50, R101, thin_R50 or a checkpoint whose architecture is taken.
Every key=value stands in pretrain/evaluation/linear/config.py.
Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input, 128 + n stopped by signal n.
"""

import argparse
import sys
from pathlib import Path

from common.errors import command_parser, memory_remedy, run_command
from common.resnet import add_reading_options


def evaluate(arguments: argparse.Namespace) -> None:
    """Run the evaluation, and print its table."""
    from common.backbone import reading_of
    from common.config import find_config, read_settings
    from common.files import check_out_folder
    from pretrain.evaluation.linear.config import LinearConfig
    from pretrain.evaluation.linear.run import Evaluation, table

    name = arguments.config or ("imagenet100" if arguments.protocol == "full" else None)
    path = None if name is None else find_config(name, "linear")
    for folder in filter(None, (arguments.out, arguments.features)):
        check_out_folder(folder)
    named = {
        key: getattr(arguments, key) for key in ("protocol", "fraction", "subset_list", "seed")
    }
    overrides = [f"{key}={value}" for key, value in named.items() if value is not None]
    result = Evaluation(
        read_settings(LinearConfig, path, [*arguments.overrides, *overrides]),
        arguments.checkpoint, arguments.train, arguments.val, arguments.out,
        features=arguments.features, resume=arguments.resume, **reading_of(arguments),
    ).run()  # fmt: skip
    if result is not None:
        print(table(result))


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input, 128 + n after a signal.
    """
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="weights, see below")
    add("overrides", nargs="*", metavar="key=value", help="e.g. epochs=50 lr_max=30")
    add("--train", required=True, metavar="SHARDS", help="labelled shards to train on")
    add("--val", required=True, metavar="SHARDS", help="labelled shards with the same classes")
    add("--out", required=True, type=Path, metavar="DIR",
        help="for linear.json and what is kept")  # fmt: skip
    add("--protocol", choices=("cached", "full", "knn"), help="default: cached, or the config's")
    add("--config", metavar="YAML", help="file or preset of configs/linear/, as imagenet1k_moco "
        "(default: none; for --protocol full imagenet100)")  # fmt: skip
    add_reading_options(parser)
    add("--fraction", metavar="F", help="share of the training labels, e.g. 0.01")
    add("--subset-list", metavar="FILE", help="keys of the samples to train on, one a line")
    add("--seed", metavar="N", help="of subset, held-out part, order, crops, random weights")
    add("--features", type=Path, metavar="DIR", help="where features lie (default: DIR/features)")
    add("--resume", action="store_true", help="go on with what --out holds")
    arguments = parser.parse_intermixed_args(argv)
    from common.startup import begin_program  # after --help, which should not wait
    from pretrain import collectives as dist

    def work() -> None:
        begin_program()
        with dist.in_group(), memory_remedy("lower batch_size, num_workers or image_size"):
            evaluate(arguments)

    interrupted = "stopped; features are kept: the same command with --resume goes on"
    return dist.end_process(run_command(work, when_interrupted=interrupted))


if __name__ == "__main__":
    sys.exit(main())
