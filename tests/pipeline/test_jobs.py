"""A stage as a job of a cluster: stopped when asked, queued by the runner, reported when killed."""

import argparse
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import RunFailed, UserError
from common.files import lock_file, read_json, unlock
from pipeline.experiment import add_run_options, limits_of
from pipeline.jobs import ClusterJob, CommandJob, SlurmSettings
from pipeline.plan import Stage
from pipeline.run import Limits, Progress, Runner


def job(tmp_path: Path, code: str) -> CommandJob:
    command = (sys.executable, "-S", "-c", "import signal, sys, time\n" + code)
    return CommandJob(command, tmp_path, tmp_path / "x.log", tmp_path / "x.json")


@pytest.mark.parametrize(
    ("code", "status"), [("", 0), ("sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_how_a_command_ended(tmp_path: Path, code: str, status: int) -> None:
    one = job(tmp_path, "print('said')\n" + code)
    one()
    assert read_json(one.result)["exit_status"] == status


def test_a_request_to_stop_lets_the_command_save(tmp_path: Path) -> None:
    """The command gets SIGTERM, saves, and goes on from there at the next attempt."""
    state = tmp_path / "state"
    code = (
        f"from pathlib import Path; state = Path({str(state)!r})\n"
        "def save(*_): state.write_text('half'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "if state.exists(): state.write_text('whole'); sys.exit()\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    one = job(tmp_path, code)

    def ask() -> None:
        while not (one.log.exists() and "ready" in one.log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    one()
    assert read_json(one.result)["exit_status"] == 143
    assert signal.getsignal(signal.SIGTERM) is before
    job(tmp_path, code)()
    assert state.read_text() == "whole"


def test_an_attempt_that_outlived_its_runner_ends_first(tmp_path: Path) -> None:
    """The lock is the older attempt's; the newer one waits."""
    with (tmp_path / "x.lock").open("a") as lock:
        lock_file(lock, tmp_path)

        def end() -> None:
            time.sleep(0.3)
            (tmp_path / "older").touch()
            unlock(lock)

        older = threading.Thread(target=end)
        older.start()
        one = job(
            tmp_path, f"from pathlib import Path; assert Path({str(tmp_path)!r}, 'older').exists()"
        )
        one()
        older.join()
    assert read_json(one.result)["exit_status"] == 0


class Queue:
    """Runs jobs when they are submitted; `kills` leaves no result, as a node that dies."""

    def __init__(self, *, kills: bool = False) -> None:
        self.jobs, self.kills = [], kills

    def submit(self, job: CommandJob) -> "Queue":
        self.jobs.append(job)
        if not self.kills:
            job()
        return self

    def done(self) -> bool:
        return True

    def cancel(self, check: bool) -> None:
        raise AssertionError


def stages(tmp_path: Path) -> list[Stage]:
    command = (sys.executable, "-S", "-c", "import sys; open(sys.argv[1], 'w').write('x')")
    return [
        Stage(name=name, command=(*command, str(tmp_path / "out" / name)), outputs=(name,),
              owns=(name,), resumable=name == "long")
        for name in ("short", "long")
    ]  # fmt: skip


def test_stages_that_can_resume_are_queued_and_others_run_here(tmp_path, monkeypatch) -> None:
    queue = Queue()
    monkeypatch.setattr(SlurmSettings, "submitter", lambda *_: queue)
    runner = Runner(tmp_path, tmp_path / "out", ["again"], Limits(cluster=SlurmSettings()))
    runner.run(stages(tmp_path), Progress(2, io.StringIO()))
    assert [job.command for job in queue.jobs] == [stages(tmp_path)[1].command]
    assert {r["status"] for r in runner.store.stages.values()} == {"finished"}


def test_what_runs_here_does_not_wait_for_jobs(tmp_path, monkeypatch) -> None:
    """The job ends when the stage that comes after it in the list has ended."""

    class Waiting(Queue):
        polls = 0

        def submit(self, job: CommandJob) -> Queue:
            self.jobs.append(job)
            return self

        def done(self) -> bool:
            self.polls += 1
            assert self.polls < 200, "the stage waits for the job"
            if not (tmp_path / "out/short").exists():
                return False
            self.jobs[0]()
            return True

    monkeypatch.setattr(SlurmSettings, "submitter", lambda *_: Waiting())
    runner = Runner(tmp_path, tmp_path / "out", ["again"], Limits(cluster=SlurmSettings()))
    runner.run(stages(tmp_path)[::-1], Progress(2, io.StringIO()))
    assert {r["status"] for r in runner.store.stages.values()} == {"finished"}


def test_a_job_that_left_nothing_has_failed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(SlurmSettings, "submitter", lambda *_: Queue(kills=True))
    runner = Runner(tmp_path, tmp_path / "out", ["again"], Limits(cluster=SlurmSettings()))
    with pytest.raises(RunFailed, match="stage long was ended by SIGKILL"):
        runner.run(stages(tmp_path), Progress(2, io.StringIO()))
    assert ClusterJob(Queue(), tmp_path / "none").poll() is not None


def test_what_the_command_line_asks_for() -> None:
    parser = argparse.ArgumentParser()
    add_run_options(parser, max_failures=3)
    words = ["--cluster", "slurm", "--gpus-per-run", "2", "--slurm-option", "account=x"]
    limits = limits_of(parser.parse_args(words), parallel=5, threads=1, gpus=1)
    assert limits.cluster == SlurmSettings(2, 1, 240, None, (("account", "x"),))
    assert (limits.parallel, limits.threads, limits.max_failures) == (5, 1, 3)
    limits = limits_of(parser.parse_args(["--parallel", "7", "--max-minutes", "9"]), parallel=5)
    assert (limits.parallel, limits.minutes, limits.cluster) == (7, 9.0, None)


def test_no_slurm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "SUBMITIT_PREEMPT_SIGNAL"):
        monkeypatch.setenv(name, "")  # what submitter sets is undone
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(UserError, match="submitit cannot use --cluster slurm"):
        SlurmSettings().submitter(tmp_path)
