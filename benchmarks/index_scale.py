"""What large sets and long runs cost: a large index, and the memory of the loader's workers.

The large set is simulated: shards of the right sizes with no bytes in them (sparse files), and an
index of as many samples as asked for. It is opened in fresh processes without torch, whose peak
memory is that of opening and ordering.

The memory of a worker is what it alone holds (Private_Clean + Private_Dirty of
/proc/PID/smaps_rollup): what would come back if it ended. The largest value is that of all batches,
among them batches on their way in shared memory that nobody else has mapped yet. Growth is the
slope, by least squares, of what each worker holds at rest, at the end of an epoch, from the second
epoch on. "workers" of the figures holds it, for photometric changes on the device and in the
workers.

Example:
  .venv/bin/python benchmarks/index_scale.py --json index_scale.json
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import harness
from common.provenance import memory_of
from pretrain.data.index import NO_LABEL, SAMPLE_DTYPE, ShardPart, write_index
from pretrain.data.loader import Loader, ViewDataset

LIMIT_MEBIBYTES = 400  # of a worker
MODES = {"device": False, "workers": True}  # where photometric changes are made
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


def watch(
    dataset: ViewDataset, num_epochs: int, batch_size: int, num_workers: int
) -> dict[str, Any]:
    """Run epochs through worker processes and look at them.

    Returns:
        largest_mebibytes of all workers; growth_mebibytes_per_epoch of the worst worker, from the
        second epoch on; at_rest_mebibytes for each epoch, the largest of all workers.
    """
    before = set(multiprocessing.active_children())
    loader = Loader(dataset, batch_size=batch_size, num_workers=num_workers)
    largest, at_rest = 0.0, []

    def held() -> list[float]:
        """What each worker holds now, in MiB."""
        workers = set(multiprocessing.active_children()) - before
        pids = sorted(worker.pid for worker in workers if worker.pid)
        return [memory_of(pid, "Private_") / 2**20 for pid in pids]

    for epoch in tqdm(range(num_epochs), unit="epoch", disable=not sys.stderr.isatty()):
        for _ in loader.epoch(epoch):
            largest = max(largest, *held())
        at_rest.append(held())
    slopes = np.polyfit(np.arange(1, num_epochs), at_rest[1:], 1)[0]
    return {
        "num_workers": len(at_rest[0]),
        "largest_mebibytes": largest,
        "growth_mebibytes_per_epoch": float(slopes.max()),
        "at_rest_mebibytes": [max(epoch) for epoch in at_rest],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both; the figures for JSON."""
    with tempfile.TemporaryDirectory() as name:
        modes, folder = {}, Path(name)
        (folder / "large").mkdir()
        large = scale(folder / "large", options.shards, options.samples, options.rounds)
        jpegs = harness.encoded_photos(64)
        shards = harness.open_as_shards(jpegs, folder, options.pictures, per_shard=256)
        for mode, in_workers in MODES.items():
            dataset = harness.two_view_dataset(shards, options.image_size, in_workers=in_workers)
            modes[mode] = watch(dataset, options.epochs, options.batch_size, options.workers)
        shards.close()
    largest = max(found["largest_mebibytes"] for found in modes.values())
    return {
        "num_shards": options.shards,
        "num_samples": options.samples,
        **large,
        "limits": LIMITS,
        "within_limits": all(large[name] <= limit for name, limit in LIMITS.items()),
        "workers": {
            "limit_mebibytes": LIMIT_MEBIBYTES,
            "largest_mebibytes": largest,
            "within_limit": largest < LIMIT_MEBIBYTES,
            "modes": modes,
        },
        **harness.context(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    counts = (
        ("shards", 10_000, 1, "simulated shards"),
        ("samples", 10_000_000, 256, "simulated samples"),
        ("rounds", 3, 1, "fresh processes that open them"),
        ("epochs", 20, 3, "epochs of the loader"),
        ("pictures", 1024, 1, "pictures per epoch"),
        ("batch-size", 128, 1, "samples in a batch"),
        ("image-size", 224, 1, "side of a view in pixels"),
        ("workers", 2, 1, "worker processes"),
    )
    parser = harness.make_parser(__doc__, counts)
    options = parser.parse_args(arguments)
    if options.pictures < options.batch_size:
        parser.error(f"--pictures must fill a batch of {options.batch_size}")
    harness.one_thread()
    return harness.run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
