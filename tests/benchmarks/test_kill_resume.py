"""Killing and resuming: moments, the whole family of a process, comparison; one real kill."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import kill_resume
from pretrain.engine import checkpoint

ROOT = Path(__file__).parents[2]


def test_a_kill_reaches_descendants_through_sessions():
    script = "import subprocess, sys; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    script += "; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "up\n"
        found = kill_resume.descendants(process.pid)
        assert found[0] == process.pid
        assert len(found) == 2
        job = kill_resume.Job.__new__(kill_resume.Job)
        job.process = process  # type: ignore[assignment]
        job.kill()

    def is_running():
        stat = Path(f"/proc/{found[1]}/stat")
        return stat.exists() and stat.read_text().split()[2] != "Z"

    end = time.monotonic() + 10
    while is_running() and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running()


@pytest.fixture
def two_runs(tmp_path):
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        state = dict.fromkeys(checkpoint.FIELDS)
        state |= {"format": checkpoint.FORMAT, "model": {"w": torch.zeros(3)}}
        state["position"] = {"step": 5, "train_seconds": random.random()}
        checkpoint.save(state, folder / "checkpoint.pth")
        row = {"kind": "train", "step": 1, "loss": 0.5, "images_per_second": random.random()}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path / "one", tmp_path / "other"


def test_runs_that_differ_in_time_only_are_identical(two_runs):
    assert kill_resume.identical(*two_runs)


@pytest.mark.parametrize("part", ["model", "queue", "position", "loss"])
def test_one_difference_is_seen(two_runs, part):
    other = two_runs[1]
    if part == "loss":
        row = {"kind": "train", "step": 1, "loss": 0.5000001}
        (other / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    else:
        state = checkpoint.load(other / "checkpoint.pth")
        changed = {"model": {"w": torch.tensor([0.0, 0.0, 1e-30])}, "queue": {"count": 1},
                   "position": {"step": 6, "train_seconds": 0.0}}  # fmt: skip
        state[part] = changed[part]
        checkpoint.save(state, other / "checkpoint.pth")
    assert not kill_resume.identical(*two_runs)


@pytest.mark.slow
@pytest.mark.ddp
def test_a_kill_while_a_checkpoint_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kill_resume, "PHASES", ("checkpoint",))
    out = tmp_path / "kill.json"
    assert kill_resume.main(["--kills", "1", "--json", str(out)]) == 0, capsys.readouterr().err
    figures = json.loads(out.read_text())
    assert (figures["kills"], figures["resumed"], figures["identical"]) == (1, 1, 1)
    assert figures["trials"][0]["phase"] == "checkpoint"
