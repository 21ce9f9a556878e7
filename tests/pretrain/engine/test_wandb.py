"""Weights & Biases against a stand-in of its package; no network, not installed."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from common.files import read_json_lines
from pretrain.config import TrackingConfig, load_config
from pretrain.engine import run_folder as metrics
from pretrain.engine.run_folder import MetricLog, check_wandb, start_wandb
from pretrain.run import make_trainer

WITH_WANDB = TrackingConfig(wandb=True, project="study")
BASE = {
    "arch": {"depth": 18, "width_per_group": 8, "stem_channels": 8, "res2_channels": 8},
    "data": {"image_size": 32, "batch_size": 8, "num_workers": 0},
    "heads": {"projector_hidden_dim": 24, "predictor_hidden_dim": 24, "output_dim": 12},
    "fa": {"method": "mask"},
    "optim": {"epochs": 1, "warmup_epochs": 0},
    "engine": {"device": "cpu", "log_every_steps": 2, "num_threads": 1},
    "eval": {"num_pictures": 0},
    "tracking": {"wandb": True, "project": "study"},
}


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


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as caught:
        check_wandb(WITH_WANDB)
    assert "tracking.wandb=true, but wandb is not installed" in str(caught.value)
    assert f"`{sys.executable} -m pip install wandb`" in str(caught.value)
    check_wandb(TrackingConfig())


def test_it_is_not_started_where_it_is_not_wanted(tmp_path, wandb):
    assert start_wandb(TrackingConfig(), tmp_path, {}, is_new=True) is None
    assert wandb.started == []
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_continues_the_same_run(tmp_path, wandb):
    plain = {"seed": 1, "optim": {"name": "lars"}}
    start_wandb(WITH_WANDB, tmp_path, plain, is_new=True)
    assert wandb.started == [
        {
            "project": "study", "name": tmp_path.name, "dir": str(tmp_path), "config": plain,
            "id": None, "resume": "allow", "sync_tensorboard": True,
        }
    ]  # fmt: skip
    assert json.loads((tmp_path / "tracking.json").read_text()) == {"wandb": "w-1"}
    start_wandb(WITH_WANDB, tmp_path, plain, is_new=False)
    start_wandb(WITH_WANDB, tmp_path, plain, is_new=True)
    assert [options["id"] for options in wandb.started] == [None, "w-1", None]


def test_the_end_of_the_log_says_whether_the_run_failed(tmp_path, wandb):
    for is_failed in (False, True):
        MetricLog(tmp_path, -1, -1, wandb).close(failed=is_failed)
    assert wandb.finished == [{"exit_code": 0}, {"exit_code": 1}]


def test_a_failure_at_the_end_is_a_warning(tmp_path, wandb, monkeypatch, capsys):
    def fails(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(wandb, "finish", fails)
    log = MetricLog(tmp_path, -1, -1, wandb)
    log.write("train", 1, loss=0.5)
    log.close()
    assert [row["loss"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [0.5]
    assert "warning: tracking.wandb did not finish: no route" in capsys.readouterr().err


def test_a_run_starts_and_finishes_wandb(tmp_path, shards, wandb):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(BASE))
    config = load_config(path, [f"data.shards={shards}", f"out={tmp_path / 'run'}"])
    make_trainer(config, resume=False).train()
    (options,) = wandb.started
    assert (options["project"], options["sync_tensorboard"]) == ("study", True)
    assert options["config"]["optim"]["epochs"] == 1
    assert wandb.boards_before == [0]  # it copies only from writers that are made after it
    assert list((tmp_path / "run/tensorboard").iterdir())
    assert wandb.finished == [{"exit_code": 0}]
    make_trainer(config, resume=True).train()
    assert wandb.started[-1]["id"] == "w-1"
