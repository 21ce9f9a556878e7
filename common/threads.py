"""How many CPU threads a program computes with: one for each core that is free.

The threads of one computation wait for each other several hundred times a step. If another program
holds one of their cores, each wait lasts until the scheduler comes round (docs/detection.md).
"""

import math
import os
import sys
import time
from pathlib import Path

from common.provenance import usable_cores

_STAT, _QUOTA = Path("/proc/stat"), Path("/sys/fs/cgroup/cpu.max")
_SECONDS = 0.25  # how long it looks at what others do


def choose_threads(given: int = 0, earlier: int | None = None) -> int | None:
    """The number of threads, which is told on standard error if others hold cores.

    Args:
        given: What the user said; 0: nothing.
        earlier: What the run that is continued had, so that it goes on with the same rounding.

    Returns:
        The first of: given; None (PyTorch's own choice) if ``OMP_NUM_THREADS`` says it, as torchrun
        and the pipeline do; earlier; the free cores.
    """
    if given:
        return given
    if os.environ.get("OMP_NUM_THREADS"):
        return None
    if earlier:
        return earlier
    free, usable = free_cores(), usable_cores()
    num_threads = max(1, round(free))
    if num_threads < usable:
        print(
            f"CPU threads: {num_threads} ({free:.1f} of {usable} cores are free now; "
            "OMP_NUM_THREADS sets another number)",
            file=sys.stderr,
        )
    return num_threads


def free_cores() -> float:
    """How many of the usable cores nobody used in the last quarter of a second.

    At most what the container's quota grants. Where the system does not say, all of them.
    """
    usable = usable_cores()
    before = _idle_ticks()
    free = float(usable)
    if before is not None:
        time.sleep(_SECONDS)
        after = _idle_ticks()
        assert after is not None
        ticks = _SECONDS * os.sysconf("SC_CLK_TCK")
        free = sum(min(1.0, (after.get(core, 0) - idle) / ticks) for core, idle in before.items())
    return min(free, _quota())


def _idle_ticks() -> dict[int, int] | None:
    """For each core that this process may use, how long it has had nothing to do (proc(5))."""
    if not _STAT.is_file() or not hasattr(os, "sched_getaffinity"):
        return None
    mine, idle = os.sched_getaffinity(0), {}
    for line in _STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in mine:
            idle[int(name[3:])] = int(fields[3]) + int(fields[4])  # idle, waiting for a disk
    return idle


def _quota() -> float:
    """Cores that the control group grants: ``cpu.max`` is "QUOTA PERIOD", or "max PERIOD"."""
    try:
        quota, period = _QUOTA.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
