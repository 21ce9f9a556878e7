"""Two processes under torchrun are killed while they write a checkpoint, and go on bit for bit."""

import os
import subprocess

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


@pytest.mark.slow
@pytest.mark.ddp
def test_killed_while_a_checkpoint_is_written(tmp_path):
    """BYOL with nn FA, EMA, LARS, queue, a loader's worker, the kNN probe."""
    config = write_config(tmp_path)
    whole = run_undisturbed(config, tmp_path / "whole")
    out = tmp_path
    for attempt in range(5):  # a run may be faster than the look at it
        out = tmp_path / f"killed-{attempt}"
        process = subprocess.Popen(
            ["bash", str(ROOT / "tools/pretrain.sh"), str(config), f"out={out}"],
            env=os.environ | {"NPROC": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        is_writing = False
        while process.poll() is None and not is_writing:
            is_late = last_step(out) > STEPS_PER_EPOCH
            is_writing = is_late and bool(list(out.glob("checkpoint.pth.*.partial")))
        kill_all(process)
        if is_writing:
            break
    assert not (out / "summary.json").exists()
    run_undisturbed(config, out, "--resume")
    assert identical(whole, out)
    # The comparison sees one number in one tensor.
    state = checkpoint.load(out / "checkpoint.pth")
    name, weight = next(iter(state["model"].items()))
    state["model"][name] = weight * (1 + 1e-6)
    checkpoint.save(state, out / "checkpoint.pth")
    assert not identical(whole, out)
