"""A run of seconds over generated pictures, for tests that disturb jobs of several processes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks import kill_resume
from common.files import read_json_lines

ROOT = Path(__file__).resolve().parents[2]
STEPS_PER_EPOCH = kill_resume.STEPS_PER_EPOCH


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Shards and a config that names them: 6 steps an epoch, a checkpoint every second step."""
    shards = str(kill_resume.make_shards(folder))
    config = kill_resume.config()
    changes = {"data": {"shards": shards}, "eval": {"probe_train": shards, "probe_val": shards}}
    for section, values in [*changes.items(), *sections.items()]:
        config[section] |= values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_undisturbed(config: Path, out: Path, *overrides: str, num_processes: int = 2) -> Path:
    """The run that a disturbed one must equal."""
    command = ["bash", str(ROOT / "tools/pretrain.sh"), str(config), f"out={out}", *overrides]
    environment = os.environ | {"NPROC": str(num_processes), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
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
    for pid in kill_resume.descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
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
