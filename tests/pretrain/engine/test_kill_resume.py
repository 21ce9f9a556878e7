"""Two processes under torchrun are killed while they write a checkpoint, and go on bit for bit."""

import os
import subprocess
import time

import pytest

from pretrain.engine import checkpoint
from tests.slurm.tiny_run import (
    ROOT,
    STEPS_PER_EPOCH,
    identical,
    kill_all,
    last_step,
    run_undisturbed,
    write_config,
)

# A checkpoint takes so long that it is seen while it is written.
SLOW_DISK = """
import os, time
sync = os.fsync
os.fsync = lambda file: (time.sleep(0.3), sync(file))
"""


@pytest.mark.slow
@pytest.mark.ddp
def test_killed_while_a_checkpoint_is_written(tmp_path):
    """BYOL with nn FA, EMA, LARS, queue, a loader's worker, the kNN probe."""
    config = write_config(tmp_path)
    whole = run_undisturbed(config, tmp_path / "whole")
    out, is_writing = tmp_path / "killed", False
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    process = subprocess.Popen(
        ["bash", str(ROOT / "tools/pretrain.sh"), str(config), f"out={out}"],
        env=os.environ | {"NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not is_writing:
        time.sleep(0.02)
        is_late = last_step(out) > STEPS_PER_EPOCH
        is_writing = is_late and bool(list(out.glob("checkpoint.pth.*.partial")))
    kill_all(process)
    assert is_writing
    assert not (out / "summary.json").exists()
    run_undisturbed(config, out, "--resume")
    assert identical(whole, out)
    # The comparison sees one number in one tensor.
    state = checkpoint.load(out / "checkpoint.pth")
    name, weight = next(iter(state["model"].items()))
    state["model"][name] = weight * (1 + 1e-6)
    checkpoint.save(state, out / "checkpoint.pth")
    assert not identical(whole, out)
