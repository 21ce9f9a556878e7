"""Weights & Biases and MLflow against stand-ins of their clients; no network, none installed."""

import importlib.machinery
import json
import sys
import types

import pytest
import yaml

from pretrain.config import TrackingConfig, load_config
from pretrain.engine import trackers
from pretrain.engine.metrics import MetricLog, read_rows
from pretrain.engine.trackers import Trackers, check_installed, flat
from pretrain.engine.train import Run
from pretrain.errors import UserError

BOTH = TrackingConfig(wandb=True, mlflow=True, project="study")
BASE = {
    "arch": {"depth": 18, "width_per_group": 8, "stem_channels": 8, "res2_channels": 8},
    "data": {"image_size": 32, "batch_size": 8, "num_workers": 0},
    "heads": {"projector_hidden_dim": 24, "predictor_hidden_dim": 24, "output_dim": 12},
    "fa": {"method": "mask"},
    "optim": {"epochs": 1, "warmup_epochs": 0},
    "engine": {"device": "cpu", "log_every_steps": 2, "num_threads": 1},
    "eval": {"num_pictures": 0},
    "tracking": {"wandb": True, "mlflow": True, "project": "study"},
}


def fake(name, **members):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    return module


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins of both clients; every call they get, as (name, arguments)."""
    seen = []

    def noted(name, result=None):
        def call(*arguments, **options):
            seen.append((name, arguments, options))
            return result

        return call

    run = types.SimpleNamespace(id="w-1", log=noted("wandb.log"), finish=noted("wandb.finish"))
    info = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m-1"))
    monkeypatch.setitem(sys.modules, "wandb", fake("wandb", init=noted("wandb.init", run)))
    names = ("set_experiment", "log_params", "log_metrics", "end_run")
    members = {name: noted(f"mlflow.{name}") for name in names}
    members["start_run"] = noted("mlflow.start_run", info)
    monkeypatch.setitem(sys.modules, "mlflow", fake("mlflow", **members))
    return seen


def of(calls, name):
    return [(arguments, options) for found, arguments, options in calls if found == name]


def open_all(folder, *, is_new=True, config=BOTH, plain=None):
    return Trackers(config, folder, plain or {"seed": 1}, is_new=is_new)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_client_is_named_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as caught:
        check_installed(TrackingConfig(**{name: True}))
    assert f"tracking.{name}=true, but its client is not installed" in str(caught.value)
    assert f"`{sys.executable} -m pip install {name}`" in str(caught.value)
    check_installed(TrackingConfig())


def test_none_is_opened_where_none_is_asked_for(tmp_path, calls):
    found = open_all(tmp_path, config=TrackingConfig())
    assert found.log("train", 1, {"loss": 0.5}) == found.close(failed=False) == []
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_numbers_go_to_both_with_their_step(tmp_path, calls):
    found = open_all(tmp_path)
    values = {"loss": 0.5, "active": 1, "message": "text", "flag": True, "bins": [0.1]}
    assert found.log("train", 7, values) == []
    assert found.log("event", 7, {"message": "text"}) == []
    numbers = {"train/loss": 0.5, "train/active": 1}
    assert of(calls, "wandb.log") == of(calls, "mlflow.log_metrics") == [((numbers,), {"step": 7})]


def test_run_and_config_are_described(tmp_path, calls):
    plain = {"seed": 1, "optim": {"name": "lars", "long": "x" * 900}}
    open_all(tmp_path, plain=plain)
    (((), options),) = of(calls, "wandb.init")
    assert options == {
        "project": "study", "name": tmp_path.name, "dir": str(tmp_path), "config": plain,
        "id": None, "resume": "allow",
    }  # fmt: skip
    assert of(calls, "mlflow.set_experiment") == [(("study",), {})]
    assert of(calls, "mlflow.start_run") == [((), {"run_id": None, "run_name": tmp_path.name})]
    parameters = {"seed": "1", "optim.name": "lars", "optim.long": "x" * 500}
    assert of(calls, "mlflow.log_params") == [((parameters,), {})]


def test_mlflow_gets_parameters_in_parts_that_it_takes(tmp_path, calls):
    open_all(tmp_path, plain={f"key{i}": i for i in range(250)})
    assert [len(arguments[0]) for arguments, _ in of(calls, "mlflow.log_params")] == [100, 100, 50]


def test_a_resume_goes_on_under_the_ids_of_before(tmp_path, calls):
    open_all(tmp_path).close(failed=True)
    assert json.loads((tmp_path / "tracking.json").read_text()) == {"wandb": "w-1", "mlflow": "m-1"}
    calls.clear()
    open_all(tmp_path, is_new=False)
    assert of(calls, "wandb.init")[0][1]["id"] == "w-1"
    assert of(calls, "mlflow.start_run")[0][1]["run_id"] == "m-1"
    assert of(calls, "mlflow.log_params") == []  # MLflow refuses to change them
    calls.clear()
    open_all(tmp_path, is_new=True)
    assert of(calls, "wandb.init")[0][1]["id"] is None


@pytest.mark.parametrize(("failed", "status"), [(False, "FINISHED"), (True, "FAILED")])
def test_the_end_of_the_log_says_whether_the_run_failed(tmp_path, calls, failed, status):
    log = MetricLog(tmp_path, -1, -1, open_all(tmp_path))
    try:
        with log:
            if failed:
                raise RuntimeError("the run")
    except RuntimeError:
        assert failed
    assert of(calls, "mlflow.end_run") == [((status,), {})]
    assert of(calls, "wandb.finish") == [((), {"exit_code": int(failed)})]


def test_a_service_that_fails_is_left_out_and_told(tmp_path, calls, monkeypatch, capsys):
    def fails(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", fails)
    with MetricLog(tmp_path, -1, -1, open_all(tmp_path)) as log:
        log.write("train", 1, loss=0.5)
        log.write("train", 2, loss=0.4)
    message = "tracking.mlflow failed (ConnectionError: no route); the run goes on without it"
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [r["kind"] for r in rows] == ["train", "event", "train"]
    assert message in rows[1]["message"]
    assert capsys.readouterr().err.count(message) == 1
    assert [options["step"] for _, options in of(calls, "wandb.log")] == [1, 2]


def test_keys_are_flat_and_short():
    assert flat({"a": {"b": {"c": None}, "d": [1, 2]}}) == {"a.b.c": "None", "a.d": "[1, 2]"}


def test_a_run_tells_both_services(tmp_path, shards, calls):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(BASE))
    config = load_config(path, [f"data.shards={shards}", f"out={tmp_path / 'run'}"])
    Run(config, resume=False).train()
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in rows] == [2, 4, 5]
    for name in ("wandb.log", "mlflow.log_metrics"):
        told = [(options["step"], values) for (values,), options in of(calls, name)]
        told = [(step, values["train/loss"]) for step, values in told if "train/loss" in values]
        assert told == [(r["step"], r["loss"]) for r in rows]
    assert of(calls, "mlflow.set_experiment") == [(("study",), {})]
    assert of(calls, "wandb.init")[0][1]["config"]["optim"]["epochs"] == 1
    assert of(calls, "mlflow.end_run") == [(("FINISHED",), {})]
