"""A run of seconds over generated pictures, for tests that disturb jobs of several processes."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from common.checkpoints import checksum
from common.files import read_json_lines
from pretrain.__main__ import main as pretrain
from pretrain.engine import checkpoint
from tests.pretrain.data.picture_helpers import pack_pictures
from tests.ranks import assert_well, run_group

ROOT = Path(__file__).resolve().parents[2]
NUM_PICTURES, BATCH, EPOCHS = 96, 16, 4
STEPS_PER_EPOCH = NUM_PICTURES // BATCH
COMPARED = ("model", "ema", "optimizer", "queue", "negatives", "schedule", "position")


def config() -> dict[str, Any]:
    """A run of seconds that has everything a checkpoint must hold."""
    return {
        "arch": {"depth": 50, "width_per_group": 8, "stem_channels": 8, "res2_channels": 32},
        "data": {"image_size": 32, "batch_size": BATCH, "num_workers": 1, "shuffle_window": 32},
        "heads": {"projector_hidden_dim": 64, "predictor_hidden_dim": 64, "output_dim": 32},
        "objective": {"name": "byol"},
        "fa": {"method": "nn", "queue_size": 48, "min_fill": 16},
        "optim": {"name": "lars", "epochs": EPOCHS, "base_lr": 1.0, "warmup_epochs": 1.0},
        "engine": {
            "device": "cpu", "precision": "fp32", "log_every_steps": 1, "num_threads": 1,
            "checkpoint_every_steps": 2,
        },
        "eval": {"knn_every_epochs": 1, "knn_k": 5, "num_pictures": 0, "num_map_points": 0},
    }  # fmt: skip


def descendants(pid: int) -> list[int]:
    """A process and all below it, from the top."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found


def identical(one: Path, other: Path) -> bool:
    """Whether two runs ended in the same state after the same losses, bit for bit."""
    states, curves = [], []
    for folder in (one, other):
        state = checkpoint.load(folder / "checkpoint.pth")
        state["position"].pop("train_seconds")
        states.append(state)
        rows = read_json_lines(folder / "metrics.jsonl")
        curves.append([(row["step"], row["loss"]) for row in rows if row["kind"] == "train"])
    return curves[0] == curves[1] and all(
        checksum({"part": states[0][part]}) == checksum({"part": states[1][part]})
        for part in COMPARED
    )


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Shards and a config that names them: 6 steps an epoch, a checkpoint every second step."""
    shards, settings = str(pack_pictures(folder, NUM_PICTURES, per_shard=20)), config()
    changes = {"data": {"shards": shards}, "eval": {"probe_train": shards, "probe_val": shards}}
    for section, values in [*changes.items(), *sections.items()]:
        settings[section] |= values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run_undisturbed(config: Path, out: Path, *overrides: str, num_processes: int = 2) -> Path:
    """The run that a disturbed one must equal."""
    words = [str(config), f"out={out}", *overrides]
    assert_well(run_group(pretrain, (words,), num_processes, 900))
    return out


def last_step(out: Path) -> int:
    """The last step in the log of a run; 0 before the first."""
    rows = read_json_lines(out / "metrics.jsonl")
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Return when the condition holds; an AssertionError says what did not happen in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all below it."""
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def training_processes(out: Path) -> list[int]:
    """Processes of ``python -m pretrain`` (loader's workers too) that write to a run's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"pretrain" in words and f"out={out}".encode() in words:
            is_torchrun = b"torch.distributed.run" in words
            if not is_torchrun:
                found.append(int(path.parent.name))
    return sorted(found)
