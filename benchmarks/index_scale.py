"""Cost of a large index: opening it, the order of an epoch, memory; and the first batch at resume.

The large set is simulated: shards of the right sizes with no bytes in them (sparse files), and an
index of as many samples as asked for. It is opened in fresh processes without torch, whose peak
memory is that of opening and ordering. The first batch is timed on a small set of photographs, at
step 0 and in the middle of the epoch in turns, each time with a loader of its own that reads in
this process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from benchmarks.candidates import two_view_dataset
from benchmarks.pictures import encoded_photos, open_as_shards, write_files
from pretrain.data.shards import ShardIndex
from pretrain.data.stream import Loader
from pretrain.data.tar_index import NO_LABEL, SAMPLE_DTYPE, write_index

EXAMPLE = """\
example:
  .venv/bin/python benchmarks/index_scale.py --json index_scale.json
Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
"""
LIMITS = {"open_seconds": 5.0, "peak_mebibytes": 1024.0}
_PICTURE_BYTES, _TAR_BLOCK = 54_000, 512
_STRIDE = 2 * _TAR_BLOCK + 54_272  # header, picture padded to blocks, room for a label
_CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.open_index import open_and_order
print(json.dumps(open_and_order(sys.argv[2])))
"""


def simulate(folder: Path, num_shards: int, num_samples: int) -> None:
    """Write an index of `num_samples` samples and empty shards of the sizes it gives."""
    base, extra = divmod(num_samples, num_shards)
    sizes = np.full(num_shards, base, np.int64)
    sizes[:extra] += 1
    table = np.zeros(num_samples, SAMPLE_DTYPE)
    table["shard"] = np.repeat(np.arange(num_shards), sizes)
    row_in_shard = np.arange(num_samples) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    table["offset"] = row_in_shard * _STRIDE + _TAR_BLOCK
    table["size"], table["label"] = _PICTURE_BYTES, NO_LABEL
    table["key"] = np.random.default_rng(0).integers(0, 2**63, num_samples, np.int64)
    shards = []
    for number, size in enumerate(sizes.tolist()):
        name, num_bytes = f"shard-{number:06d}.tar", size * _STRIDE + 2 * _TAR_BLOCK
        with open(folder / name, "wb") as stream:
            os.truncate(stream.fileno(), num_bytes)
        shards.append({"name": name, "num_samples": size, "bytes": num_bytes, "sha256": "0" * 64})
    write_index(folder, table, shards, classes=None, options={}, skipped=[])


def scale(folder: Path, num_shards: int, num_samples: int, num_rounds: int) -> dict[str, Any]:
    """Medians over fresh processes."""
    simulate(folder, num_shards, num_samples)
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", _CHILD, root, str(folder)]
    runs = [
        json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        for _ in range(num_rounds)
    ]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def first_batches(index: ShardIndex, batch_size: int, num_rounds: int) -> dict[str, Any]:
    """Milliseconds to the first batch at step 0 and at resume in the middle, in turns."""
    dataset = two_view_dataset(index, 224, in_workers=False)
    middle = Loader(dataset, batch_size=batch_size).num_steps // 2
    times: dict[int, list[tuple[float, float]]] = {0: [], middle: []}
    for epoch in range(num_rounds + 1):
        for step, taken in times.items():
            wall, processor = time.perf_counter(), time.process_time()
            next(iter(Loader(dataset, batch_size=batch_size).epoch(epoch, step)))
            ended = time.perf_counter() - wall, time.process_time() - processor
            if epoch:  # the first warms up
                taken.append(ended)
    start, resumed = (np.median(times[step], axis=0) * 1e3 for step in (0, middle))
    return {
        "batch_size": batch_size,
        "resume_step": middle,
        "start_ms": {"wall": float(start[0]), "processor": float(start[1])},
        "resume_ms": {"wall": float(resumed[0]), "processor": float(resumed[1])},
        "ratio": {
            "wall": float(resumed[0] / start[0]),
            "processor": float(resumed[1] / start[1]),
        },
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; the figures for JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "large").mkdir()
        large = scale(folder / "large", options.shards, options.samples, options.rounds)
        files = write_files(encoded_photos(64), folder / "files")
        index = open_as_shards(files, folder / "small", options.pictures, per_shard=256)
        first = first_batches(index, options.batch_size, options.batches)
        index.close()
    return {
        "num_shards": options.shards,
        "num_samples": options.samples,
        **large,
        "limits": LIMITS,
        "within_limits": all(large[name] <= limit for name, limit in LIMITS.items()),
        "first_batch": {"num_pictures": options.pictures, **first},
        "num_rounds": options.rounds,
        "load_average": os.getloadavg()[0],
    }


def print_table(figures: dict[str, Any]) -> None:
    """The figures for people."""
    first = figures["first_batch"]
    print(f"{figures['num_shards']:,} shards, {figures['num_samples']:,} samples, medians of "
          f"{figures['num_rounds']} processes, load {figures['load_average']:.1f}\n")  # fmt: skip
    for name, unit in (("open", "s"), ("order", "s")):
        print(f"{name:44}{figures[name + '_seconds']:10.2f} {unit}")
    print(f"{'peak memory of the process':44}{figures['peak_mebibytes']:10.0f} MiB")
    print(f"{'  of these before opening':44}{figures['libraries_mebibytes']:10.0f} MiB")
    print(f"limits (open 5 s, peak 1 GiB): {'kept' if figures['within_limits'] else 'BROKEN'}\n")
    for clock in ("wall", "processor"):
        print(f"first batch of {first['batch_size']}, {clock} time: {first['start_ms'][clock]:.0f} "
              f"ms at step 0, {first['resume_ms'][clock]:.0f} ms at step {first['resume_step']}, "
              f"ratio {first['ratio'][clock]:.2f}")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    for name, default, text in (
        ("shards", 10_000, "simulated shards"),
        ("samples", 10_000_000, "simulated samples"),
        ("rounds", 3, "fresh processes that open them"),
        ("pictures", 8192, "pictures of the small set"),
        ("batch-size", 64, "of the first batch"),
        ("batches", 15, "first batches of each kind"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    options = parser.parse_args(arguments)
    if min(options.shards, options.rounds, options.batch_size, options.batches) < 1:
        parser.error("all numbers must be at least 1")
    if options.samples < 256 or options.pictures < 2 * options.batch_size:
        parser.error("--samples must be at least 256, --pictures two batches")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    figures = run(options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
