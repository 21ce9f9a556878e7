r"""Fine-tune and evaluate a detector: the program behind tools/train_voc.sh.

Examples:
  tools/train_voc.sh runs/convert/backbone.pkl --config thin_R50_C4 \
      --data data/scenes --out runs/pretrained --seeds 0,1,2
  tools/train_voc.sh --out runs/pretrained --eval-on data/real_scenes

Run it again after an interruption: finished seeds are kept, the others go on from their last
checkpoint. Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import errors
from common.annotations.record import FORMATS, SetChoice, read_class_names
from common.files import check_out_folder
from common.memory import keep_freed_memory


def num_gpus(text: str) -> int | None:
    """A number; None for "auto"."""
    return None if text == "auto" else int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
    """
    if argv is None or errors.EACH in sys.argv:  # a process of its own
        keep_freed_memory()
    arguments = parse_arguments(argv)
    import common.startup  # noqa: F401  (before torch; seconds that --help need not wait)

    # isort: split
    from torch.multiprocessing.spawn import ProcessException

    def work() -> None:
        try:
            seeds = parse_seeds(arguments.seeds) if arguments.seeds else None
            with errors.memory_remedy("lower SOLVER.IMS_PER_BATCH"):
                summary = run(arguments, seeds)
            if arguments.check:
                errors.print_check(summary, as_json=arguments.json)
                return
        except errors.UserError as error:
            raise errors.UserError(message_of(error)) from error
        except (FloatingPointError, ProcessException) as error:
            raise errors.RunFailed(message_of(error)) from error
        figures = [f"{key} {value:.1f}" for key, value in summary["mean"].items()]
        ranges = summary.get("picture_interval", {}).values()
        about = ", brackets: 95 % over the set's pictures" * any(ranges)
        if about:
            figures = [f"{figure} [{low:.1f}, {high:.1f}]"
                       for figure, (low, high) in zip(figures, ranges, strict=True)]  # fmt: skip
        print(f"{'  '.join(figures)}  (n = {summary['n']}{about})")

    return errors.run_command(
        work, when_interrupted="stopped; the same command goes on from the last checkpoint"
    )


def run(arguments: argparse.Namespace, seeds: list[int] | None) -> dict[str, Any]:
    """Train, or evaluate what is trained, or check; returns the summary, or what a check says."""
    from common.startup import begin_program
    from detection.other_sets import evaluate_on
    from detection.training.config import parse_overrides
    from detection.training.run import ArmSettings, check, run_arm

    begin_program()
    check_out_folder(arguments.out)
    overrides = parse_overrides(arguments.opts)
    for option, key in ((arguments.eval_every, "TEST.EVAL_PERIOD"),
                        (arguments.num_eval_images, "TEST.NUM_IMAGES")):  # fmt: skip
        if option is not None:
            overrides[key] = str(option)
    choice = SetChoice(
        arguments.format,
        metric_year=arguments.metric_year,
        exif=arguments.exif,
        max_left_out=arguments.max_left_out,
    )
    if arguments.eval_on is not None:
        return evaluate_on(
            arguments.eval_on,
            arguments.out,
            seeds,
            choice=replace(choice, test_split=arguments.eval_split),
            overrides=overrides,
            num_threads=arguments.threads,
            overwrite=arguments.overwrite,
        )
    settings = ArmSettings(
        weights=None if arguments.weights == "random" else Path(arguments.weights),
        config=arguments.config,
        data=arguments.data,
        choice=replace(
            choice,
            classes=tuple(read_class_names(arguments.classes)) if arguments.classes else None,
            train_split=arguments.train_split,
            test_split=arguments.test_split,
        ),
        overrides=overrides,
        freeze=arguments.freeze,
        name=arguments.arm,
        num_gpus=arguments.num_gpus,
        needs_card=not arguments.no_card,
    )
    if arguments.check:
        return check(settings, has_data=arguments.check == "all")
    return run_arm(
        settings,
        arguments.out,
        seeds or [0],
        num_threads=arguments.threads,
        overwrite=arguments.overwrite,
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; what training needs is left out with --eval-on only."""
    parser = errors.command_parser(__doc__, prog="tools/train_voc.sh")
    add = parser.add_argument
    add("weights", nargs="?", help="backbone.pkl or .pth from tools/convert_to_d2.py, or `random`")
    add("--config", type=Path, help="YAML file or preset of configs/detection/, as thin_R50_C4")
    add("--data", type=Path, help="labelled pictures: a set with dataset.json, or VOC's, COCO's or "
        "YOLO's files as annotation tools write them")  # fmt: skip
    add("--format", choices=FORMATS.names(), help="of --data or --eval-on (default: recognised)")
    add("--exif", choices=("auto", "stored"), default="auto",
        help="boxes of pictures with an EXIF orientation: of the picture, upright or as stored, "
        "that has the annotation's size (auto, default), or as stored")  # fmt: skip
    add("--max-left-out", type=int, default=0, metavar="N",
        help="leave out up to N faulty pictures and objects (default: 0, stop)")  # fmt: skip
    add("--out", type=Path, required=True, help="folder for the results")
    add("--seeds", help="comma-separated, one run each (default: 0; --eval-on: all finished)")
    add("--eval-on", type=Path, metavar="DIR",
        help="train nothing: evaluate the finished seeds in --out on another set with the same "
        "class names; weights, --config and --data are left out")  # fmt: skip
    add("--eval-split", metavar="LIST", help="the list of --eval-on's set (default: its test list)")
    add("--freeze", action="store_true", help="freeze the whole backbone before the ROI head")
    add("--arm", help="name of this arm in the results (default: from weights and --freeze)")
    add("--eval-every", type=int, metavar="N", help="evaluate every N iterations (0: at the end)")
    add("--num-eval-images", type=int, metavar="N", help="only N test pictures, evenly spread")
    add("--train-split", help="lists joined by +, as voc_2007_trainval+voc_2012_trainval")
    add("--test-split", help="one list, as voc_2007_test")
    add("--classes", help="in order, a,b,c or a file with one a line (default: dataset.json's)")
    add("--metric-year", type=int, choices=(2007, 2012), help="11-point or area AP")
    add("--num-gpus", type=num_gpus, default=1, metavar="N",
        help="processes, one GPU each; auto: all GPUs that are there (default: 1)")  # fmt: skip
    add("--threads", type=errors.whole(1), metavar="N", help="CPU threads (default: free cores)")
    add("--overwrite", action="store_true", help="run seeds again whose settings have changed")
    add("--no-card", action="store_true", help="accept weights without a preprocessing card")
    errors.add_check_options(parser)
    add("opts", nargs="*", metavar="KEY=VALUE", help="overrides of the config; also KEY VALUE")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.eval_on is not None:
        if arguments.config or arguments.data or arguments.check:
            parser.error("--eval-on: leave weights, --config, --data and --check out")
        if arguments.test_split is not None:
            parser.error("--test-split: is of training; with --eval-on give --eval-split")
        for name in ("train_split", "classes", "arm", "freeze", "num_gpus", "no_card"):
            if getattr(arguments, name) != parser.get_default(name):
                option = f"--{name.replace('_', '-')}"
                parser.error(f"{option}: is of training, --eval-on does not read it; leave it out")
        if arguments.weights is not None:  # the first of the KEY VALUE pairs
            arguments.opts = [arguments.weights, *arguments.opts]
        return arguments
    names = ("weights", "--config", "--data")
    missing = [name for name in names if getattr(arguments, name.lstrip("-")) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if arguments.eval_split is not None:
        parser.error("--eval-split: goes with --eval-on; for training use --test-split")
    return arguments


def message_of(error: Exception) -> str:
    """An error's message; of one that came through a loader or another process, the end of it."""
    text = str(error).strip()
    if "Traceback (most recent call last)" not in text:
        return text
    return text.splitlines()[-1].removeprefix("common.errors.UserError: ")


def parse_seeds(text: str) -> list[int]:
    """Read the seeds: "0,1,4" is [0, 1, 4].

    Raises:
        UserError: If it is no list of different non-negative integers.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise errors.UserError(f"--seeds {text!r}: give integers such as 0,1,2") from None
    if min(seeds) < 0 or max(seeds) >= 1 << 32 or len(set(seeds)) != len(seeds):
        raise errors.UserError(f"--seeds {text!r}: give different integers from 0 on, below 2^32")
    return seeds


if __name__ == "__main__":
    sys.exit(errors.run_or_check_each(main))
