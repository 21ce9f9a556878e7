"""Pictures per second from files to boxes: our predictor, and Detectron2's `DefaultPredictor`.

One detector, untrained unless --detector is given, on the same generated photographs of 500 x 375.
Wall-clock time; medians over rounds in which every candidate takes its turn. Ours decodes ahead in
threads and takes batches; `DefaultPredictor` takes a picture at a time, read by OpenCV as in
Detectron2's demo. Boxes are not drawn.

Examples:
  .venv/bin/python benchmarks/predict.py --json predict.json
  .venv/bin/python benchmarks/predict.py --detector runs/demo --pictures 200 --json predict.json
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from benchmarks import harness
from common.picture_files import SourceFile
from common.provenance import usable_cores
from detection.predict import Detector, load_detector
from detection.prediction.sources import OpenedPicture, open_all
from detection.training.config import load_config

COUNTS = [
    ("pictures", 32, 1, "pictures of a turn"),
    ("rounds", 5, 1, "turns of each candidate"),
    ("batch", 8, 1, "pictures of our larger batch"),
    ("threads", usable_cores(), 1, "CPU threads"),
]


def open_detector(options: argparse.Namespace) -> Detector:
    """The trained one, or one with random weights."""
    if options.detector is not None:
        return load_detector(options.detector)
    cfg = load_config(options.config)
    torch.manual_seed(harness.SEED)
    return Detector(cfg, [str(x) for x in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)], build_model(cfg))


def candidates(
    detector: Detector, files: Sequence[Path], batches: Sequence[int], num_threads: int
) -> dict[str, Callable[[], float]]:
    """Name -> a turn, which returns pictures per second."""

    def ours(batch_size: int) -> None:
        sources = [SourceFile(file, is_named=True) for file in files]
        batch = []
        for number, opened in enumerate(open_all(sources, 1, num_threads), start=1):
            assert isinstance(opened, OpenedPicture)
            batch.append(opened.pixels)
            if len(batch) == batch_size or number == len(files):
                detector.predict(batch)
                batch.clear()

    predictor = DefaultPredictor(detector.cfg)  # without weights
    predictor.model.load_state_dict(detector.model.state_dict())

    def theirs() -> None:
        for file in files:
            predictor(cv2.imread(str(file)))["instances"].to("cpu")

    def rate(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return len(files) / (time.perf_counter() - began)

    turns = {f"ours, batch of {size}": lambda size=size: rate(lambda: ours(size))
             for size in batches}  # fmt: skip
    return {**turns, "DefaultPredictor": lambda: rate(theirs)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    torch.set_num_threads(options.threads)
    detector = open_detector(options)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, data in enumerate(harness.encoded_photos(options.pictures)):
            files.append(Path(folder) / f"{number:05d}.jpg")
            files[-1].write_bytes(data)
        turns = candidates(detector, files, sorted({1, options.batch}), options.threads)
        found = harness.take_turns(turns, options.rounds)
    rates = harness.medians(found)
    return {
        "pictures_per_second": rates,
        "ranges": harness.ranges(found),
        "times_default_predictor": {
            name: rate / rates["DefaultPredictor"] for name, rate in rates.items()
        },
        "detector": str(options.detector or options.config.name),
        "num_pictures": options.pictures,
        "num_threads": options.threads,
        "device": detector.cfg.MODEL.DEVICE,
        **harness.context(),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
    """
    parser = harness.make_parser(__doc__, COUNTS)
    config = harness.ROOT / "configs" / "detection" / "thin_R50_C4.yaml"
    parser.add_argument("--detector", type=Path, metavar="RUN", help="as tools/predict.py takes it")
    parser.add_argument("--config", type=Path, default=config, help="default: thin_R50_C4.yaml")
    options = parser.parse_args(argv)
    return harness.run_and_report(lambda: measure(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
