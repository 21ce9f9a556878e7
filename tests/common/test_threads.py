"""How many threads: what is said, what the run had, what is free."""

import os
from pathlib import Path

import pytest

from common import threads

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="the system does not say which cores are ours"
)
CORES = (3, 5, 6)  # that this process may use


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function: for how much of each of 8 cores' time nobody used it."""
    stat, quota = tmp_path / "stat", tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "_STAT", stat)
    monkeypatch.setattr(threads, "_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(CORES))
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    ticks = os.sysconf("SC_CLK_TCK")

    def write(idle: dict[int, float], seconds: float) -> None:
        rows = ["cpu  9 9 9 9 9 9 9"]
        for core in range(8):
            count = int(1000 + idle.get(core, 0.0) * seconds * ticks)
            rows.append(f"cpu{core} 50 0 7 {count - 300} 300 0 0 0 0 0")  # idle, iowait
        stat.write_text("\n".join([*rows, "intr 5 5"]))

    def let(idle: dict[int, float]) -> None:
        write(idle, 0)
        monkeypatch.setattr(threads.time, "sleep", lambda seconds: write(idle, seconds))

    return let


def test_free_cores_are_those_of_ours_that_nobody_used(machine):
    machine(dict.fromkeys(range(8), 1.0))
    assert threads.free_cores() == pytest.approx(3)
    machine({0: 1.0, 1: 1.0, 3: 1.0, 5: 0.52, 6: 0.0})
    assert threads.free_cores() == pytest.approx(1.52)


def test_a_container_has_no_more_than_its_quota(machine, tmp_path: Path):
    machine(dict.fromkeys(range(8), 1.0))
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads.free_cores() == pytest.approx(1.5)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    machine(dict.fromkeys(range(8), 1.0))
    assert threads.free_cores() == pytest.approx(3)


def test_where_the_system_does_not_say_all_cores_are_free(machine):
    assert not threads._STAT.is_file()
    assert threads.free_cores() == 3


def test_threads_are_those_said_those_the_run_had_or_the_free_cores(
    machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    machine({3: 1.0, 5: 1.0, 6: 0.2})
    assert threads.choose_threads(given=7, earlier=5) == 7
    assert threads.choose_threads(earlier=5) == 5
    assert capsys.readouterr().err == ""
    assert threads.choose_threads() == 2
    assert "CPU threads: 2 (2.2 of 3 cores are free now" in capsys.readouterr().err
    machine({})
    assert threads.choose_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.choose_threads(earlier=5) is None
