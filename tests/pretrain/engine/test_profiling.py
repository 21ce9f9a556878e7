"""``--profile``: parts add up to the step, what is slow shows in its row, nothing is trained."""

import contextlib
import gzip
import io
import json
import shutil
import time

import pytest
import torch
import yaml

from common.files import read_json_lines
from pretrain.__main__ import main, parse
from pretrain.config import load_config
from pretrain.engine import profiling
from pretrain.engine import sections as s
from pretrain.engine.feed import Feed
from pretrain.engine.optim import LARS
from pretrain.engine.profile_summary import PART_OF, REST, ROWS
from pretrain.engine.train import Run
from pretrain.models.augmenter import FeatureAugmenter
from pretrain.models.contrastive import OnlineNetwork
from pretrain.models.support_queue import SupportQueue

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
    return {row["name"]: row["ms"] for row in summary["sections"]}


def test_parts_add_up_and_all_are_there(profiled):
    folder, printed = profiled
    summary = summary_in(folder)
    rows = summary["sections"]
    assert {row["name"] for row in rows} == {*ROWS, REST} - {s.WAIT}  # a GPU's alone
    whole = [row for row in rows if row["part_of"] is None and not row["is_beside"]]
    assert sum(row["ms"] for row in whole) == pytest.approx(summary["step_ms"]["mean"], rel=1e-6)
    assert sum(row["share"] for row in whole) == pytest.approx(1, rel=1e-6)
    assert min(row["ms"] for row in rows) >= 0
    assert milliseconds(summary)[REST] < 0.3 * summary["step_ms"]["mean"]
    times = milliseconds(summary)
    assert sum(times[part] for part in PART_OF) < times[s.FORWARD]
    assert summary["images_per_second"] == pytest.approx(8e3 / summary["step_ms"]["mean"])
    rate = summary["flops"]["per_picture"] * summary["images_per_second"]
    assert summary["mfu"] == pytest.approx(rate / summary["ceiling"]["flops_per_second"])
    assert summary["ceiling"]["is_measured"]
    for row in rows:
        assert row["name"] in printed
    assert "no training run" in printed
    assert "ms (median" in printed


def test_trace_has_every_label_in_every_step(profiled):
    folder, _ = profiled
    assert {path.name for path in (folder / "profile").iterdir()} == {
        "summary.json", "trace.json.gz",
    }  # fmt: skip
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    labels = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    for name in (s.TRANSFER, s.EMA_FORWARD, s.FORWARD, s.BACKWARD, s.OPTIMIZER, s.QUEUE):
        assert labels.count(name) == profiling.MOST_TRACED, name
    assert labels.count(s.FA) == 2 * profiling.MOST_TRACED  # both directions
    assert labels.count(s.LOADER) >= profiling.MOST_TRACED  # and where an epoch ends


def test_what_is_slow_shows_in_its_row(start, monkeypatch):
    """Each part sleeps, far longer than it works; that parts add up is shown above."""
    part = 0.03
    monkeypatch.setattr(Feed, "_listing_bad", slow_iterator(Feed._listing_bad, part))
    monkeypatch.setattr(Feed, "views", slow(Feed.views, part))
    monkeypatch.setattr(OnlineNetwork, "project", slow_if_frozen(OnlineNetwork.project, part))
    monkeypatch.setattr(OnlineNetwork, "predict", slow(OnlineNetwork.predict, part))
    monkeypatch.setattr(FeatureAugmenter, "forward", slow(FeatureAugmenter.forward, part))
    monkeypatch.setattr(LARS, "step", slow(LARS.step, part))
    monkeypatch.setattr(SupportQueue, "put", slow(SupportQueue.put, part))
    status, folder = start("--profile=2")
    assert status == 0
    summary = summary_in(folder)
    times, once = milliseconds(summary), 1e3 * part
    for name in (s.LOADER, s.AUGMENTATION, s.OPTIMIZER, s.QUEUE):
        assert times[name] >= once, name
    assert times[s.EMA_FORWARD] >= 2 * once  # two views
    assert times[s.FA] >= 2 * once  # two directions
    assert times[s.FORWARD] >= times[s.FA] + once  # and the predictor, once for both views
    assert summary["step_ms"]["min"] >= 9 * once


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
    run = Run(load_config(config_file, options), resume=False)
    before = torch.get_rng_state()
    profiling.fill_queues(run.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert run.model.augmenter.is_ready()
    queues = run.model.objective.negatives or []
    assert [int(queue.count) for queue in queues] == [50, 50]


def test_sections_outside_a_step_do_not_count():
    with s.SectionTimer(torch.device("cpu")) as timer:
        with s.section("before"):
            time.sleep(0.01)
        timer.bound()
        with s.section("outer"):
            time.sleep(0.02)
            for _ in range(2):
                with s.section("inner"):
                    time.sleep(0.03)
        timer.bound()
        with s.section("after"):
            time.sleep(0.01)
    costs = timer.costs()
    assert set(costs) == {"outer", "inner"}
    assert costs["inner"].num_calls == 2
    assert 0.06 <= costs["inner"].total == costs["inner"].own < 0.1
    assert 0.02 <= costs["outer"].own < 0.05
    assert costs["outer"].total == pytest.approx(costs["outer"].own + costs["inner"].own)
    assert costs["inner"].by_parent == {"outer": costs["inner"].own}
    assert sum(timer.step_seconds()) == pytest.approx(costs["outer"].total, abs=5e-3)


def test_a_section_is_a_label_without_a_timer():
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace,
        s.section("only a label"),
    ):
        torch.ones(3).sum()
    assert "only a label" in {event.key for event in trace.key_averages()}


def test_a_section_is_left_when_its_body_fails():
    with s.SectionTimer(torch.device("cpu")) as timer:
        timer.bound()
        with pytest.raises(RuntimeError, match="broken"), s.section("outer"), s.section("inner"):
            raise RuntimeError("broken")
        with s.section("next"):
            pass
        timer.bound()
    assert timer.costs()["next"].by_parent.keys() == {""}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_stream_is_timed_and_nothing_waits():
    """Work of one section, 20 products of 4096^2, is its own although the host is long gone."""
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    side = torch.cuda.Stream(device)
    (a @ a).sum().item()
    with s.SectionTimer(device) as timer:
        timer.bound()
        with s.section("short"):
            a.add(1)
        with s.section("long"):
            for _ in range(20):
                torch.mm(a, a)
        with torch.cuda.stream(side), s.section("beside"):
            torch.mm(a, a)
        timer.bound()
        costs, (seconds,) = timer.costs(), timer.step_seconds()
    assert costs["long"].total > 10 * costs["short"].total
    assert costs["long"].total > costs["long"].host
    assert costs["beside"].is_beside
    assert not costs["long"].is_beside
    assert costs["long"].total + costs["short"].total <= seconds
