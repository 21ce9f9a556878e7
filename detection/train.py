"""Fine-tune and evaluate a detector: the program behind tools/train_voc.sh."""

import argparse
import json
import sys
from pathlib import Path

from detection.errors import UserError

_EXAMPLE = """\
examples:
  tools/train_voc.sh runs/convert/backbone.pkl --config configs/detection/thin_R50_C4.yaml \\
      --data data/scenes --out runs/pretrained --seeds 0,1,2
  tools/train_voc.sh random --config configs/detection/thin_R50_C4.yaml --data data/scenes \\
      --out runs/random_frozen --freeze SOLVER.MAX_ITER 200

Run it again after an interruption: finished seeds are kept, the others go on from their last
checkpoint. Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools/train_voc.sh",
        epilog=_EXAMPLE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("weights", help="backbone.pkl or .pth from tools/convert_to_d2.py, or `random`")
    add("--config", type=Path, required=True, help="a YAML of configs/detection/")
    add("--data", type=Path, required=True, help="data set with dataset.json, or a VOC devkit")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--seeds", default="0", help="comma-separated, one run each (default: 0)")
    add("--freeze", action="store_true", help="freeze the whole backbone before the ROI head")
    add("--arm", help="name of this arm in the results (default: from weights and --freeze)")
    add("--eval-every", type=int, metavar="N", help="evaluate every N iterations (0: at the end)")
    add("--num-eval-images", type=int, metavar="N", help="only the first N test pictures")
    add("--train-split", help="lists joined by +, as voc_2007_trainval+voc_2012_trainval")
    add("--test-split", help="one list, as voc_2007_test")
    add("--classes", help="class names in order, comma-separated (default: dataset.json or VOC)")
    add("--metric-year", type=int, choices=(2007, 2012), help="11-point or area AP")
    add("--num-gpus", type=int, default=1, help="processes, one GPU each (default: 1)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's, all cores)")
    add("--overwrite", action="store_true", help="run seeds again whose settings have changed")
    add("--no-card", action="store_true", help="accept weights without a preprocessing card")
    add("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
    """
    arguments = build_parser().parse_intermixed_args(argv)
    from torch import OutOfMemoryError
    from torch.multiprocessing.spawn import ProcessException  # seconds that --help need not wait

    try:
        arguments.seed_list = parse_seeds(arguments.seeds)
        from detection.run import run_arm

        summary = run_arm(arguments)
    except UserError as error:
        print(f"error: {last_words(error)}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, ProcessException) as error:
        print(f"error: it went wrong: {last_words(error)}", file=sys.stderr)
        return 1
    except OutOfMemoryError as error:
        reason = last_words(error).splitlines()[0]
        print(f"error: {reason}; lower SOLVER.IMS_PER_BATCH", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 1
    print(json.dumps(summary["mean"]))
    return 0


def last_words(error: Exception) -> str:
    """An error's message; of one that came through a loader or another process, the end of it."""
    text = str(error).strip()
    if "Traceback (most recent call last)" not in text:
        return text
    return text.splitlines()[-1].removeprefix("detection.errors.UserError: ")


def parse_seeds(text: str) -> list[int]:
    """Read the seeds: "0,1,4" is [0, 1, 4].

    Raises:
        UserError: If it is no list of different non-negative integers.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r}: give integers such as 0,1,2") from None
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {text!r}: give different integers from 0 on")
    return seeds


if __name__ == "__main__":
    sys.exit(main())
