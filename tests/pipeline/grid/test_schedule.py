"""The store survives what kills its writer; the scheduler keeps to its limits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.grid.jobs import CommandJob, Step
from pipeline.grid.schedule import SAVE_SECONDS, Scheduler, Store, Work
from tests.pipeline.grid.stub import StubExecutor, finished

ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def test_a_cell_through_its_life(store: Store) -> None:
    row = store.plan(("f", 3), "mask", {"grid": {"FA": "mask"}}, {"config": {"a": 1}})
    assert (row.status, row.attempts, row.metrics) == ("planned", 0, {})
    row = store.update(("f", 3), status="finished", metrics={"knn": 50.25})
    assert store.row(("f", 3)) is row
    assert (row.metrics, row.settings) == ({"knn": 50.25}, {"config": {"a": 1}})


def test_planning_again_keeps_what_was_found(store: Store, tmp_path: Path) -> None:
    store.plan(("f", 0), "old", {}, {})
    store.update(("f", 0), status="finished", metrics={"knn": 1.0})
    again = Store(tmp_path / "results")
    again.plan(("f", 0), "new", {"h": {"a": "b"}}, {})
    row = again.plan(("f", 0), "new", {"g": {"x": "y"}}, {})
    assert row.axes == {"g": {"x": "y"}, "h": {"a": "b"}}
    assert (row.label, row.status, row.metrics) == ("new", "finished", {"knn": 1.0})
    assert len(again.rows()) == 1


def test_what_a_killed_program_left_running_is_stopped(store: Store, tmp_path: Path) -> None:
    for seed, status in enumerate(("running", "finished", "planned")):
        store.plan(("f", seed), "x", {}, {})
        store.update(("f", seed), status=status)
    again = Store(tmp_path / "results")
    assert [row.status for row in again.rows()] == ["stopped", "finished", "planned"]
    assert again.row(("f", 0)).error == "killed together with the program that started it"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 1}', '{"format": "other"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f-0.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"f-0\.json: is no result .*delete it"):
        Store(tmp_path)


def test_rows_stand_in_the_order_of_the_last_planning(store: Store, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        store.plan((name, 0), name, {}, {})
    again = Store(tmp_path / "results")
    for name in ("c", "a", "b"):
        again.plan((name, 0), name, {}, {})
    assert [row.label for row in again.rows()] == ["c", "a", "b"]


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    """A process writes cells until it is killed; every row is then either absent or whole."""
    code = (
        "import sys; from pathlib import Path; from pipeline.grid.schedule import Store\n"
        "s = Store(Path(sys.argv[1]))\n"
        "for i in range(10**6):\n"
        "    s.plan((f'f{i}', 0), 'x', {}, {}); s.update((f'f{i}', 0), status='running')\n"
        "    s.update((f'f{i}', 0), status='finished', metrics={'knn': float(i)})\n"
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


def make_todo(store: Store, folder: Path, count: int) -> list[Work]:
    todo = []
    for seed in range(count):
        store.plan(("f", seed), "cell", {}, {})
        product = folder / f"{seed}.json"
        todo.append(
            Work(("f", seed), (Step("s", ("x",), product),), folder / str(seed),
                 lambda seed=seed: {"knn": float(seed)})
        )  # fmt: skip
    return todo


def done(job: CommandJob) -> dict:
    return finished(job.steps[0].product, {})


def test_all_is_worked_off_in_order_and_never_too_many_at_once(store, tmp_path) -> None:
    executor = StubExecutor(done, polls=2)
    scheduler = Scheduler(store, executor, tmp_path, parallel=3, code="abc")
    assert scheduler.run(make_todo(store, tmp_path, 7)) == ""
    assert executor.most_at_once == 3
    assert [int(h.job.folder.name) for h in executor.handles] == list(range(7))
    assert [row.metrics["knn"] for row in store.rows()] == list(range(7))
    found = {(row.status, row.seconds, row.attempts, row.code) for row in store.rows()}
    assert found == {("finished", 1.0, 1, "abc")}


def test_failures_are_bounded(store, tmp_path) -> None:
    executor = StubExecutor(lambda job: {"status": "failed", "error": "no memory"})
    scheduler = Scheduler(store, executor, tmp_path, max_failures=2)
    assert scheduler.run(make_todo(store, tmp_path, 9)) == "more than 2 runs failed"
    rows = store.rows()
    assert [row.status for row in rows] == ["failed"] * 3 + ["planned"] * 6
    assert rows[0].error == "no memory"


def test_a_cell_without_figures_has_failed(store, tmp_path) -> None:
    def missing() -> dict[str, float]:
        raise ValueError("knn: no figure")

    (work,) = make_todo(store, tmp_path, 1)
    work = Work(work.key, work.steps, work.folder, missing)
    Scheduler(store, StubExecutor(done), tmp_path, max_failures=5).run([work])
    assert (store.rows()[0].status, store.rows()[0].error) == ("failed", "knn: no figure")


def test_running_cells_save_before_the_deadline(store, tmp_path) -> None:
    executor = StubExecutor(done, polls=10**6)
    deadline = time.monotonic() + SAVE_SECONDS + 0.3
    scheduler = Scheduler(store, executor, tmp_path, parallel=2, deadline=deadline)
    todo = make_todo(store, tmp_path, 5)
    assert scheduler.run(todo) == "time is up"
    assert time.monotonic() < deadline
    assert [row.status for row in store.rows()] == ["stopped"] * 2 + ["planned"] * 3


def test_a_signal_stops_like_the_deadline(store, tmp_path) -> None:
    asked = iter(["", "", "stopped by SIGINT"])
    executor = StubExecutor(done, polls=10**6)
    scheduler = Scheduler(store, executor, tmp_path, stop_requested=lambda: next(asked))
    assert scheduler.run(make_todo(store, tmp_path, 3)) == "stopped by SIGINT"
    assert [row.status for row in store.rows()] == ["stopped", "planned", "planned"]


def test_attempts_and_their_seconds_add_up(store, tmp_path) -> None:
    (work,) = make_todo(store, tmp_path, 1)
    fail = StubExecutor(lambda job: {"status": "failed", "error": "no memory"})
    Scheduler(store, fail, tmp_path, code="abc").run([work])
    Scheduler(store, StubExecutor(done), tmp_path, code="abd").run([work])
    (row,) = store.rows()
    assert (row.status, row.attempts, row.seconds, row.error) == ("finished", 2, 2.0, None)
    assert row.code == "abd"
