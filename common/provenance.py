"""Where a result comes from: commit, versions, machine, memory."""

import contextlib
import functools
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Distributions whose versions decide figures; what is not installed is left out.
LIBRARIES = (
    *("torch", "torchvision", "detectron2", "numpy", "opencv-python", "opencv-python-headless"),
    *("simplejpeg", "pillow", "webdataset", "pycocotools"),
)
_ROOT = Path(__file__).parents[1]


@functools.cache
def library_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Python's version and those of the distributions that are installed."""
    known = {name: library_version(name) for name in names}
    return {"python": platform.python_version()} | {k: v for k, v in known.items() if v}


def commit(root: Path = _ROOT) -> str | None:
    """The repository's commit, with ``+changes`` if the tree differs; None outside git."""
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if changes else head


def machine() -> dict[str, Any]:
    """System, processor, cores that this process may use, memory in bytes."""
    processor = platform.processor() or None
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
        processor = names[0] if names else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "num_cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def describe(root: Path = _ROOT) -> dict[str, Any]:
    """Commit, versions and machine as plain values."""
    return {"commit": commit(root), "versions": versions(), "machine": machine()}


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, and what its live workers hold for themselves now.

    ``RUSAGE_CHILDREN`` would not do: it knows ended children only, and those with the memory of the
    process that they were forked from.
    """
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return own + sum(
        memory_of(worker.pid, "Private_") for worker in multiprocessing.active_children()
    )


def memory_of(pid: int | None, kind: str) -> int:
    """Memory of a process in bytes; 0 where the system does not say.

    Args:
        pid: The process.
        kind: "Private_": what it shares with no other process. "Pss:": shared pages count once
            among their users.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
