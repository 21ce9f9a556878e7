"""``--profile``: every range is there, what is slow shows in its row, nothing is trained."""

import contextlib
import gzip
import io
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from common.files import read_json_lines
from pretrain.__main__ import main, parse
from pretrain.config import load_config
from pretrain.data.input_pipeline import InputPipeline
from pretrain.data.loader import Loader
from pretrain.engine import profiling
from pretrain.engine.optim import LARS
from pretrain.features.feature_augmentation import FeatureAugmenter
from pretrain.features.memory_bank import SupportQueue
from pretrain.model.joint_embedding import OnlineNetwork
from pretrain.run import make_trainer

BASE = {
    "arch": {"depth": 50, "width_per_group": 8, "stem_channels": 8, "res2_channels": 32},
    "data": {"image_size": 32, "batch_size": 8, "num_workers": 0},
    "heads": {"projector_hidden_dim": 24, "predictor_hidden_dim": 24, "output_dim": 12},
    "objective": {"name": "byol"},
    "fa": {"method": "nn", "queue_size": 64, "min_fill": 64},
    "optim": {"name": "lars", "epochs": 6, "base_lr": 0.2, "warmup_epochs": 0.5},
    "engine": {"device": "cpu", "precision": "fp32", "log_every_steps": 2, "num_threads": 1},
    "eval": {"num_pictures": 0, "knn_k": 5},
}  # fmt: skip
NUM = 4


@pytest.fixture(scope="module")
def profiled(shards, tmp_path_factory):
    """Folder of a profile of 4 steps, and what was printed."""
    place, printed = tmp_path_factory.mktemp("profiled"), io.StringIO()
    folder, config = place / "run", place / "tiny.yaml"
    config.write_text(yaml.safe_dump(BASE))
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(printed):
        options = [f"out={folder}", f"data.shards={shards}", f"--profile={NUM}"]
        assert main([str(config), *options]) == 0
    return folder, printed.getvalue()


@pytest.fixture
def start(config_file, shards, tmp_path):
    """start("key=value", .., "--profile=4"): exit status and run folder."""

    def run(*arguments, folder=None):
        folder = folder or tmp_path / "run"
        return main(
            [str(config_file), f"out={folder}", f"data.shards={shards}", *arguments]
        ), folder

    return run


def summary_in(folder):
    return json.loads((folder / "profile" / "summary.json").read_text())


def milliseconds(summary):
    return {row["name"]: row["ms"] for row in summary["ranges"]}


def test_all_ranges_are_there_and_fit_into_the_step(profiled):
    folder, printed = profiled
    summary = summary_in(folder)
    rows, times = summary["ranges"], milliseconds(summary)
    assert set(times) == set(profiling.RANGES) - {"wait for views"}  # a GPU's alone
    assert min(times.values()) >= 0
    traced = summary["trace"]["step_ms"]
    whole = sum(row["ms"] for row in rows if row["inside"] is None)
    assert 0.7 * traced < whole <= traced
    assert times["EMA forward"] + times["FA"] + times["loss"] < times["forward"]
    for row in rows:
        assert row["share"] == pytest.approx(row["ms"] / traced)
        assert row["name"] in printed
    assert summary["images_per_second"] == pytest.approx(8e3 / summary["step_ms"])
    assert "no training run" in printed


def test_the_names_in_the_code_are_those_that_are_summed():
    package = Path(profiling.__file__).parents[1]
    code = "".join(path.read_text() for path in package.rglob("*.py"))
    assert set(re.findall(r'record_function\("([^"]+)"\)', code)) == set(profiling.RANGES)


def test_flops_are_those_of_convolutions_and_products_forward_and_backward():
    conv, linear = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.nn.Linear(5, 7)
    images = torch.randn(2, 3, 8, 8)
    forward = 2 * (2 * 64 * 27 * 5 + 2 * 5 * 7)
    work = lambda: linear(conv(images).mean(dim=(2, 3))).sum()  # noqa: E731
    assert profiling.count_flops(work) == forward
    # The gradient of the pixels is not computed; of the linear layer's input it is.
    backward = 2 * (2 * 64 * 27 * 5 + 2 * 2 * 5 * 7)
    assert profiling.count_flops(lambda: work().backward()) == forward + backward


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (None, "fp32")]
)
def test_precision_is_that_of_the_context(dtype, name):
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
    assert profiling.precision_of(autocast, torch.device("cpu")) == name


def test_trace_has_every_label_in_every_step(profiled):
    folder, _ = profiled
    assert {path.name for path in (folder / "profile").iterdir()} == {
        "summary.json", "trace.json.gz",
    }  # fmt: skip
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    labels = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    for name in ("transfer", "EMA forward", "forward", "backward", "optimiser", "queue"):
        assert labels.count(name) == profiling.MOST_TRACED, name
    assert labels.count("FA") == 2 * profiling.MOST_TRACED  # both directions
    assert labels.count("loader") >= profiling.MOST_TRACED  # and where an epoch ends


def test_what_is_slow_shows_in_its_row(start, monkeypatch):
    """Each part sleeps, far longer than it works; that parts add up is shown above."""
    part = 0.03
    monkeypatch.setattr(Loader, "epoch", slow_iterator(Loader.epoch, part))
    monkeypatch.setattr(InputPipeline, "views", slow(InputPipeline.views, part))
    monkeypatch.setattr(OnlineNetwork, "project", slow_if_frozen(OnlineNetwork.project, part))
    monkeypatch.setattr(OnlineNetwork, "predict", slow(OnlineNetwork.predict, part))
    monkeypatch.setattr(FeatureAugmenter, "forward", slow(FeatureAugmenter.forward, part))
    monkeypatch.setattr(LARS, "step", slow(LARS.step, part))
    monkeypatch.setattr(SupportQueue, "put", slow(SupportQueue.put, part))
    status, folder = start("--profile=2")
    assert status == 0
    summary = summary_in(folder)
    times, once = milliseconds(summary), 1e3 * part
    for name in ("loader", "augmentation", "optimiser", "queue"):
        assert times[name] >= once, name
    assert times["EMA forward"] >= 2 * once  # two views
    assert times["FA"] >= 2 * once  # two directions
    assert times["forward"] >= times["FA"] + once  # and the predictor, once for both views
    assert summary["step_ms"] >= 9 * once


def slow(function, seconds):
    def slowed(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slowed


def slow_if_frozen(function, seconds):
    def slowed(self, view):
        if not next(self.parameters()).requires_grad:
            time.sleep(seconds)
        return function(self, view)

    return slowed


def slow_iterator(function, seconds):
    def slowed(*args):
        for item in function(*args):
            time.sleep(seconds)
            yield item

    return slowed


def test_nothing_is_trained_and_the_folder_stays_free(profiled, start, tmp_path):
    """A run there afterwards is as if there had been no profile."""
    folder, _ = profiled
    assert {path.name for path in folder.iterdir()} == {"profile", ".lock"}
    copied = tmp_path / "after a profile"
    shutil.copytree(folder, copied)
    losses = []
    for place in (copied, tmp_path / "fresh"):
        assert start("optim.epochs=1", folder=place)[0] == 0
        rows = read_json_lines(place / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert losses[0] == losses[1] != []


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "10001", "²", "out=x"])
def test_bad_number_of_steps_is_refused(start, text, capsys):
    status, folder = start(f"--profile={text}")
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --profile {text}: N is the number of timed steps, 1 to 10000")
    assert not folder.exists()


def test_too_short_a_run_is_refused(start, capsys):
    status, _ = start("--profile=20", "optim.epochs=1")
    assert status == 2
    assert "--profile 20 takes 28 steps (5 of them to warm up, 3 traced), and this run has 5" in (
        capsys.readouterr().err
    )


def test_neither_resumed_nor_in_the_folder_of_a_run(start, capsys):
    assert start("--profile=2", "--resume")[0] == 2
    assert "--profile runs by itself" in capsys.readouterr().err
    assert start("optim.epochs=1")[0] == 0
    capsys.readouterr()
    assert start("--profile=2")[0] == 2
    assert "holds a run already" in capsys.readouterr().err


def test_option_without_number_times_twenty_steps():
    assert profiling.parse_num_steps(parse(["c.yaml", "out=x", "--profile"]).profile) == 20
    assert parse(["c.yaml", "out=x"]).profile is None


def test_queues_are_full_and_random_state_is_kept(config_file, shards, tmp_path):
    options = [
        f"out={tmp_path}", f"data.shards={shards}", "objective.name=moco",
        "objective.num_negatives=50",
    ]  # fmt: skip
    run = make_trainer(load_config(config_file, options), resume=False)
    before = torch.get_rng_state()
    profiling.fill_queues(run.task.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert run.task.model.augmenter.is_ready()
    assert [int(queue.count) for queue in run.task.model.memory.children()] == [50, 50]
