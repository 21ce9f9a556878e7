"""The watchdog: who hangs, where, since when; in one process and between two."""

import re
import subprocess
import threading
import time

import pytest

from common.files import read_json_lines
from pretrain.__main__ import main
from pretrain.engine import checkpoint
from pretrain.engine.train import Run
from pretrain.engine.watchdog import Progress, Standing, explain
from tests.pretrain.engine.run_helpers import (
    assert_same_state,
    free_port,
    start_guard_worker,
    start_pair,
)
from tests.pretrain.engine.test_guards import BASE  # noqa: F401  read by the fixture config_file

SECONDS = 2.0  # no step of this network takes so long, also beside other work
STOP = [f"engine.watchdog_seconds={SECONDS}", "engine.on_hang=stop"]


@pytest.fixture
def start(config_file, shards, tmp_path, capsys):
    """start("name", "key=value", ..): exit status, folder, stderr."""

    def run(name, *options):
        folder = tmp_path / name
        capsys.readouterr()
        arguments = [f"out={folder}", f"data.shards={shards}", "optim.epochs=1", *options]
        return main([str(config_file), *arguments]), folder, capsys.readouterr().err

    return run


@pytest.fixture
def slow_step(monkeypatch):
    """The third step takes long; returns the names of the threads that were there then."""
    step, names = Run._step, []

    def a_step_that_takes_long(self, fed, **options):
        if self.position.step == 2:
            time.sleep(2.5 * SECONDS)
            names.extend(thread.name for thread in threading.enumerate())
        return step(self, fed, **options)

    monkeypatch.setattr(Run, "_step", a_step_that_takes_long)
    return names


def test_a_hang_is_reported_once_with_phase_and_stacks(start, slow_step, monkeypatch):
    status, folder, err = start("slow", f"engine.watchdog_seconds={SECONDS}")
    assert status == 0, err
    assert "watchdog" in slow_step
    text = (folder / "watchdog-rank-0.txt").read_text()
    line = (
        r"watchdog: rank 0 has been in data loading for (\d\.\d) s since step 2; no step was "
        r"finished for (\d\.\d) s"
    )
    (seconds,) = re.findall(line, text)
    assert all(SECONDS - 0.5 <= float(s) <= 2.5 * SECONDS for s in seconds)
    assert "in a_step_that_takes_long" in text
    assert "most recent call first" in text
    assert re.findall(line, err) == [seconds]
    assert "in a_step_that_takes_long" in err
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    monkeypatch.undo()
    _, undisturbed, _ = start("undisturbed", f"engine.watchdog_seconds={10 * SECONDS}")
    assert not (undisturbed / "watchdog-rank-0.txt").exists()
    states = [checkpoint.load(f / "checkpoint.pth") for f in (folder, undisturbed)]
    assert_same_state(states[0]["model"], states[1]["model"])


def test_zero_seconds_watch_nothing(start, slow_step):
    status, folder, err = start("off", "engine.watchdog_seconds=0")
    assert status == 0, err
    assert "watchdog" not in slow_step
    assert "watchdog" not in err
    assert not (folder / "watchdog-rank-0.txt").exists()


def test_two_hangs_are_two_reports(start, monkeypatch):
    step = Run._step

    def slow(self, fed, **options):
        if self.position.step in (1, 3):
            time.sleep(1.5 * SECONDS)
        return step(self, fed, **options)

    monkeypatch.setattr(Run, "_step", slow)
    _, folder, _ = start("slow", f"engine.watchdog_seconds={SECONDS}")
    text = (folder / "watchdog-rank-0.txt").read_text()
    assert re.findall(r"rank 0 has been in data loading for .* since step (\d)", text) == ["1", "3"]


@pytest.mark.parametrize("what", ["sleep", "hold"])
def test_on_hang_stop_ends_the_process(config_file, shards, tmp_path, what):
    """`hold`: no Python thread can run, so that only faulthandler's own timer is left."""
    folder = tmp_path / "run"
    arguments = [config_file, f"out={folder}", f"data.shards={shards}", *STOP]
    arguments.append("engine.checkpoint_every_steps=2")
    worker = start_guard_worker(what, 0, "4", arguments, port=free_port())
    try:
        printed, _ = worker.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        worker.kill()
        raise
    assert worker.returncode == 1, printed
    assert "in happen" in printed
    if what == "sleep":
        assert "rank 0 has been in data loading for" in printed
        assert "watchdog: this process ends now (engine.on_hang=stop)" in printed
        assert "in stand_still" in (folder / "watchdog-rank-0.txt").read_text()
    else:
        assert "Timeout (0:00:0" in printed
    assert checkpoint.load(folder / "checkpoint.pth")["step"] == 2


@pytest.mark.ddp
@pytest.mark.parametrize("what", ["sleep", "sleep-in-forward"])
def test_of_two_processes_the_one_that_hangs_is_named(config_file, shards, tmp_path, what):
    folder = tmp_path / "run"
    results = start_pair(
        what, 1, "4", config_file, f"out={folder}", f"data.shards={shards}", *STOP,
        "engine.log_every_steps=1",
    )  # fmt: skip
    for status, printed in results:
        assert status == 1, printed
    phase = "data loading" if what == "sleep" else "forward"
    waiting, hanging = ((folder / f"watchdog-rank-{r}.txt").read_text() for r in (0, 1))
    where = rf"rank 1 \(in {phase} since step 3\)"
    assert re.search(rf"watchdog: rank 0 waits in a collective for {where}", waiting)
    assert re.search(rf"watchdog: rank 1 has been in {phase} for \d\.\d s since step 3;", hanging)
    assert re.search(rf"watchdog: the others wait in a collective for {where}", hanging)
    assert "in stand_still" in hanging
    assert "in stand_still" not in waiting
    rows = [r["step"] for r in read_json_lines(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert rows == [1, 2, 3]


def test_who_is_behind_is_who_is_waited_for():
    ahead = Standing(5, 2, True, "backward")
    behind = Standing(4, 3, False, "kNN probe")
    assert explain(1, {0: behind, 1: ahead, 2: ahead}) == (
        "watchdog: rank 1 waits in a collective for rank 0 (in kNN probe since step 4)"
    )
    assert explain(0, {0: behind, 1: ahead, 2: ahead}) == (
        "watchdog: the others wait in a collective for rank 0 (in kNN probe since step 4)"
    )
    lost = explain(0, {0: ahead, 1: None, 2: ahead})
    assert lost == "watchdog: rank 0 waits for rank 1, heard nothing from there yet"
    assert "all ranks stand at the same place" in explain(0, {0: ahead, 1: ahead})
    sleeping = Standing(5, 2, False, "backward")
    assert "waits in a collective for rank 1" in explain(0, {0: ahead, 1: sleeping})
    both = explain(2, {0: behind, 1: behind, 2: ahead})
    assert both.endswith(
        "for rank 0 (in kNN probe since step 4), rank 1 (in kNN probe since step 4)"
    )


def test_phases_are_counted_within_a_step():
    progress = Progress()
    progress.enter("forward")
    progress.enter("backward")
    step, number, phase, began, finished = progress.beat
    assert (step, number, phase) == (0, 2, "backward")
    assert began >= finished
    progress.finished(1)
    assert progress.beat[:3] == (1, 0, "bookkeeping")
    assert progress.beat[3] == progress.beat[4] >= began
