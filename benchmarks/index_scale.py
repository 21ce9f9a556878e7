"""Cost of a large index: opening it, the order of an epoch, memory; and the first batch at resume.

The large set is simulated: shards of the right sizes with no bytes in them (sparse files), and an
index of as many samples as asked for. It is opened in fresh processes without torch, whose peak
memory is that of opening and ordering. The first batch is timed on a small set of photographs, at
step 0 and in the middle of the epoch in turns, each time with a loader of its own that reads in
this process.

Example:
  .venv/bin/python benchmarks/index_scale.py --json index_scale.json
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from pretrain.data.index import NO_LABEL, SAMPLE_DTYPE, ShardPart, write_index
from pretrain.data.loader import Loader
from pretrain.data.shards import ShardIndex

LIMITS = {"open_seconds": 5.0, "peak_mebibytes": 1024.0}
_PICTURE_BYTES, _TAR_BLOCK = 54_000, 512
_STRIDE = 2 * _TAR_BLOCK + 54_272  # header, picture padded to blocks, room for a label
# In a process of its own, which does not load torch. Its peak memory is not getrusage's: that one
# outlives the start of another program, so the parent's would count.
_CHILD = """
import json, sys, time
from pathlib import Path
from pretrain.data.order import epoch_samples, global_batch
from pretrain.data.shards import ShardIndex

def peak_mebibytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "VmHWM" in line).split()[1]) / 1024

before, start = peak_mebibytes(), time.perf_counter()
index = ShardIndex.open(sys.argv[1])
opened = time.perf_counter()
epoch = epoch_samples(index.sources, seed=0, epoch=0, window=16384)
batch = global_batch(epoch, 0, 256)
ordered = time.perf_counter()
assert len(batch.sample_ids) == 256
print(json.dumps({
    "open_seconds": opened - start, "order_seconds": ordered - opened,
    "peak_mebibytes": peak_mebibytes(), "libraries_mebibytes": before,
}))
"""


def simulate(folder: Path, num_shards: int, num_samples: int) -> None:
    """Write an index of `num_samples` samples and empty shards of the sizes it gives."""
    base, extra = divmod(num_samples, num_shards)
    sizes = np.full(num_shards, base, np.int64)
    sizes[:extra] += 1
    table = np.zeros(num_samples, SAMPLE_DTYPE)
    row_in_shard = np.arange(num_samples) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    table["offset"] = row_in_shard * _STRIDE + _TAR_BLOCK
    table["size"], table["label"] = _PICTURE_BYTES, NO_LABEL
    table["key"] = np.random.default_rng(0).integers(0, 2**63, num_samples, np.int64)
    parts, first = [], 0
    for number, size in enumerate(sizes.tolist()):
        name, num_bytes = f"shard-{number:06d}.tar", size * _STRIDE + 2 * _TAR_BLOCK
        with open(folder / name, "wb") as stream:
            os.truncate(stream.fileno(), num_bytes)
        shard = {"name": name, "num_samples": size, "bytes": num_bytes, "sha256": "0" * 64}
        parts.append(ShardPart(table[first : first + size], shard, []))
        first += size
    write_index(folder, parts, classes=None, options={})


def scale(folder: Path, num_shards: int, num_samples: int, num_rounds: int) -> dict[str, Any]:
    """Medians over fresh processes."""
    simulate(folder, num_shards, num_samples)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", _CHILD, str(folder)]
    runs = [
        json.loads(subprocess.check_output(command, text=True, env=environment))
        for _ in range(num_rounds)
    ]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def first_batches(index: ShardIndex, batch_size: int, num_rounds: int) -> dict[str, Any]:
    """Milliseconds to the first batch at step 0 and at resume in the middle, in turns."""
    dataset = harness.two_view_dataset(index, 224, in_workers=False)
    middle = Loader(dataset, batch_size=batch_size).num_steps // 2
    epochs = itertools.count()

    def turn(step: int) -> Callable[[], tuple[float, float]]:
        def milliseconds() -> tuple[float, float]:
            wall, processor = time.perf_counter(), time.process_time()
            next(iter(Loader(dataset, batch_size=batch_size).epoch(next(epochs), step)))
            return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)

        return milliseconds

    clocks = ("wall", "processor")
    times = harness.take_turns({"start": turn(0), "resume": turn(middle)}, num_rounds)
    medians = {
        name: dict(zip(clocks, np.median(values, axis=0).tolist(), strict=True))
        for name, values in times.items()
    }
    return {
        "batch_size": batch_size,
        "resume_step": middle,
        "start_ms": medians["start"],
        "resume_ms": medians["resume"],
        "ratio": {clock: medians["resume"][clock] / medians["start"][clock] for clock in clocks},
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; the figures for JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "large").mkdir()
        large = scale(folder / "large", options.shards, options.samples, options.rounds)
        files = harness.write_files(harness.encoded_photos(64), folder / "files")
        index = harness.open_as_shards(files, folder / "small", options.pictures, per_shard=256)
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
        **harness.context(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    counts = (
        ("shards", 10_000, 1, "simulated shards"),
        ("samples", 10_000_000, 256, "simulated samples"),
        ("rounds", 3, 1, "fresh processes that open them"),
        ("pictures", 8192, 2, "pictures of the small set"),
        ("batch-size", 64, 1, "of the first batch"),
        ("batches", 15, 1, "first batches of each kind"),
    )
    parser = harness.make_parser(__doc__, counts)
    options = parser.parse_args(arguments)
    if options.pictures < 2 * options.batch_size:
        parser.error("--pictures must be two batches")
    harness.one_thread()
    return harness.run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
