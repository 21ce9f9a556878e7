"""The store survives what kills its writer, and keeps second writers out."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.grid.store import Store, hold

ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def test_a_cell_through_its_life(store: Store) -> None:
    row = store.plan("f", 3, "mask", {"grid": {"FA": "mask"}}, {"config": {"a": 1}})
    assert (row.status, row.attempts, row.metrics) == ("planned", 0, {})
    store.start("f", 3, "abc")
    store.finish("f", 3, "stopped", seconds=2.5, error="time is up")
    store.start("f", 3, "abd")
    store.finish("f", 3, "finished", metrics={"knn": 50.25}, seconds=4.0)
    row = store.row("f", 3)
    assert (row.status, row.attempts, row.seconds, row.error) == ("finished", 2, 6.5, None)
    assert (row.metrics, row.code) == ({"knn": 50.25}, "abd")
    assert row.settings == {"config": {"a": 1}}


def test_planning_again_keeps_what_was_found(store: Store, tmp_path: Path) -> None:
    store.plan("f", 0, "old", {}, {})
    store.start("f", 0, None)
    store.finish("f", 0, "finished", metrics={"knn": 1.0})
    again = Store(tmp_path / "results")
    again.plan("f", 0, "new", {"h": {"a": "b"}}, {})
    row = again.plan("f", 0, "new", {"g": {"x": "y"}}, {})
    assert row.axes == {"g": {"x": "y"}, "h": {"a": "b"}}
    assert (row.label, row.status, row.metrics) == ("new", "finished", {"knn": 1.0})
    assert len(again.rows()) == 1


def test_what_a_killed_harness_left_running_is_stopped(store: Store) -> None:
    for seed in range(3):
        store.plan("f", seed, "x", {}, {})
    store.start("f", 0, None)
    store.start("f", 1, None)
    store.finish("f", 1, "finished", metrics={"knn": 1.0})
    assert store.note_killed() == 1
    assert [row.status for row in store.rows()] == ["stopped", "finished", "planned"]
    assert store.row("f", 0).error == "killed together with its harness"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 1}', '{"format": "other"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f-0.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"f-0\.json: is no result .*delete it"):
        Store(tmp_path)


def test_rows_stand_in_the_order_of_the_last_planning(store: Store, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        store.plan(name, 0, name, {}, {})
    again = Store(tmp_path / "results")
    for name in ("c", "a", "b"):
        again.plan(name, 0, name, {}, {})
    assert [row.label for row in again.rows()] == ["c", "a", "b"]


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    """A process writes cells until it is killed; every row is then either absent or whole."""
    code = (
        "import sys; from pathlib import Path; from pipeline.grid.store import Store\n"
        "s = Store(Path(sys.argv[1]))\n"
        "for i in range(10**6):\n"
        "    s.plan(f'f{i}', 0, 'x', {}, {}); s.start(f'f{i}', 0, None)\n"
        "    s.finish(f'f{i}', 0, 'finished', metrics={'knn': float(i)}, seconds=1.0)\n"
        "    print(i, flush=True)\n"
    )
    path = tmp_path / "results"
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == 20:
            os.kill(writer.pid, signal.SIGKILL)
            break
    writer.stdout.close()
    writer.wait()
    store = Store(path)
    rows = store.rows()
    finished = [row for row in rows if row.status == "finished"]
    assert len(finished) >= 21
    assert all(row.metrics == {"knn": float(row.fingerprint[1:])} for row in finished)
    assert len(rows) - len(finished) <= 1


def test_two_harnesses_do_not_share_a_folder(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(UserError, match="another study runs there"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass
