#!/usr/bin/env python3
"""Convert a pretrained ResNet to Detectron2 or to torchvision, proved on a picture; or compare two.

Files that are read: checkpoints of this project, torchvision, timm, MoCo, solo-learn, lightly,
Detectron2 (.pkl or .pth, bare or a whole detector); .safetensors too.

Examples:
  .venv/bin/python tools/convert_to_d2.py runs/pretrain/checkpoint.pth runs/convert/backbone.pkl
  .venv/bin/python tools/convert_to_d2.py moco_v2_200ep.pth.tar moco.pth --layout moco
  .venv/bin/python tools/convert_to_d2.py --verify checkpoint.pth backbone.pkl --json

OUT ends in .pkl or .pth (torchvision: .pth or .pt); two cards are written beside it, OUT.json for
programs and OUT.md for people.
Exit status: 0 done, or the same network; 1 it went wrong, or not the same (a file that is no
complete ResNet is not); 2 wrong arguments or input.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import errors
from common.files import LOCK, held, write_json
from common.resnet import BRANCHES, LAYOUTS, add_reading_options


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        UserError: Naming the argument.
    """
    given = {name for name, value in vars(arguments).items() if value is not None}
    size, tolerance = arguments.size, arguments.tolerance
    errors.require(size >= 64, f"--size {size}: give at least 64, so that res5 has 2 x 2")
    if arguments.verify is not None:
        for name in ("checkpoint", "out", "to"):
            message = f"--verify compares two files and writes none: leave {name} out"
            errors.require(name not in given, message)
        is_share = tolerance is None or 0 <= tolerance < 1
        errors.require(is_share, f"--tolerance {tolerance}: give a number from 0 to 1")
        return
    message = "give the checkpoint and the file to write, or --verify A B"
    errors.require({"checkpoint", "out"} <= given, message)
    for name in ("branch_b", "layout_b", "tolerance"):
        errors.require(name not in given, f"--{name.replace('_', '-')} goes with --verify")


def run_verify(arguments: argparse.Namespace) -> int:
    """Compare two files and print the report."""
    from detection.convert import TOLERANCE, text, verify

    report = verify(
        *arguments.verify,
        layouts=(arguments.layout, arguments.layout_b or "auto"),
        branches=(arguments.branch, arguments.branch_b or "online"),
        size=arguments.size,
        tolerance=TOLERANCE if arguments.tolerance is None else arguments.tolerance,
    )
    show(report, text(report), arguments.json)
    return 0 if report["same"] else 1


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert a file and print what became of it."""
    from common.startup import begin_program  # first, since it imports torch

    # isort: split
    from common.backbone import read_backbone, reading_of
    from detection.convert import convert

    begin_program()

    source = read_backbone(arguments.checkpoint, **reading_of(arguments))
    if arguments.check:
        pixels = source.preprocessing
        facts = {
            "arch": asdict(source.arch),
            "pixel_mean": [255 * value for value in pixels.mean],
            "pixel_std": [255 * value for value in pixels.std],
            "input_format": "RGB",
            "stride_in_1x1": False,  # others are not read
        }
        errors.print_check(facts, as_json=arguments.json is not None)
        return 0
    to = arguments.to or "detectron2"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with held(arguments.out.with_name(arguments.out.name + LOCK)):
        card = convert(source, arguments.out, to=to, size=arguments.size)
    differences = "  ".join(f"{stage} {value:.2g}" for stage, value in card["stages"].items())
    ends = [arguments.out.with_suffix(end).name for end in (".json", ".md")]
    lines = [
        f"{arguments.checkpoint.name} ({source.layout}, {source.branch}): {source.arch}",
        f"{card['num_tensors']} tensors and {card['num_counters']} batch counters converted to "
        f"{to}, {len(card['dropped'])} keys dropped: "
        f"{', '.join(sorted(set(source.dropped.values()))) or 'none'}",
        *(f"note: {note}" for note in source.notes),
        f"relative difference on the picture: {differences}",
        f"wrote {arguments.out}, {' and '.join(ends)} in {errors.duration(card['seconds'])}",
    ]
    show(card, "\n".join(lines), arguments.json)
    return 0


def show(result: dict[str, Any], text: str, json_to: Path | None) -> None:
    """Print the text, or JSON in its place; with a file name both."""
    if json_to == Path("-"):
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    if json_to is not None:
        write_json(json_to, result)
    print(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done or the same, 1 it went wrong or not the same, 2 wrong arguments or
        input.
    """
    parser = errors.command_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="file to convert")
    add("out", type=Path, nargs="?", help="file to write")
    add("--to", choices=("detectron2", "torchvision"), help="target (default: detectron2)")
    add("--verify", type=Path, nargs=2, metavar=("A", "B"), help="compare two files instead")
    add_reading_options(parser)
    add("--branch-b", choices=BRANCHES, help="the same for B of --verify (online)")
    add("--layout-b", choices=("auto", *LAYOUTS), help="the same for B of --verify (auto)")
    add("--size", type=int, default=224, help="side of the picture that both networks see, in "
        "pixels (default: 224)")  # fmt: skip
    add("--tolerance", type=float, help="of --verify: largest relative difference that counts as "
        "the same (default: 1e-5)")  # fmt: skip
    add("--check", nargs="?", const="all", choices=("all",),
        help="read the checkpoint, say what is in it, and stop")  # fmt: skip
    add("--json", type=errors.json_file, nargs="?", const=Path("-"), metavar="FILE",
        help="the result as JSON: to FILE, or instead of the text")  # fmt: skip
    arguments = parser.parse_args(argv)

    def work() -> int:
        check_arguments(arguments)
        return run_convert(arguments) if arguments.verify is None else run_verify(arguments)

    return errors.run_command(work)


if __name__ == "__main__":
    sys.exit(errors.run_or_check_each(main))
