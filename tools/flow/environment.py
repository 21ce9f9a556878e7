"""What a run ran on: commit, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tools.flow.fingerprint import library_version

LIBRARIES = (
    "torch",
    "torchvision",
    "detectron2",
    "numpy",
    "opencv-python",
    "opencv-python-headless",
    "simplejpeg",
    "pillow",
    "webdataset",
    "pycocotools",
)


def describe(root: Path) -> dict[str, Any]:
    """Return commit, versions and machine as plain values."""
    found = {name: library_version(name) for name in LIBRARIES}
    return {
        "commit": commit(root),
        "versions": {"python": platform.python_version()} | {k: v for k, v in found.items() if v},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor(),
            "num_cores": usable_cores(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit(root: Path) -> str | None:
    """Return the repository's commit, with `+changes` if the tree differs; None outside git."""
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if changes else head


def processor() -> str | None:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
