#!/usr/bin/env python3
"""Convert a pretrained ResNet into Detectron2 weights, proved on a picture."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detection import keymap
from detection.errors import UserError

_EXAMPLE = """\
examples:
  .venv/bin/python tools/convert_to_d2.py runs/pretrain/checkpoint.pth runs/convert/backbone.pkl
  .venv/bin/python tools/convert_to_d2.py moco_v2_200ep.pth.tar moco.pth --layout moco

OUT ends in .pkl or .pth; a card OUT.json with the pixel statistics is written beside it.
Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="ours, a torchvision state_dict, MoCo, solo-learn, lightly")
    add("out", type=Path, help="file to write, .pkl or .pth")
    add("--branch", choices=keymap.BRANCHES, default="online", help="which network (online)")
    add("--layout", choices=("auto", *keymap.LAYOUTS), default="auto", help="key names (auto)")
    add("--image", type=Path, help="picture to compare on (default: a generated one)")
    add("--size", type=int, default=224, help="its side in pixels (default: 224)")
    add("--preprocessing", metavar="SPEC", help="imagenet (foreign default), half, or mean/std "
        "in [0, 1] as 0.485,0.456,0.406/0.229,0.224,0.225")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
    """
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.size < 64:
            raise UserError(f"--size {arguments.size}: give at least 64, so that res5 has 2 x 2")
        from detection.convert import convert, read_source
        from detection.pixels import parse_preprocessing

        spec = arguments.preprocessing
        source = read_source(
            arguments.checkpoint,
            layout=arguments.layout,
            branch=arguments.branch,
            preprocessing=parse_preprocessing(spec) if spec else None,
        )
        card = convert(source, arguments.out, picture=arguments.image, size=arguments.size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: it went wrong: {error}", file=sys.stderr)
        return 1
    differences = "  ".join(f"{stage} {value:.1e}" for stage, value in card["stages"].items())
    print(f"{arguments.checkpoint.name} ({source.layout}, {source.branch}): {source.arch}")
    print(f"{card['num_tensors']} tensors converted, {len(card['dropped'])} keys dropped:")
    for reason in sorted(set(source.dropped.values())):
        keys = [key for key, why in source.dropped.items() if why == reason]
        print(f"  {len(keys):4d}  {reason} ({keys[0]}{', ..' if len(keys) > 1 else ''})")
    print(f"relative difference on the picture: {differences}")
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.json').name} "
          f"in {card['seconds']:.1f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
