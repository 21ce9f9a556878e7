"""What stands beside a run: the resolved config, the environment, the command, the summary."""

from __future__ import annotations

import os
import sys
import time
import weakref
from pathlib import Path
from typing import TextIO

import torch
import yaml

from common import provenance
from common.config import to_plain
from common.errors import UserError
from common.files import lock_file, read_json_lines, remove_partial_files, write_json, write_text
from pretrain.config import PretrainConfig
from pretrain.engine.trainer import Callback

_LOCK_TRIES, _LOCK_PAUSE_SECONDS = 20, 0.25  # a process that was killed may still be going


def prepare(config: PretrainConfig, *, resume: bool) -> Path:
    """Make the run's folder, or refuse one that holds another run.

    Raises:
        UserError: ``out`` missing, or a run stands there and ``--resume`` was not given.
    """
    if config.out is None:
        raise UserError("out is not set: name the folder of this run, e.g. out=runs/first")
    folder = Path(config.out)
    if (folder / "checkpoint.pth").exists() and not resume:
        raise UserError(
            f"{folder} holds a run already: continue it with --resume, or choose another out=DIR"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class FolderLock:
    """An open lock file: ``close`` frees the folder; so does the end of this object."""

    def __init__(self, file: TextIO) -> None:
        self.close = weakref.finalize(self, file.close)


def hold(folder: Path) -> FolderLock:
    """Lock the folder against a second run.

    The lock is the process's own: the loader's workers do not inherit it, and the system frees it
    however the process ends.

    Raises:
        UserError: If another process holds it; a killed one may take a few seconds to go.
    """
    path = folder / ".lock"
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    for _ in range(_LOCK_TRIES):
        if not lock_file(file, folder, of_process=True):
            time.sleep(_LOCK_PAUSE_SECONDS)
            continue
        remove_partial_files(folder)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return FolderLock(file)
    file.seek(0)
    owner = file.read().strip() or "unknown"
    file.close()
    raise UserError(
        f"{folder}: another process (number {owner}) is training here; wait for it, stop it, or "
        "choose another out=DIR"
    )


class RunFolder(Callback):
    """Writes what stands beside a run, in the first process, and frees the folder at the end.

    Args:
        folder: Of the run.
        lock: Of the folder.
        config: Of the run.
        num_samples: How many pictures there are.
    """

    def __init__(
        self, folder: Path, lock: FolderLock, config: PretrainConfig, num_samples: int
    ) -> None:
        self._folder, self._lock, self._config = folder, lock, config
        self._num_samples = num_samples

    def __enter__(self) -> RunFolder:
        """Write ``config.yaml`` and ``environment.json``."""
        device = self.trainer.device
        text = yaml.safe_dump(to_plain(self._config), sort_keys=False)
        write_text(self._folder / "config.yaml", text)
        environment = {
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "command": sys.argv,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "num_threads": torch.get_num_threads(),
        }
        write_json(self._folder / "environment.json", environment)
        return self

    def on_end(self) -> None:
        """Write ``summary.json``, whose presence says that the run is complete; free the folder."""
        position = self.trainer.position
        rows = read_json_lines(self._folder / "metrics.jsonl")
        knn = {row["step"]: row["knn_top1"] for row in rows if row["kind"] == "knn"}
        num_images = position.step * self._config.data.batch_size
        summary = {
            "steps": position.step,
            "epochs": self._config.optim.epochs,
            "seconds": position.train_seconds,
            "images_per_second": num_images / max(position.train_seconds, 1e-9),
            "knn_top1": knn.get(position.step),
            "knn_top1_initial": knn.get(0),
            "num_samples": self._num_samples,
            "num_skipped_samples": position.num_bad_samples,
            "peak_memory_bytes": provenance.peak_memory_bytes(),
        }
        write_json(self._folder / "summary.json", summary)
        self._lock.close()
