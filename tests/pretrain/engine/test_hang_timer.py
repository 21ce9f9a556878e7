"""A step that hangs: all stacks are printed, and the process goes on or ends."""

import subprocess

import pytest

from common.files import read_json_lines
from pretrain.engine import checkpoint
from tests.pretrain.engine.run_helpers import free_port, start_guard_worker, start_pair
from tests.pretrain.engine.test_guards import BASE  # noqa: F401  read by the fixture config_file

SECONDS = 2.0  # no step of this network takes so long, also beside other work
STOP = [f"engine.watchdog_seconds={SECONDS}", "engine.on_hang=stop"]


@pytest.fixture
def run(config_file, shards, tmp_path):
    """run(what, "key=value", ..): WHAT happens in step 4 of a process: status, output, folder."""

    def run(what, *options):
        folder = tmp_path / "run"
        arguments = [config_file, f"out={folder}", f"data.shards={shards}", "optim.epochs=1"]
        worker = start_guard_worker(what, 0, "4", [*arguments, *options], port=free_port())
        try:
            printed, _ = worker.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            worker.kill()
            raise
        return worker.returncode, printed, folder

    return run


def test_a_hang_is_reported_and_the_run_goes_on(run):
    status, printed, folder = run("pause", f"engine.watchdog_seconds={SECONDS}")
    assert status == 0, printed
    assert printed.count("Timeout (0:00:02)!") == 1
    assert "most recent call first" in printed
    assert "in happen" in printed
    assert (folder / "summary.json").exists()


def test_zero_seconds_report_nothing(run):
    status, printed, _ = run("pause", "engine.watchdog_seconds=0", "engine.on_hang=stop")
    assert status == 0, printed
    assert "Timeout" not in printed


@pytest.mark.parametrize("what", ["sleep", "hold"])
def test_on_hang_stop_ends_the_process(run, what):
    """`hold`: the interpreter's lock is never released, so that no Python code can run."""
    status, printed, folder = run(what, *STOP, "engine.checkpoint_every_steps=2")
    assert status == 1, printed
    assert "Timeout (0:00:02)!" in printed
    assert "in happen" in printed
    assert checkpoint.load(folder / "checkpoint.pth")["step"] == 2


@pytest.mark.ddp
def test_of_two_processes_both_end_and_the_stacks_name_the_one_that_hangs(
    config_file, shards, tmp_path
):
    folder = tmp_path / "run"
    results = start_pair(
        "sleep-in-forward", 1, "4", config_file, f"out={folder}", f"data.shards={shards}", *STOP,
        "engine.log_every_steps=1",
    )  # fmt: skip
    (waiting_status, waiting), (hanging_status, hanging) = results
    assert (waiting_status, hanging_status) == (1, 1), waiting + hanging
    assert "in stand_still" in hanging
    assert "in stand_still" not in waiting
    rows = [r["step"] for r in read_json_lines(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert rows == [1, 2, 3]
