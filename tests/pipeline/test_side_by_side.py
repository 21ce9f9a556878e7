"""Stages of one group beside each other, as real processes that wait for one another."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import RunFailed
from pipeline import experiment, run
from pipeline.jobs import session_members
from pipeline.run import TimeIsUp
from tests.pipeline.bench import Bench
from tools import run_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run, "_POLL_SECONDS", 0.01)
    return Bench(tmp_path)


def test_stages_of_a_group_overlap_and_keep_their_own_time(bench):
    stages = [bench.stage("a", "b.begun"), bench.stage("b", "a.begun", "late")]
    stages.append(bench.stage("report", group=""))

    def after_each() -> None:
        if bench.records().get("a", {}).get("status") == "finished":
            time.sleep(0.25)
            (bench.folder / "late").write_text("")

    runner = bench.run(stages, 2, after_each=after_each)
    records = bench.records()
    assert {r["status"] for r in records.values()} == {"finished"}
    assert records["b"]["seconds"] >= records["a"]["seconds"] + 0.15
    assert all(record["peak_memory_bytes"] > 1 << 20 for record in records.values())
    assert bench.begun()[2] == "report", "a stage without the group waits for all of it"
    assert "a threads" in runner.log_path(stages[0]).read_text()
    assert "b threads" not in runner.log_path(stages[0]).read_text()


def test_one_at_a_time_unless_asked(bench):
    stages = [bench.stage("a"), bench.stage("b", "a.begun"), bench.stage("c", "b.begun")]
    bench.run(stages, 1)
    assert bench.begun() == ["a", "b", "c"]


def test_stages_begin_in_the_order_of_the_list(bench):
    waits = {"a": "b.begun", "b": "d.begun", "c": "b.begun", "d": "c.begun"}  # b outlives a and c.
    bench.run([bench.stage(name, wait) for name, wait in waits.items()], 2)
    assert set(bench.begun()[:2]) == {"a", "b"}
    assert bench.begun()[2:] == ["c", "d"]


def test_a_failure_lets_the_neighbour_finish_and_begins_nothing_new(bench):
    (bench.folder / "a.breaks").write_text("")
    stages = [bench.stage("a", "b.begun"), bench.stage("b", "a.over"), bench.stage("c")]

    def after_each() -> None:
        (bench.folder / "a.over").write_text("")  # b ends only when a has failed.

    with pytest.raises(RunFailed, match="stage a failed with exit status 3") as caught:
        bench.run(stages, 2, after_each=after_each)
    assert str(caught.value).endswith(f"first remove {bench.out / 'a'}")
    assert "to go on: again" in str(caught.value)
    assert bench.states() == {"a": "failed", "b": "finished"}
    (bench.folder / "a.breaks").unlink()
    (bench.folder / "begun.txt").unlink()
    runner = bench.run(stages, 2)
    assert sorted(bench.begun()) == ["a", "c"]
    assert [name for name in "abc" if runner.store.stages[name].get("skipped")] == ["b"]
    assert "a: continues where it stopped" in bench.shown.getvalue()


def test_stages_save_before_the_time_is_up(bench):
    minutes = (run.SAVE_SECONDS + 0.2) / 60
    with pytest.raises(TimeIsUp, match="time is up"):
        bench.run([bench.stage(name, "never") for name in "abc"], 2, minutes=minutes)
    assert bench.states() == {"a": "stopped", "b": "stopped"}
    (bench.folder / "never").write_text("")
    bench.run([bench.stage(name, "never") for name in "abc"], 2, minutes=10)
    assert set(bench.states().values()) == {"finished"}
    assert "b: continues where it stopped" in bench.shown.getvalue()


def test_a_pipeline_stops_in_time_and_goes_on(bench, monkeypatch, capsys):
    """Through the command line; the stages are stand-ins."""
    monkeypatch.setattr(experiment, "build_stages", lambda *_: [bench.stage("a", "late")])
    minutes = (run.SAVE_SECONDS + 0.3) / 60
    words = ["compare", "--out", str(bench.out), "--max-minutes"]
    assert run_pipeline.main([*words, str(minutes)]) == 3
    assert "time is up" in capsys.readouterr().out
    page = (bench.out / "report.html").read_text()
    assert "Does feature augmentation help?" in page
    assert "Preliminary" in page
    (bench.folder / "late").write_text("")
    assert run_pipeline.main([*words, "10"]) == 0
    assert bench.states() == {"a": "finished"}


DRIVER = """
import sys
from pathlib import Path
from tests.pipeline.bench import Bench
from common.errors import StoppedBySignal
from pipeline.run import Limits, Progress, Runner
bench = Bench.__new__(Bench)
bench.folder, bench.out = Path(sys.argv[1]), Path(sys.argv[1]) / "out"
bench.script = bench.folder / "stage.py"
stages = [bench.stage(name, "release") for name in "abc"]
try:
    Runner(bench.folder, bench.out, ["again"], Limits(2)).run(stages, Progress(3))
except StoppedBySignal as error:
    print(error)
    sys.exit(128 + error.number)
"""


def start_three(bench: Bench) -> tuple[subprocess.Popen, list[int]]:
    """Start a runner of three stages, two at once; returns it and the sessions of its stages."""
    command, pipe = [sys.executable, "-c", DRIVER, str(bench.folder)], subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    files = [bench.folder / f"{name}.begun" for name in "ab"]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline, "the stages did not begin"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process, [int(file.read_text()) for file in files]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_stages_and_the_next_run_goes_on(bench, signum):
    process, sessions = start_three(bench)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, output
    assert f"stopped by {signum.name}" in output
    assert not any(session_members(session) for session in sessions)
    assert bench.states() == {"a": "stopped", "b": "stopped"}
    (bench.folder / "release").write_text("")
    bench.run([bench.stage(name, "release") for name in "abc"], 2)
    assert {r["status"] for r in bench.records().values()} == {"finished"}
    assert [bench.records()[name]["resumed"] for name in "abc"] == [True, True, False]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends the children of a killed parent")
def test_a_killed_runner_leaves_no_stage_and_the_next_one_goes_on(bench):
    process, sessions = start_three(bench)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(session_members(session) for session in sessions):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (bench.folder / "release").write_text("")
    a, b, c = (bench.stage(name, "release") for name in "abc")
    bench.run([a, replace(b, resumable=False), c], 2)
    assert {r["status"] for r in bench.records().values()} == {"finished"}
    lines = bench.shown.getvalue().splitlines()
    assert lines[:2] == ["[1/3] a: continues where it stopped", "[2/3] b: did not finish last time"]


@pytest.mark.parametrize(("own", "expected"), [(None, "2"), ("3", "3")])
def test_threads_of_a_stage(bench, monkeypatch, own, expected):
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    stages = [bench.stage("a"), bench.stage("alone", group="")]
    runner = bench.run(stages, 2, threads=2)
    logs = [runner.log_path(stage).read_text() for stage in stages]
    assert f"a threads {expected}\n" in logs[0]
    assert f"alone threads {own}\n" in logs[1], "stages outside the group keep all cores"
    assert ("OMP_NUM_THREADS=2" in logs[0].splitlines()[0]) == (not own)


@pytest.mark.parametrize(
    ("setting", "cores", "gpu", "num_arms", "expected"),
    [
        ("auto", 2, False, 4, 2),
        ("auto", 64, False, 4, 4),
        ("auto", 64, False, 2, 2),
        ("auto", 1, False, 4, 1),
        ("auto", 64, True, 4, 1),
        (3, 1, True, 2, 3),
    ],
)
def test_how_many_side_by_side(monkeypatch, setting, cores, gpu, num_arms, expected):
    monkeypatch.setattr("common.provenance.usable_cores", lambda: cores)
    monkeypatch.setattr("pipeline.run.has_nvidia_gpu", lambda: gpu)
    assert run.side_by_side(setting, num_arms) == expected


def test_gpus_are_found_by_the_driver_unless_hidden(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.has_nvidia_gpu()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not run.has_nvidia_gpu()
