"""Stages side by side: how many, with how many threads each, and the order in which they begin."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from common.errors import RunFailed
from common.provenance import usable_cores

_AUTO_AT_MOST = 4


def side_by_side(setting: int | Literal["auto"], num_arms: int) -> int:
    """Return how many detection stages run at once.

    `auto` does not look at the number of seeds: with it, more seeds would change the threads of
    each, and thereby figures.
    """
    if setting != "auto":
        return setting
    return 1 if has_nvidia_gpu() else min(usable_cores(), _AUTO_AT_MOST, num_arms)


def has_nvidia_gpu() -> bool:
    """Whether there is an NVIDIA driver and its devices are not hidden from programs.

    Asking torch itself would cost every call of the pipeline its seconds of import.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()


def thread_environment(parallel: int) -> dict[str, str]:
    """Return what stages side by side need in their environment: each its share of the cores.

    The share follows from `parallel`, not from how many happen to run. OMP_NUM_THREADS set by a
    person stays.
    """
    if parallel == 1 or os.environ.get("OMP_NUM_THREADS"):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // parallel))}


def run_in_order(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Begin jobs in their order, at most `workers` at once, and wait for all.

    After an error no further job begins; those that run go on to their end.

    Raises:
        RunFailed: For one or several failed stages.
        Exception: The first error of another kind.
    """
    failed = threading.Event()

    def begin(job: Callable[[], None]) -> None:
        if failed.is_set():
            return
        try:
            job()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(begin, job) for job in jobs]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if len(errors) == 1 or not isinstance(error, RunFailed):
            raise error
    if errors:
        raise RunFailed("\nerror: ".join(map(str, errors)))
