"""Opening a shard set and ordering an epoch, in a process without torch.

benchmarks/index_scale.py runs this in fresh processes.
"""

import time
from pathlib import Path

from pretrain.data.mixture import source_sizes
from pretrain.data.order import epoch_samples, global_batch
from pretrain.data.shards import ShardIndex

BATCH, WINDOW = 256, 16384


def open_and_order(folder: str) -> dict[str, float]:
    """Open a shard set and compute the first batch of an epoch.

    Returns:
        open_seconds, order_seconds (wall clock), peak_mebibytes (resident, whole process),
        libraries_mebibytes (the same before the set was opened).
    """
    before = _peak_mebibytes()
    start = time.perf_counter()
    index = ShardIndex.open(folder)
    opened = time.perf_counter()
    epoch = epoch_samples(source_sizes(index), seed=0, epoch=0, window=WINDOW)
    batch = global_batch(epoch, 0, BATCH)
    ordered = time.perf_counter()
    assert len(batch.sample_ids) == BATCH
    return {
        "open_seconds": opened - start,
        "order_seconds": ordered - opened,
        "peak_mebibytes": _peak_mebibytes(),
        "libraries_mebibytes": before,
    }


def _peak_mebibytes() -> float:
    # Not getrusage: its maximum outlives the start of another program, so the parent's would count.
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024
