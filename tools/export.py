#!/usr/bin/env python3
"""Write a backbone or a detector in a form that other programs load, compared before it is written.

A backbone: torchvision, timm, safetensors (torchvision's names), torchscript, onnx.
A detector: torchscript, onnx, detectron2 (a file and a config that need none of our code); with
the first three forms of a backbone its ResNet is written.

Examples:
  .venv/bin/python tools/export.py runs/demo/pretrain backbone.safetensors --to safetensors
  .venv/bin/python tools/export.py runs/demo detector.pt --to torchscript --pictures my_pictures
  .venv/bin/python tools/export.py runs/demo/detection/pretrained plain.pth --to detectron2

INPUT: a checkpoint or weights of a ResNet (as tools/convert_to_d2.py reads), a detector's file or
folder (as tools/predict.py takes), or the folder of a pretraining. A card OUT.json is written too.
onnx needs the packages onnx and onnxruntime.
Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input, or the forms do not agree.
"""

import argparse
import sys
from pathlib import Path

from common.errors import command_parser, no_such_file, require, run_command
from common.resnet import BRANCHES

_OF_BACKBONE = ("torchvision", "timm", "safetensors")
_TARGETS = (*_OF_BACKBONE, "torchscript", "onnx", "detectron2")


def run(arguments: argparse.Namespace) -> None:
    """Write the form, and say how far it is from the original."""
    source, out, to = arguments.input, arguments.out, arguments.to
    require(not out.is_dir(), f"{out}: is a folder; give a file name")
    require(source.exists(), no_such_file(source, "give weights or a run's folder"))
    if (source / "checkpoint.pth").is_file():
        source /= "checkpoint.pth"

    from common import checkpoints
    from common.backbone import Preprocessing, parse_preprocessing, read_backbone
    from detection.convert import convert
    from detection.export import export_backbone, export_detector
    from detection.predict import find_weights, is_detector, load_detector

    weights = find_weights(source)
    require(out.resolve() != weights.resolve(), f"{out}: is the input; choose another name")
    pixels = arguments.preprocessing and parse_preprocessing(arguments.preprocessing)
    stride_in_1x1 = None
    if is_detector(checkpoints.read(weights)):
        detector = load_detector(weights, device="cpu")
        if to not in _OF_BACKBONE:
            images = _pictures(arguments)
            card = export_detector(detector, out, to, images)
            print(
                f"{weights}: {card['num_boxes']} boxes on {len(images)} pictures differ by at most "
                f"{card['largest_difference']:.2g}\nwrote {out} and {out.with_suffix('.json').name}"
            )
            return
        cfg = detector.cfg
        order = cfg.INPUT.FORMAT
        require(order == "RGB", f"{weights}: its pictures are {order}, other programs' are RGB")
        mean, std = (tuple(x / 255 for x in cfg.MODEL[key]) for key in ("PIXEL_MEAN", "PIXEL_STD"))
        pixels, stride_in_1x1 = Preprocessing(mean, std), cfg.MODEL.RESNETS.STRIDE_IN_1X1
    require(to != "detectron2", f"{weights}: is a backbone; use tools/convert_to_d2.py")
    require(not arguments.pictures, "--pictures: goes with a detector")
    backbone = read_backbone(
        weights, branch=arguments.branch, preprocessing=pixels, stride_in_1x1=stride_in_1x1
    )
    if to in _OF_BACKBONE:
        worst = convert(backbone, out, to=to)["max_relative_difference"]
    else:
        worst = export_backbone(backbone, out, to)["largest_difference"]
    print(f"{weights}: {backbone.arch}, relative difference at most {worst:.2g}")
    print(f"wrote {out} and {out.with_suffix('.json').name}")


def _pictures(arguments: argparse.Namespace) -> list:
    """What the detector is compared on."""
    from common.picture_files import find_files
    from common.pictures import BadPicture
    from detection.export import NUM_PICTURES, comparison_pictures
    from detection.prediction.sources import OpenedPicture, open_all

    if not arguments.pictures:
        return comparison_pictures()
    images = []
    for opened in open_all(find_files(arguments.pictures, arguments.out), 1, 1):
        require(not isinstance(opened, BadPicture), f"--pictures: {opened}")
        if isinstance(opened, OpenedPicture):
            images.append(opened.pixels)
        if len(images) == NUM_PICTURES:
            break
    require(bool(images), "--pictures: holds no picture")
    return images


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
    """
    parser = command_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="a backbone or a detector, see below")
    add("out", type=Path, metavar="OUT", help="file to write")
    add("--to", choices=_TARGETS, required=True, help="the form")
    add("--pictures", nargs="+", metavar="PICTURES",
        help="compare a detector on the first 20 of these (default: generated ones)")  # fmt: skip
    add("--branch", choices=BRANCHES, default="online", help="of a checkpoint of ours (online)")
    add("--preprocessing", metavar="SPEC", help="of a backbone that does not say it: imagenet, "
        "half, or mean/std in [0, 1] as 0.485,0.456,0.406/0.229,0.224,0.225")  # fmt: skip
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
