"""Packing in tasks through submitit, here and on a cluster."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import submitit
import submitit.core.core

from common.errors import RunFailed
from common.files import lock_file, write_json
from pretrain.data import pack
from pretrain.data.pack import (
    PARTS,
    Cluster,
    ShardOptions,
    ShareOfShards,
    make_plan,
    only_writer,
    run_tasks,
    write_shards,
)
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import contents, sources, write_pictures
from tools import make_shards

ROOT = Path(__file__).parents[3]
TEN = ShardOptions(max_samples_per_shard=10)
TEN_EACH = ["--max-samples-per-shard", "10"]
LABELS = ("--labels", "folders")
TWO = ["--submitit", "local", "--num-tasks", "2"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)


@pytest.fixture(scope="module")
def one_process(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The set as one process makes it."""
    out = tmp_path_factory.mktemp("one")
    write_shards(sources(picture_folder), out, options=TEN, classes=["class-0", "class-1"])
    return contents(out)


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def is_held(lock: Path) -> bool:
    with open(lock, "r+b") as stream:
        return not lock_file(stream, lock.parent)


@pytest.mark.slow
def test_killed_command_and_killed_task(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Tasks outlive their command; another one is refused until they have ended, then goes on."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_pictures(source, 600)
    words = [str(source), str(out), *TEN_EACH, *LABELS]
    script = [sys.executable, "-m", "tools.make_shards"]
    with open(os.devnull, "w") as null:
        command = subprocess.Popen([*script, *words, *TWO], stdout=null, stderr=null, cwd=ROOT)
    tasks = out / PARTS / "tasks"
    until(lambda: list((out / PARTS).glob("shard-*.json")))
    holders = Path("/proc").glob("[0-9]*/cmdline")
    own = [path for path in holders if str(tasks).encode() in path.read_bytes()]
    groups = [int(path.parent.name) for path in own]
    for process in groups:
        os.kill(process, signal.SIGSTOP)
    command.kill()
    command.wait()
    try:
        assert make_shards.main([*words, *TWO]) == 2
        assert "tasks of an earlier command are still writing here" in capsys.readouterr().err
    finally:
        for process in groups:
            os.kill(process, signal.SIGKILL)
    until(lambda: not is_held(out / PARTS / "tasks.lock"))
    assert not (out / "index.json").exists()
    assert make_shards.main([*words, "--num-workers", "1"]) == 0
    assert re.search(r"\(\d+ shards were finished before\)", capsys.readouterr().out)
    whole = tmp_path / "whole"
    write_shards(sources(source), whole, options=TEN, classes=["class-0", "class-1"])
    assert contents(out) == contents(whole)


def test_tasks_make_the_same_and_tell_of_a_bad_picture(tmp_path, capsys):
    files = write_pictures(tmp_path / "in", 20)
    files[4].write_bytes(b"no picture")
    out = tmp_path / "out"
    words = [str(tmp_path / "in"), str(out), *TEN_EACH]
    assert make_shards.main([*words, *TWO]) == 1
    said = capsys.readouterr().err
    assert re.search(r"task [12] of 2 \(job \d+\): 1 pictures cannot be used", said)
    (log,) = re.findall(r"log: (.*)", said)
    assert Path(log).is_file()
    assert "picture-004.jpg: " in said
    assert "the same command goes on" in said
    assert make_shards.main([*words, *TWO, "--max-bad", "1"]) == 0
    assert "(1 shards were finished before)" in capsys.readouterr().out
    assert ShardIndex.open(out).num_samples == 19


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_cancels_the_tasks(tmp_path, monkeypatch):
    """A shard for each of many pictures: the tasks are not done before they are cancelled."""
    num, out = 400, tmp_path / "out"
    write_pictures(tmp_path / "in", num)

    def interrupt(seconds: float) -> None:
        until(lambda: list((out / PARTS / "tasks").glob("*_log.out")))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack, "time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
        with pytest.raises(KeyboardInterrupt):
            write_shards(
                sources(tmp_path / "in"), out, options=ShardOptions(max_samples_per_shard=1),
                cluster=Cluster("local", 2),
            )  # fmt: skip
    until(lambda: not is_held(out / PARTS / "tasks.lock"))
    time.sleep(0.5)
    assert len(list(out.glob("*.tar"))) < num, "the tasks went on"


@pytest.fixture
def begun(picture_folder: Path, tmp_path: Path) -> Iterator[ShareOfShards]:
    """One task's share of a run that has begun and that tasks may join."""
    (tmp_path / PARTS).mkdir()
    write_json(tmp_path / PARTS / "plan.json", {"fingerprint": "f", "run": "this-run"})
    with only_writer(tmp_path):
        (tmp_path / PARTS / "tasks.lock").touch()
        plans = make_plan(sources(picture_folder), TEN)
        yield ShareOfShards(tmp_path, "this-run", plans, TEN, max_bad=0, num_workers=1)


def test_task_makes_what_is_missing_and_no_more(begun: ShareOfShards) -> None:
    made = begun.checkpoint().result()  # as submitit queues it again when its time is up
    assert sorted(part.shard["name"] for part in made) == [plan.name for plan in begun.plans]
    tars = sorted(begun.folder.glob("*.tar"))
    before = [tar.stat().st_mtime_ns for tar in tars]
    tars[1].unlink()
    assert len(begun()) == 4
    after = [tar.stat().st_mtime_ns for tar in tars]
    assert [b == a for b, a in zip(before, after, strict=True)] == [True, False, True, True]


def test_late_task_of_a_run_that_was_replaced_ends(begun: ShareOfShards) -> None:
    write_json(begun.folder / PARTS / "plan.json", {"fingerprint": "f", "run": "another-run"})
    assert "has ended or was replaced" in str(begun())
    (begun.folder / PARTS / "plan.json").unlink()
    (begun.folder / PARTS / "tasks.lock").unlink()
    assert "has ended or was replaced" in str(begun())
    assert not list(begun.folder.glob("*.tar"))
    assert not list((begun.folder / PARTS).iterdir())


def test_failed_task_shows_its_last_words(begun: ShareOfShards) -> None:
    (begun.folder / "shard-000002.tar").mkdir()  # the rename of a finished tar fails
    parts = run_tasks(Cluster("local", 2), begun)
    with pytest.raises(RunFailed, match=r"(?s)task 2 of 2.*\[Errno 21\] Is a directory.*log: /"):
        list(parts)


class FakeExecutor:
    """submitit's executor for a cluster that does its tasks at once, and loses the second one."""

    asked: ClassVar[list[dict]] = []
    is_lost: ClassVar[bool] = True

    def __init__(self, folder: Path, cluster: str) -> None:
        self.folder, self.cluster = folder, cluster

    def update_parameters(self, **parameters: object) -> None:
        self.asked.append({"cluster": self.cluster, **parameters})

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, share: ShareOfShards) -> SimpleNamespace:
        self.is_second = hasattr(self, "is_second")
        lost = RuntimeError("lost") if self.is_second and self.is_lost else None
        return SimpleNamespace(
            job_id="77", state="NODE_FAIL", paths=SimpleNamespace(stderr=self.folder / "77.err"),
            done=lambda: True, exception=lambda: lost, result=share,
        )  # fmt: skip


SLURM = ["--submitit", "slurm", "--num-tasks", "2", "--slurm-partition", "cpu", "--num-workers",
         "2", "--slurm-time-minutes", "33", "--slurm-mem-gb", "4", "--slurm-option",
         "account=vision lab"]  # fmt: skip


def test_cluster_loses_a_task_and_makes_it_at_the_next_command(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    one_process: dict[str, bytes], capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(submitit, "AutoExecutor", FakeExecutor)
    words = [str(picture_folder), str(tmp_path / "out"), *TEN_EACH, *LABELS, *SLURM]
    assert make_shards.main(words) == 1
    said = capsys.readouterr().err
    assert "task 2 of 2 (job 77): was killed or failed (state NODE_FAIL)\n  log: /" in said
    assert FakeExecutor.asked == [{
        "cluster": "slurm", "name": "make_shards", "timeout_min": 33, "cpus_per_task": 2,
        "mem_gb": 4.0, "slurm_partition": "cpu",
        "slurm_additional_parameters": {"account": "vision lab"},
    }]  # fmt: skip
    monkeypatch.setattr(FakeExecutor, "is_lost", False)
    assert make_shards.main(words) == 0
    assert "(2 shards were finished before)" in capsys.readouterr().out
    assert contents(tmp_path / "out") == one_process


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--submitit", "local"], "--submitit local needs --num-tasks N"),
        (["--num-tasks", "2"], "--num-tasks needs --submitit local or slurm"),
        ([*TWO, "--slurm-time-minutes", "9"], "--slurm-time-minutes needs --submitit slurm"),
        (["--submitit", "local", "--num-tasks", "0"], "cluster.num_tasks must be >= 1, got 0"),
        ([*SLURM, "--slurm-time-minutes", "0"], "cluster.time_minutes must be >= 1, got 0"),
    ],
)
def test_wrong_options(picture_folder, tmp_path, words, message, capsys):
    assert make_shards.main([str(picture_folder), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_packing_imports_neither_submitit_nor_torch() -> None:
    """Each worker process would pay for them."""
    code = "import sys, tools.make_shards; print({'submitit', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr
