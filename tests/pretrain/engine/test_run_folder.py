"""What stands beside a run: its rows without a seam after a resume, W&B, the summary, the lock.

Of Weights & Biases a stand-in; no network, not installed.
"""

import importlib.machinery
import json
import math
import sys
import types
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import files
from common.errors import UserError
from common.files import read_json_lines
from pretrain.config import PretrainConfig, TrackingConfig
from pretrain.engine import run_folder
from pretrain.engine.run_folder import MetricLog, ProgressLog, RunFolder, check_wandb, open_log
from pretrain.engine.trainer import Position
from tests.locks import holding


def rows(folder):
    return read_json_lines(folder / "metrics.jsonl")


def test_rows_and_scalars(tmp_path):
    log = MetricLog(tmp_path, -1, -1)
    log.write("train", 1, loss=0.5, epoch=0.25)
    assert len(rows(tmp_path)) == 1  # at once
    log.write("event", 1, message="hello")
    log.write("knn", 2, knn_top1=0.75, lr=math.nan)
    log.close()
    assert rows(tmp_path) == [
        {"kind": "train", "step": 1, "loss": 0.5, "epoch": 0.25},
        {"kind": "event", "step": 1, "message": "hello"},
        {"kind": "knn", "step": 2, "knn_top1": 0.75, "lr": "nan"},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/epoch", "knn/knn_top1", "knn/lr"}
    assert [(x.step, x.value) for x in board.Scalars("knn/knn_top1")] == [(2, 0.75)]


@pytest.mark.parametrize(
    ("last", "last_probe", "train", "knn"),
    [
        (-1, -1, [], []),
        (4, 4, [1, 2, 3, 4], [2, 4]),
        (3, 3, [1, 2, 3], [2]),
        (2, 1, [1, 2], []),  # the probe of step 2 is due again
    ],
)
def test_rows_that_will_be_written_again_are_dropped(tmp_path, last, last_probe, train, knn):
    log = MetricLog(tmp_path, -1, -1)
    for step in (1, 2, 3, 4):
        log.write("train", step, loss=float(step))
        if step % 2 == 0:
            log.write("knn", step, knn_top1=step / 10)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a line cut by a kill
        file.write('{"kind": "train", "step": 1, "lo')
    log = MetricLog(tmp_path, last, last_probe)
    assert log.notes == []
    log.write("event", 5, message="on")
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [r["step"] for r in found if r["kind"] == "train"] == train
    assert [r["step"] for r in found if r["kind"] == "knn"] == knn
    assert found[-1]["step"] == 5


def test_a_row_without_a_step_is_left_out_and_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train"}\n{"kind": "train", "step": 1}\n')
    log = MetricLog(tmp_path, 5, 5)
    log.close()
    assert log.notes == [f"{path} has 1 damaged line, left out: 1"]
    assert rows(tmp_path) == [{"kind": "train", "step": 1}]
    log = ProgressLog("x", lambda position, num_steps: MetricLog(tmp_path, 5, 5))
    log.trainer, log.logged_step = Mock(num_steps=9, position=Position(step=5)), 5
    log.trainer.batches.num_steps = 9
    with log:
        assert log.notes == ["metrics.jsonl: the rows of steps 2 to 5 are lost"]


class FakeWandb(types.ModuleType):
    """Keeps the options of `init` and `finish`, and whether TensorBoard's writer existed before."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.started, self.finished, self.boards_before = [], [], []
        self.id = "w-1"

    def init(self, **options):
        self.started.append(options)
        folder = Path(options["dir"]) / "tensorboard"
        self.boards_before.append(len(list(folder.glob("*"))))
        return self

    def finish(self, **options):
        self.finished.append(options)
        raise ConnectionError("no route")


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(run_folder.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"wandb is not installed: run `.* -m pip install wandb`"):
        check_wandb(TrackingConfig(wandb=True))
    check_wandb(TrackingConfig())


def test_wandb_is_started_continued_and_told_the_end(tmp_path, wandb, capsys):
    config = PretrainConfig(tracking=TrackingConfig(wandb=True, project="study"))
    for step, failed in ((0, True), (7, False)):
        log = open_log(config, tmp_path, Position(step=step), 5)
        log.write("train", 1, loss=0.5)
        log.close(failed=failed)  # its network fails, the run does not
        assert "warning: tracking.wandb did not finish: no route" in capsys.readouterr().err
    first, second = wandb.started
    assert (first["project"], first["name"], first["id"]) == ("study", tmp_path.name, None)
    assert first["config"]["optim"]["name"] == "lars"
    assert first["sync_tensorboard"]
    assert second["id"] == "w-1"
    assert wandb.boards_before[0] == 0  # it copies only from writers that are made after it
    assert wandb.finished == [{"exit_code": 1}, {"exit_code": 0}]
    open_log(PretrainConfig(), tmp_path, Position(), 5).close()
    assert len(wandb.started) == 2


def callback(folder):
    """Of a run that stands at its end."""
    callback = RunFolder(folder, ExitStack(), PretrainConfig(), 2560)
    position = Position(step=10, epoch=2, num_bad_samples=3, train_seconds=4.0)
    callback.trainer = Mock(position=position, device=torch.device("cpu"))
    return callback


@pytest.mark.parametrize("steps", [(0, 5, 10), (5, 10)])  # the probe may have been added later
def test_summary_takes_the_first_and_the_last_probe(tmp_path, steps):
    log = MetricLog(tmp_path, -1, -1)
    for step in steps:
        log.write("knn", step, knn_top1=step / 20)
    log.close()
    callback(tmp_path).on_end()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["knn_top1_initial"], found["knn_top1"]) == (0.0 if 0 in steps else None, 0.5)
    assert found["images_per_second"] == 10 * 256 / 4.0
    assert found["num_skipped_samples"] == 3
    (tmp_path / "metrics.jsonl").write_bytes(b"")  # lost; a run that goes on at its end keeps them
    callback(tmp_path).on_end()
    assert json.loads((tmp_path / "summary.json").read_text()) | {"peak_memory_bytes": 0} == (
        found | {"peak_memory_bytes": 0}
    )


def test_a_folder_is_made_and_one_with_a_run_is_refused_without_resume(tmp_path):
    folder = tmp_path / "a" / "b"
    config = replace(PretrainConfig(), out=str(folder))
    made, lock = run_folder.prepare(config, resume=False)
    assert made == folder
    assert (folder / ".lock").exists()
    lock.close()
    assert not (folder / ".lock").exists()
    (folder / "checkpoint.pth").write_bytes(b"")
    with pytest.raises(UserError, match="holds a run already: continue it with --resume"):
        run_folder.prepare(config, resume=False)
    run_folder.prepare(config, resume=True)[1].close()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoint.pth").rename(folder / "checkpoints/step-00000001.pth")
    with pytest.raises(UserError, match="holds a run already"):
        run_folder.prepare(config, resume=False)
    with pytest.raises(UserError, match="out is not set: name the folder of this run"):
        run_folder.prepare(PretrainConfig(), resume=False)


def test_a_folder_belongs_to_one_run_until_its_process_is_gone(tmp_path, monkeypatch):
    """Others are refused before they look at what is there, and told who holds it."""
    monkeypatch.setattr(files, "HOLD_SECONDS", 0.3)
    config = replace(PretrainConfig(), out=str(tmp_path))
    (tmp_path / "x.pth.1.partial").touch()  # of a writer that was killed
    with holding(tmp_path / ".lock") as other:
        (tmp_path / "checkpoint.pth").touch()
        message = rf"{tmp_path}: process {other.pid} on .* is at work here since 2\d{{3}}-.* \(-c "
        with pytest.raises(UserError, match=message):
            run_folder.prepare(config, resume=False)
        monkeypatch.setattr(run_folder.dist, "rank", lambda: 1)  # only the first process takes it
        run_folder.prepare(config, resume=True)
        monkeypatch.undo()
        other.kill()
        other.wait()
    run_folder.prepare(config, resume=True)[1].close()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
