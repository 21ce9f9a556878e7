"""Private memory of the loader's workers over many epochs: the largest value, and whether it grows.

Private memory is what a worker alone holds (Private_Clean + Private_Dirty of
/proc/PID/smaps_rollup): what would come back if it ended. The largest value is that of all batches,
among them batches on their way in shared memory that nobody else has mapped yet. Growth is the
slope, by least squares, of what each worker holds at rest, at the end of an epoch, from the second
epoch on.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import (
    chosen_photos,
    make_parser,
    open_as_shards,
    run_and_report,
    two_view_dataset,
    versions,
    write_files,
)
from pretrain.data.loader import Loader, TwoViewDataset
from pretrain.data.shards import ShardIndex

EXAMPLE = """\
example:
  .venv/bin/python benchmarks/worker_memory.py --json worker_memory.json
Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
"""
LIMIT_MEBIBYTES = 400
MODES = {"device": False, "workers": True}  # where photometric changes are made
_NUM_FILES = 64


def private_mebibytes(pid: int) -> float:
    """What a process holds alone, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = [line for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))]
    return sum(int(line.split()[1]) for line in own) / 1024


@dataclass
class Watched:
    """Private memory of one worker in MiB."""

    at_rest: list[float] = field(default_factory=list)  # at the end of each epoch
    largest: float = 0.0  # after any batch


def watch(
    dataset: TwoViewDataset, num_epochs: int, batch_size: int, num_workers: int
) -> dict[int, Watched]:
    """Run epochs through worker processes and look at them; {process id: what was seen}."""
    before = {process.pid for process in multiprocessing.active_children()}
    loader = Loader(dataset, batch_size=batch_size, num_workers=num_workers)
    found: dict[int, Watched] = defaultdict(Watched)

    def workers() -> set[int]:
        pids = {process.pid for process in multiprocessing.active_children()} - before
        return {pid for pid in pids if pid is not None}

    for epoch in tqdm(range(num_epochs), unit="epoch", disable=not sys.stderr.isatty()):
        for _ in loader.epoch(epoch):
            for pid in workers():
                found[pid].largest = max(found[pid].largest, private_mebibytes(pid))
        for pid in workers():
            found[pid].at_rest.append(private_mebibytes(pid))
    return dict(found)


def summary(found: dict[int, Watched]) -> dict[str, Any]:
    """The figures of one mode.

    Returns:
        largest_mebibytes of all workers; growth_mebibytes_per_epoch of the worst worker, from the
        second epoch on; at_rest_mebibytes for each epoch, the largest of all workers.
    """
    rows = [worker.at_rest for worker in found.values()]
    slopes = [float(np.polyfit(np.arange(1, len(row)), row[1:], 1)[0]) for row in rows]
    return {
        "num_workers": len(found),
        "largest_mebibytes": max(worker.largest for worker in found.values()),
        "growth_mebibytes_per_epoch": max(slopes),
        "at_rest_mebibytes": [max(epoch) for epoch in zip(*rows, strict=True)],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both modes; the figures for JSON."""
    jpegs = chosen_photos(options.pictures, _NUM_FILES)
    with tempfile.TemporaryDirectory() as name:
        files = write_files(jpegs, Path(name, "files"))
        index = open_as_shards(files, Path(name, "shards"), options.num_samples, per_shard=256)
        modes = {mode: summary(_watch_mode(index, mode, options)) for mode in MODES}
        index.close()
    largest = max(found["largest_mebibytes"] for found in modes.values())
    return {
        "limit_mebibytes": LIMIT_MEBIBYTES,
        "largest_mebibytes": largest,
        "growth_mebibytes_per_epoch": max(f["growth_mebibytes_per_epoch"] for f in modes.values()),
        "within_limit": largest < LIMIT_MEBIBYTES,
        "modes": modes,
        "num_epochs": options.epochs,
        "num_samples": options.num_samples,
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }


def _watch_mode(index: ShardIndex, mode: str, options: argparse.Namespace) -> dict[int, Watched]:
    dataset = two_view_dataset(index, options.image_size, in_workers=MODES[mode])
    return watch(dataset, options.epochs, options.batch_size, options.workers)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser(__doc__, EXAMPLE, (
        ("epochs", 20, "epochs"),
        ("num-samples", 1024, "pictures per epoch"),
        ("batch-size", 128, "samples in a batch"),
        ("image-size", 224, "side of a view in pixels"),
        ("workers", 2, "worker processes"),
    ))  # fmt: skip
    real = "real pictures, shrunk to 500 x 375; default: generated ones"
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help=real)
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.image_size, options.workers) < 1 or options.epochs < 3:
        parser.error("all numbers must be at least 1, --epochs at least 3")
    if options.num_samples < options.batch_size:
        parser.error(f"--num-samples must fill a batch of {options.batch_size}")
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("this system has no /proc/PID/smaps_rollup (Linux 4.14 or newer has)")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    return run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
