"""What stands beside a run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.engine import run_folder
from pretrain.engine.run_folder import RunFolder
from pretrain.engine.trainer import Position


def write_rows(folder, *rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def callback(folder):
    """Of a run that stands at its end."""
    callback = RunFolder(folder, run_folder.hold(folder), PretrainConfig(), 2560)
    position = Position(step=10, epoch=2, num_bad_samples=3, train_seconds=4.0)
    callback.trainer = Mock(position=position, device=torch.device("cpu"))
    return callback


def summary(folder):
    callback(folder).on_end()
    return json.loads((folder / "summary.json").read_text())


def test_summary_takes_the_first_and_the_last_probe(tmp_path):
    probes = [{"kind": "knn", "step": s, "knn_top1": s / 20} for s in (0, 5, 10)]
    write_rows(tmp_path, *probes, {"kind": "train", "step": 10, "loss": 1.0})
    found = summary(tmp_path)
    assert (found["knn_top1_initial"], found["knn_top1"]) == (0.0, 0.5)
    assert found["images_per_second"] == 10 * 256 / 4.0
    assert found["num_skipped_samples"] == 3


def test_a_probe_that_was_added_later_has_no_initial_accuracy(tmp_path):
    write_rows(tmp_path, {"kind": "knn", "step": 10, "knn_top1": 0.5})
    found = summary(tmp_path)
    assert found["knn_top1_initial"] is None
    assert found["knn_top1"] == 0.5


def test_folder_is_made_with_its_parents_and_an_empty_one_is_taken(tmp_path):
    config = replace(PretrainConfig(), out=str(tmp_path / "a" / "b"))
    assert run_folder.prepare(config, resume=False) == tmp_path / "a" / "b"
    assert run_folder.prepare(config, resume=False).is_dir()


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    config = replace(PretrainConfig(), out=str(tmp_path))
    with pytest.raises(UserError, match="holds a run already: continue it with --resume"):
        run_folder.prepare(config, resume=False)
    assert run_folder.prepare(config, resume=True) == tmp_path


def test_no_out_is_refused():
    with pytest.raises(UserError, match="out is not set: name the folder of this run"):
        run_folder.prepare(PretrainConfig(), resume=False)


def test_outside_a_git_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    with callback(tmp_path):
        pass
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["commit"] is None
    assert environment["num_threads"] == torch.get_num_threads()


HOLDING = """
import sys
from pathlib import Path
from unittest.mock import Mock
from pretrain.engine import run_folder
from pretrain.engine.run_folder import RunFolder
held = run_folder.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_belongs_to_one_run_until_its_process_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_LOCK_PAUSE_SECONDS", 0.01)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"\(number {other.pid}\) is training here"):
            run_folder.hold(tmp_path)
        other.kill()
        other.wait()
    run_folder.hold(tmp_path).close()
