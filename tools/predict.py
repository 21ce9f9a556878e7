#!/usr/bin/env python3
r"""Draw a trained detector's boxes on pictures, and write them down.

A file is judged by its content, not by its name; hidden files are passed over.

Examples:
  .venv/bin/python tools/predict.py runs/demo my_pictures --out boxes
  .venv/bin/python tools/predict.py model_final.pth 'photos/**/*.jpg' clip.mp4 --every 10 \
      --out boxes --score 0.3 --format json,voc

Writes OUT/pictures/NAME.jpg and OUT/predictions.json; with --format also OUT/voc, OUT/coco or
OUT/yolo, data sets to correct and to train on.
Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
"""

import argparse
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from common.errors import (
    UserError,
    command_parser,
    duration,
    memory_remedy,
    printable,
    require,
    run_command,
    whole,
)


def run(arguments: argparse.Namespace) -> None:
    """Predict, and say what was done."""
    formats = [name.strip() for name in arguments.format.split(",") if name.strip()]
    # Before the imports that take seconds.
    require(0 <= arguments.score <= 1, f"--score {arguments.score}: give a number from 0 to 1")

    import torch
    from tqdm import tqdm

    from common.drawing import drawable_name
    from common.picture_files import find_files
    from common.pictures import BadPicture
    from common.threads import choose_threads
    from detection.predict import Prediction, find_weights, load_detector
    from detection.prediction.sources import OpenedPicture, holds_predictions, open_all
    from detection.prediction.write import FORMATS, PredictionWriter, prepared

    unknown = [name for name in formats if name not in FORMATS]
    require(not unknown, f"--format {', '.join(unknown)}: give some of {', '.join(FORMATS)}")
    num_threads = choose_threads(arguments.threads or 0) or torch.get_num_threads()
    torch.set_num_threads(num_threads)
    files = find_files(arguments.pictures, arguments.out, holds_predictions)
    weights = find_weights(arguments.detector)
    detector = load_detector(weights, device=arguments.device)
    print(printable(f"{weights}: {len(detector.classes)} classes on {detector.cfg.MODEL.DEVICE}"))

    on_cpu = detector.cfg.MODEL.DEVICE == "cpu"
    batch_size = arguments.batch or (1 if on_cpu else detector.batch_size)
    counts: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    highest, batch, began = 0.0, list[OpenedPicture](), time.perf_counter()

    def predict_batch() -> None:
        nonlocal highest
        found: list[list[Prediction]] = detector.predict([one.pixels for one in batch])
        for one, boxes in zip(batch, found, strict=True):
            highest = max([highest, *(box.score for box in boxes)])
            kept = [box for box in boxes if box.score >= arguments.score]
            classes.update(box.class_name for box in kept)
            writer.add(one, kept)
        counts["pictures"] += len(batch)
        bar.update(len(batch))
        batch.clear()

    with (
        prepared(arguments.out, overwrite=arguments.overwrite),
        tqdm(unit=" pictures", disable=None) as bar,
    ):
        writer = PredictionWriter(arguments.out, formats, detector.classes)
        for opened in open_all(files, arguments.every, num_threads):
            if opened is None:
                counts["others"] += 1
            elif isinstance(opened, BadPicture):
                counts["bad"] += 1
                tqdm.write(printable(f"bad picture: {opened}"), file=sys.stderr)
                if counts["bad"] > arguments.max_bad:
                    raise UserError(
                        f"{counts['bad']} bad pictures, more than --max-bad {arguments.max_bad}: "
                        "repair or remove them, or leave out up to N with --max-bad N"
                    )
            else:
                batch.append(opened)
                if len(batch) == batch_size:
                    predict_batch()
        if batch:
            predict_batch()
        if not counts["pictures"]:
            raise UserError(
                f"{', '.join(arguments.pictures)}: no picture among {len(files)} files; give "
                "pictures, folders that hold some, or a video"
            )
        writer.finish()

    seconds = time.perf_counter() - began
    listed = ", ".join(f"{name} {number}" for name, number in classes.most_common())
    text = f"{counts['pictures']} pictures, {classes.total()} boxes" + f" ({listed})" * bool(listed)
    text += f" in {duration(seconds)}, {counts['pictures'] / seconds:.1f} pictures per second"
    if counts["bad"] or counts["others"]:
        text += f"; left out: {counts['bad']} bad pictures, {counts['others']} files of other kinds"
    print(text)
    if not classes:
        print(f"no score reached {arguments.score}; the highest is {highest:.2f}: see --score")
    undrawn = [name for name in classes if drawable_name(name, detector.classes) != name]
    if undrawn:
        print(printable(f"drawn as numbers, since the font lacks letters: {', '.join(undrawn)}"))
    print(printable(f"wrote {arguments.out}/predictions.json and {arguments.out}/pictures"))


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments or input.
    """
    parser = command_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("detector", type=Path, metavar="RUN|WEIGHTS",
        help="a pipeline run (its pretrained arm), an arm's folder (its first finished seed), a "
        "seed's folder, or model_final.pth")  # fmt: skip
    add("pictures", nargs="+", metavar="PICTURES", help="pictures, folders, globs, videos")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--score", type=float, default=0.5, metavar="S", help="lowest score (default: 0.5)")
    add("--format", default="json", metavar="LIST",
        help="of json (always written), voc, coco, yolo, with commas (default: json)")  # fmt: skip
    add("--every", type=whole(1), default=1, metavar="N", help="of a video: every N-th frame (all)")
    add("--batch", type=whole(1), metavar="N",
        help="pictures per forward pass (default: 1 on a CPU, where more are slower; "
        "TEST.IMS_PER_BATCH on a GPU; 1: no picture depends on another)")  # fmt: skip
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: free cores)")
    add("--device", help="cpu, cuda, .. (default: a GPU if there is one)")
    add("--max-bad", type=whole(0), default=0, metavar="N",
        help="leave out up to N pictures that do not decode (default: 0)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace older predictions in DIR")
    arguments = parser.parse_args(argv)
    work = memory_remedy("lower --batch, or use --device cpu")(partial(run, arguments))
    return run_command(work, when_interrupted="stopped; the same command starts anew")


if __name__ == "__main__":
    sys.exit(main())
