"""Private memory of the loader's workers over many epochs: the largest value, and whether it grows.

Private memory is what a worker alone holds (Private_Clean + Private_Dirty of
/proc/PID/smaps_rollup): what would come back if it ended. The largest value is that of all batches,
among them batches on their way in shared memory that nobody else has mapped yet. Growth is the
slope, by least squares, of what each worker holds at rest, at the end of an epoch, from the second
epoch on.

Example:
  .venv/bin/python benchmarks/worker_memory.py --json worker_memory.json
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import harness
from common.provenance import memory_of
from pretrain.data.loader import Loader, ViewDataset

LIMIT_MEBIBYTES = 400
MODES = {"device": False, "workers": True}  # where photometric changes are made
_NUM_FILES = 64


@dataclass
class Watched:
    """Private memory of one worker in MiB."""

    at_rest: list[float] = field(default_factory=list)  # at the end of each epoch
    largest: float = 0.0  # after any batch


def watch(
    dataset: ViewDataset, num_epochs: int, batch_size: int, num_workers: int
) -> dict[int, Watched]:
    """Run epochs through worker processes and look at them; {process id: what was seen}."""
    before = set(multiprocessing.active_children())
    loader = Loader(dataset, batch_size=batch_size, num_workers=num_workers)
    found: dict[int, Watched] = defaultdict(Watched)

    def held() -> list[tuple[Watched, float]]:
        """What each worker holds now, in MiB."""
        pids = [w.pid for w in multiprocessing.active_children() if w not in before and w.pid]
        return [(found[pid], memory_of(pid, "Private_") / 2**20) for pid in pids]

    for epoch in tqdm(range(num_epochs), unit="epoch", disable=not sys.stderr.isatty()):
        for _ in loader.epoch(epoch):
            for worker, memory in held():
                worker.largest = max(worker.largest, memory)
        for worker, memory in held():
            worker.at_rest.append(memory)
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
    jpegs = harness.chosen_photos(options.pictures, _NUM_FILES)
    modes = {}
    with tempfile.TemporaryDirectory() as name:
        files = harness.write_files(jpegs, Path(name, "files"))
        shards = Path(name, "shards")
        index = harness.open_as_shards(files, shards, options.num_samples, per_shard=256)
        for mode, in_workers in MODES.items():
            dataset = harness.two_view_dataset(index, options.image_size, in_workers=in_workers)
            modes[mode] = summary(
                watch(dataset, options.epochs, options.batch_size, options.workers)
            )
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
        **harness.context(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    counts = (
        ("epochs", 20, 3, "epochs"),
        ("num-samples", 1024, 1, "pictures per epoch"),
        ("batch-size", 128, 1, "samples in a batch"),
        ("image-size", 224, 1, "side of a view in pixels"),
        ("workers", 2, 1, "worker processes"),
    )
    parser = harness.make_parser(__doc__, counts)
    harness.add_pictures(parser)
    options = parser.parse_args(arguments)
    if options.num_samples < options.batch_size:
        parser.error(f"--num-samples must fill a batch of {options.batch_size}")
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("this system has no /proc/PID/smaps_rollup (Linux 4.14 or newer has)")
    harness.one_thread()
    return harness.run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
