"""tools/runs.py on made-up run folders: states, figures, differences, damaged files."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from pipeline import results
from pipeline.report import runs
from tests.locks import holding
from tests.pipeline.report import run_fixture
from tools import runs as command


def make(folder, *, steps=10, finished=True, lr=0.1, age=1e6, rows=(), epochs=2):
    """A run of 5 steps per epoch with a row for each step and a probe for each epoch."""
    folder.mkdir(parents=True)
    config = {"seed": 0, "data": {"shards": "a"}, "optim": {"base_lr": lr, "epochs": epochs}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"commit": "abcdef0123456789"}))
    lines = [
        {"kind": "train", "step": s, "epoch": s / 5, "loss": 2 - s / 10, "lr": lr,
         "images_per_second": 100.0 + s, "data_wait_share": 0.1, "online_top1": s / 100}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    lines += [
        {"kind": "knn", "step": s, "epoch": s / 5, "knn_top1": 0.9 - abs(s - 5) / 50}
        for s in range(0, steps + 1, 5)
    ]
    lines.sort(key=lambda row: row["step"])
    lines += rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    when = time.time() - age
    os.utime(folder / "metrics.jsonl", (when, when))
    if finished:
        summary = {"steps": steps, "epochs": 2, "images_per_second": 55.5, "seconds": 12.0}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def called(capsys, *arguments):
    status = command.main([str(a) for a in arguments])
    return status, capsys.readouterr()


def test_states(tmp_path):
    """A summary means finished, unless the run went on after it; a stop is a stop if it is last."""
    assert runs.read(make(tmp_path / "a")).state == "finished"
    folder = make(tmp_path / "b", steps=15)
    (folder / "summary.json").write_text(json.dumps({"steps": 10}))
    assert runs.read(folder).state == "failed"
    message = "stopped by SIGTERM after step 4; the checkpoint is saved"
    event = {"kind": "event", "step": 4, "message": message}
    stopped = runs.read(make(tmp_path / "s", steps=4, finished=False, rows=[event]))
    assert (stopped.state, stopped.reason) == ("stopped", message)
    later = {"kind": "train", "step": 5, "loss": 1.0}  # it was resumed, then killed
    failed = runs.read(make(tmp_path / "f", steps=4, finished=False, rows=[event, later]))
    assert failed.state == "failed"
    assert "neither summary.json nor a word" in failed.reason
    recent = make(tmp_path / "r", finished=False, age=5)
    now = (recent / "metrics.jsonl").stat().st_mtime
    assert runs.read(recent, now=now + 5).state == "running"
    assert runs.read(recent, now=now + runs.RECENT_SECONDS + 1).state == "failed"


def test_a_held_lock_means_running_whatever_the_files_say(tmp_path):
    """The lock is taken as pretraining takes it; a look at it does not free it."""
    folder = make(tmp_path / "a")
    with holding(folder / ".lock"):
        assert [runs.read(folder).state for _ in range(2)] == ["running"] * 2
    assert runs.read(folder).state == "finished"


def test_a_lock_alone_is_no_run(tmp_path):
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear/.lock").write_text("{}")  # of a killed evaluation
    assert list(runs.find(tmp_path)) == []


def test_damaged_files_are_named_and_the_rest_is_told(tmp_path):
    folder = make(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a torn last line is no damage
    run = runs.read(folder)
    assert (run.state, run.problems, run.figures["step"]) == ("finished", [], 10)
    (folder / "config.yaml").write_text("a: [1, 2\n")
    (folder / "environment.json").write_text("{")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("\0\0\0\n[1]\n" + text)
    (folder / "summary.json").write_text('{"steps": ')
    run = runs.read(folder)
    assert run.state == "damaged"
    assert run.problems == [
        "config.yaml is damaged",
        "environment.json is damaged",
        "summary.json is damaged",
        "metrics.jsonl has 2 damaged lines, left out: 1, 2",
    ]
    assert run.figures["loss"] == pytest.approx(1.0)
    assert (run.figures["epochs"], run.commit) == (None, None)


def test_files_that_one_would_wait_on_are_named_and_a_linear_evaluation_is_no_run(tmp_path):
    folder = make(tmp_path / "a")
    for name in ("config.yaml", "environment.json", "summary.json", "metrics.jsonl"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert runs.read(folder).problems == [
        "config.yaml is damaged",
        "environment.json is damaged",
        "summary.json is damaged",
        "metrics.jsonl cannot be read (is a named pipe where a file is expected)",
    ]
    for name in ("linear/identity.json", "linear/.lock", "linear/refit/checkpoint.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(runs.find(tmp_path)) == [folder]
    with pytest.raises(UserError, match="linear holds no run"):
        runs.read(tmp_path / "linear")


@pytest.mark.parametrize("text", ["optim: &a {b: *a}", "a: !!python/object/apply:os.abort []"])
def test_a_config_of_a_stranger_is_damaged(tmp_path, text):
    folder = make(tmp_path / "a")
    (folder / "config.yaml").write_text(text)
    assert runs.read(folder).problems == ["config.yaml is damaged"]


def test_figures_are_those_of_the_files(tmp_path):
    no_figures = {"kind": "train", "step": 11, "epoch": 2.2, "loss": "nan", "lr": True}
    figures = runs.read(make(tmp_path / "a", rows=[no_figures])).figures
    assert figures["loss"] == pytest.approx(1.0)
    figures = runs.read(make(tmp_path / "c")).figures
    assert figures == {
        "step": 10, "epoch": 2, "epochs": 2, "loss": pytest.approx(1.0),
        "knn_top1": pytest.approx(0.8), "best_knn_top1": pytest.approx(0.9),
        "online_top1": 0.1, "images_per_second": 55.5, "data_wait_share": 0.1, "seconds": 12.0,
    }  # fmt: skip
    unfinished = runs.read(make(tmp_path / "b", steps=7, finished=False)).figures
    assert (unfinished["step"], unfinished["epoch"]) == (7, 1.4)
    assert unfinished["images_per_second"] == 104  # the median of 101 .. 107


def test_runs_are_found_at_any_depth_and_not_inside_each_other(tmp_path):
    make(tmp_path / "b" / "pretrain")
    make(tmp_path / "a")
    make(tmp_path / "a" / "checkpoints" / "old")
    (tmp_path / "c").mkdir()
    found = [str(p.relative_to(tmp_path)) for p in runs.find(tmp_path)]
    assert found == ["a", "b/pretrain"]


def test_list_as_a_table(tmp_path, capsys):
    make(tmp_path / "first")
    make(tmp_path / "second", steps=7, finished=False)
    status, printed = called(capsys, "list", tmp_path)
    assert status == 0
    lines = [line.split() for line in printed.out.splitlines()]
    assert lines[0][:4] == ["run", "state", "step", "epoch"]
    assert lines[1][:10] == ["first", "finished", "10", "2", "2", "1", "0.8", "0.1", "55.5", "0.1"]
    assert lines[1][10] == "abcdef0123"
    assert lines[2][:2] == ["second", "failed"]
    assert lines[3][:3] == ["second:", "failed:", "it"]


@pytest.mark.parametrize(
    ("key", "expected"), [("run", "abc"), ("loss", "cab"), ("updated", "cba"), ("seconds", "bac")]
)
def test_sorting(tmp_path, capsys, key, expected):
    """Numbers highest first; a run without one comes last."""
    for number, (name, steps) in enumerate((("a", 8), ("b", 10), ("c", 5))):
        folder = make(tmp_path / name, steps=steps, age=1e6 - 1000 * number)
        if name == "c":
            (folder / "summary.json").unlink()
        else:
            (folder / "summary.json").write_text(json.dumps({"steps": steps, "seconds": steps}))
    _, printed = called(capsys, "list", tmp_path, "--sort", key, "--json")
    assert "".join(Path(row["run"]).name for row in json.loads(printed.out)) == expected


def test_nothing_there(tmp_path, capsys):
    assert called(capsys, "list", tmp_path)[1].out == f"{tmp_path}: no runs\n"
    assert called(capsys, "list", tmp_path / "none")[0] == 2
    with pytest.raises(UserError, match=r"holds no run: none of metrics\.jsonl, .* is there"):
        runs.read(tmp_path)


@pytest.fixture
def pair(tmp_path):
    return make(tmp_path / "slow"), make(tmp_path / "fast", lr=0.2, steps=5)


def test_compare_names_the_keys_that_differ(pair, capsys):
    status, printed = called(capsys, "compare", *pair)
    assert status == 0
    assert re.search(r"^optim\.base_lr\s+0\.1\s+0\.2$", printed.out, re.MULTILINE)
    assert "data.shards" not in printed.out
    assert re.search(r"^kNN\s+0\.8\s+0\.9$", printed.out, re.MULTILINE)
    _, printed = called(capsys, "compare", *pair, "--json")
    found = json.loads(printed.out)
    assert found["config"] == {"optim.base_lr": [0.1, 0.2]}
    assert [run["step"] for run in found["runs"]] == [10, 5]
    status, printed = called(capsys, "compare", pair[0], pair[0])
    assert "the configs are the same" in printed.out
    status, printed = called(capsys, "compare", pair[0])
    assert status == 2
    assert "error: compare needs at least two runs" in printed.err


def test_keys_that_one_config_lacks_differ_and_unreadable_configs_do_not(pair):
    (pair[1] / "config.yaml").write_text("seed: 0\noptim: {base_lr: 0.1}\nnew: {key: 1}\n")
    found = runs.differences([runs.read(folder) for folder in pair])
    assert found == {"data.shards": ["a", None], "new.key": [None, 1], "optim.epochs": [2, None]}
    (pair[1] / "config.yaml").write_text("[")
    assert runs.differences([runs.read(folder) for folder in pair]) == {}


def part(folder, seeds):
    """results.json of a run of the preset `compare` that has these seeds alone."""
    out = run_fixture.make_compare(folder)
    plan = json.loads((out / "experiment.json").read_text())["plan"]
    run_fixture.change(
        out / "experiment.json",
        plan=[stage for stage in plan if int(stage.rpartition("-")[2]) in seeds],
    )
    results.write(out)
    return out / "results.json"


def test_joined_runs_are_judged_as_one(tmp_path, capsys):
    files = [part(tmp_path / "a", (0, 2)), part(tmp_path / "b", (1, 3, 4))]
    whole = json.loads(part(tmp_path / "whole", range(5)).read_text())
    out = tmp_path / "joined.json"
    status, printed = called(capsys, "join", *files, "--out", out)
    joined = json.loads(out.read_text())
    assert status == 0
    assert {key: joined[key] for key in ("tables", "failures", "commits", "rule", "question")} == {
        key: whole[key] for key in ("tables", "failures", "commits", "rule", "question")
    }
    assert [row["seeds"] for row in joined["joined_from"]] == [[0, 2], [1, 3]]
    assert "Yes: fa - base +3.0 points of AP50 with" not in printed.out
    assert "Yes: fa - base +3.0 points of AP50, 95 % interval" in printed.out
    # Joined again: what was joined, and the rest.
    files = [part(tmp_path / "c", (0, 1)), part(tmp_path / "d", (2,)), part(tmp_path / "e", (3, 4))]
    called(capsys, "join", *files[:2], "--out", tmp_path / "three.json")
    called(capsys, "join", tmp_path / "three.json", files[2], "--out", out)
    assert json.loads(out.read_text())["tables"] == whole["tables"]


def test_joined_runs_may_have_nothing_to_compare_yet(tmp_path, capsys):
    files = [part(tmp_path / "a", ()), part(tmp_path / "b", ())]
    assert called(capsys, "join", *files, "--out", tmp_path / "joined.json")[0] == 0


def change_table(path, **changes):
    found = json.loads(path.read_text())
    for table in found["tables"]:
        table |= changes
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda path: change_table(path, comparisons=[]),
            r"b/results.json: the comparisons of the table 'compare' are not those of .*a/results",
        ),
        (
            lambda path: change_table(
                path, rows=[{"label": "FA", "variant": "fa", "values": {"0": 7}}]
            ),
            r"seed 0 of 'FA' has \w+ 7, but [\d.]+ in .*a/results.json; join runs of different",
        ),
        (
            lambda path: change_table(path, comparisons=[{"name": "old", "decides": True}]),
            r"b/results.json: an older version wrote it, without `terms`; run it again",
        ),
        (
            lambda path: run_fixture.change(path, name="other"),
            r"a/results.json: a run of 'compare', but .*b/results.json is one of 'other'",
        ),
        (
            lambda path: path.write_text("{}"),
            r"b/results.json: is damaged; give results.json of runs of ablate.py or of a pipeline",
        ),
    ],
)
def test_runs_that_do_not_belong_together_are_not_joined(tmp_path, capsys, prepare, message):
    files = [part(tmp_path / "a", (0, 1)), part(tmp_path / "b", (2, 3))]
    prepare(files[1])
    status, printed = called(capsys, "join", *files, "--out", tmp_path / "joined.json")
    assert status == 2
    assert re.search(message, printed.err)
    assert not (tmp_path / "joined.json").exists()
