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
        ("pass", "bad: exit status 0 without bad.done: no output"),
        ("import os; os.kill(os.getpid(), 9)", "bad: exit status -9: no output"),
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
