"""A cell's commands: skipped when done, stopped when asked, told when failed."""

import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.grid.jobs import CommandJob, Step, read_result
from pipeline.grid.schedule import SAVE_SECONDS, Limits, Scheduler, Work
from pipeline.grid.store import Store
from tests.pipeline.grid.stub import StubExecutor, finished


def step(tmp_path: Path, name: str, code: str) -> Step:
    product = tmp_path / f"{name}.done"
    prefix = f"import signal, sys, time; product = {str(product)!r}\n"
    return Step(name, (sys.executable, "-S", "-c", prefix + code), product)


TOUCH = "open(product, 'a').write('x')"


def run(tmp_path: Path, *steps: Step) -> dict:
    folder = tmp_path / "cell"
    CommandJob(steps, folder, tmp_path)()
    return read_result(folder)


def test_steps_run_in_order_and_once(tmp_path: Path) -> None:
    one = step(tmp_path, "one", TOUCH)
    two = step(tmp_path, "two", f"assert open({str(one.product)!r}).read() == 'x'; " + TOUCH)
    assert run(tmp_path, one, two)["status"] == "finished"
    two.product.unlink()
    assert run(tmp_path, one, two)["status"] == "finished"
    assert one.product.read_text() == "x"  # the second attempt left it alone


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('error: fa.methd: no such key', file=sys.stderr); print('bye'); sys.exit(2)",
         "bad: exit status 2: error: fa.methd: no such key"),
        ("print('a'); print('b'); sys.exit(7)", "bad: exit status 7: a / b"),
        ("pass", "bad: exit status 0 without bad.done: no words"),
        ("import os; os.kill(os.getpid(), 9)", "bad: exit status -9: no words"),
    ],
)  # fmt: skip
def test_failures_have_reasons(tmp_path: Path, code: str, reason: str) -> None:
    found = run(tmp_path, step(tmp_path, "bad", code), step(tmp_path, "after", TOUCH))
    assert (found["status"], found["error"]) == ("failed", reason)
    assert not (tmp_path / "after.done").exists()


def test_a_request_to_stop_lets_the_command_save(tmp_path: Path) -> None:
    """The command gets SIGTERM, saves, and goes on from there at the next attempt."""
    state = tmp_path / "state"
    code = (
        f"from pathlib import Path; state = Path({str(state)!r})\n"
        "def save(*_): state.write_text('half'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "if state.exists(): open(product, 'w').write(state.read_text()); sys.exit()\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    one = step(tmp_path, "one", code)
    log = tmp_path / "cell/logs/one.log"

    def ask() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    found = run(tmp_path, one)
    assert (found["status"], found["error"]) == ("stopped", "stopped in one")
    assert signal.getsignal(signal.SIGTERM) is before
    assert run(tmp_path, one)["status"] == "finished"
    assert one.product.read_text() == "half"


def test_an_attempt_that_outlived_its_harness_ends_first(tmp_path: Path) -> None:
    """The lock is the older attempt's; the newer one waits, and finds the work done."""
    one = step(tmp_path, "one", TOUCH)
    (tmp_path / "cell").mkdir()
    with (tmp_path / "cell/.job.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def end() -> None:
            time.sleep(0.3)
            one.product.write_text("by the older one")
            fcntl.flock(lock, fcntl.LOCK_UN)

        older = threading.Thread(target=end)
        older.start()
        assert run(tmp_path, one)["status"] == "finished"
        older.join()
    assert one.product.read_text() == "by the older one"


def test_a_job_that_left_nothing_has_failed(tmp_path: Path) -> None:
    assert read_result(tmp_path)["error"] == "ended without a result (killed?)"


@pytest.fixture
def store(tmp_path: Path):
    return Store(tmp_path / "results")


def make_todo(store: Store, folder: Path, count: int) -> list[Work]:
    todo = []
    for seed in range(count):
        store.plan("f", seed, "cell", {}, {})
        product = folder / f"{seed}.json"
        todo.append(
            Work("f", seed, "cell", (Step("s", ("x",), product),), folder / str(seed),
                 lambda seed=seed: {"knn": float(seed)})
        )  # fmt: skip
    return todo


def done(job: CommandJob) -> dict:
    return finished(job.steps[0].product, {})


def test_all_is_worked_off_in_order_and_never_too_many_at_once(store, tmp_path) -> None:
    executor = StubExecutor(done, polls=2)
    outcome = Scheduler(store, executor, Limits(parallel=3), tmp_path).run(
        make_todo(store, tmp_path, 7)
    )
    assert (outcome.num_finished, outcome.reason, executor.most_at_once) == (7, "", 3)
    assert [int(h.job.folder.name) for h in executor.handles] == list(range(7))
    assert [row.metrics["knn"] for row in store.rows()] == list(range(7))
    assert all(row.seconds == 1.0 for row in store.rows())


def test_failures_are_bounded(store, tmp_path) -> None:
    executor = StubExecutor(lambda job: {"status": "failed", "error": "no memory"})
    outcome = Scheduler(store, executor, Limits(max_failures=2), tmp_path).run(
        make_todo(store, tmp_path, 9)
    )
    assert (outcome.num_failed, outcome.reason) == (3, "more than 2 cells failed")
    rows = store.rows()
    assert [row.status for row in rows] == ["failed"] * 3 + ["planned"] * 6
    assert rows[0].error == "no memory"


def test_a_cell_without_figures_has_failed(store, tmp_path) -> None:
    def missing() -> dict[str, float]:
        raise ValueError("knn: no figure")

    (work,) = make_todo(store, tmp_path, 1)
    work = Work(work.fingerprint, 0, "cell", work.steps, work.folder, missing)
    Scheduler(store, StubExecutor(done), Limits(max_failures=5), tmp_path).run([work])
    assert (store.rows()[0].status, store.rows()[0].error) == ("failed", "knn: no figure")


def test_running_cells_save_before_the_deadline(store, tmp_path) -> None:
    executor = StubExecutor(done, polls=10**6)
    deadline = time.monotonic() + SAVE_SECONDS + 0.3
    limits = Limits(parallel=2, deadline=deadline)
    outcome = Scheduler(store, executor, limits, tmp_path).run(make_todo(store, tmp_path, 5))
    assert time.monotonic() < deadline
    assert (outcome.num_stopped, outcome.reason) == (2, "time is up")
    assert [row.status for row in store.rows()] == ["stopped"] * 2 + ["planned"] * 3


def test_a_signal_stops_like_the_deadline(store, tmp_path) -> None:
    asked = iter(["", "", "stopped by SIGINT"])
    executor = StubExecutor(done, polls=10**6)
    scheduler = Scheduler(store, executor, Limits(), tmp_path, stop_requested=lambda: next(asked))
    outcome = scheduler.run(make_todo(store, tmp_path, 3))
    assert (outcome.reason, outcome.num_stopped) == ("stopped by SIGINT", 1)
