import contextlib
import fcntl
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import files as common_files
from common.errors import UserError
from common.files import write_json
from pretrain.data import pack as shard_lock
from pretrain.data.pack import (
    PARTS,
    Cluster,
    ShareOfShards,
    TaskError,
    only_writer,
    run_tasks,
    write_shards,
)
from pretrain.data.pack_plan import ShardOptions, make_plan
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import contents, sources, write_pictures
from tools import make_shards

ROOT = Path(__file__).parents[4]
TEN = ShardOptions(max_samples_per_shard=10)
THREE = ["--submitit", "local", "--num-tasks", "3"]


def command(source: Path, out: Path, *words: str) -> list[str]:
    script = str(ROOT / "tools/make_shards.py")
    return [sys.executable, script, str(source), str(out), "--max-samples-per-shard", "10", *words]


def children(parent: int) -> list[int]:
    """Processes whose parent is `parent`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def task_in_the_middle(out: Path, process: subprocess.Popen) -> int:
    """Process of a task that has made two shards and has more to make."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        for log in (out / PARTS / "tasks").glob("*_0_log.out"):
            if log.read_text().count(" samples") >= 2:
                for task in children(int(log.name.split("_")[0])):
                    return task
        time.sleep(0.002)
    raise AssertionError(f"no task was seen at work; the command ended with {process.poll()}")


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_pictures(folder, 900)
    return folder


@pytest.fixture(scope="module")
def one_process(many_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The set as one process makes it."""
    out = tmp_path_factory.mktemp("one")
    classes = ["class-0", "class-1"]
    write_shards(sources(many_pictures), out, options=TEN, classes=classes)
    return contents(out)


def test_killed_task_and_the_same_command_again(
    many_pictures: Path, one_process: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(many_pictures, out, *THREE)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.kill(task_in_the_middle(out, process), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "of 3 (job " in said
    assert "of 30 shards missing: was killed, or never ran" in said
    (log,) = [line.split("log: ")[1] for line in said.splitlines() if "log: " in line]
    assert Path(log).is_file()
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert not (out / "index.json").exists()
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "were finished before" in again.stdout
    assert contents(out) == one_process


def test_killed_command_leaves_tasks_that_are_waited_for(
    many_pictures: Path, one_process: dict[str, bytes], tmp_path: Path
) -> None:
    """Tasks outlive their command; another one is refused until they have ended, then goes on."""
    out = tmp_path / "out"
    words = command(many_pictures, out, *THREE)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    task = task_in_the_middle(out, process)
    os.kill(task, signal.SIGSTOP)
    process.kill()
    process.wait()
    try:
        refused = subprocess.run(words, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "tasks of an earlier command are still writing here" in refused.stderr
    finally:
        os.kill(task, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while is_held(out / PARTS / "tasks.lock") and time.monotonic() < deadline:
        time.sleep(0.05)
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    kept = re.search(r"\((\d+) shards were finished before\)", again.stdout)
    assert kept is not None
    assert int(kept[1]) >= 30  # the whole share of the task that had been stopped
    assert contents(out) == one_process


def is_held(lock: Path) -> bool:
    with open(lock, "r+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_bad_picture_in_a_task_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = write_pictures(tmp_path / "in", 20)
    files[4].write_bytes(b"no picture")
    out = tmp_path / "out"
    words = [str(tmp_path / "in"), str(out), "--max-samples-per-shard", "10"]
    words += ["--submitit", "local", "--num-tasks", "5"]
    assert make_shards.main(words) == 1
    said = capsys.readouterr().err
    assert "task 1 of 2" in said or "task 2 of 2" in said
    assert "picture-004.jpg: " in said
    assert "--max-bad N" in said
    assert make_shards.main([*words, "--max-bad", "1"]) == 0
    assert ShardIndex.open(out).num_samples == 19


# -- locks ----------------------------------------------------------------------------------------


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
    assert begun() is None
    tars = sorted(begun.folder.glob("*.tar"))
    assert len(tars) == 4
    before = [tar.stat().st_mtime_ns for tar in tars]
    tars[1].unlink()
    assert begun() is None
    after = [tar.stat().st_mtime_ns for tar in tars]
    assert [b == a for b, a in zip(before, after, strict=True)] == [True, False, True, True]


def test_task_that_submitit_queues_again_goes_on(begun: ShareOfShards) -> None:
    again = begun.checkpoint()
    assert again.function is begun
    assert again.result() is None


def test_late_task_of_a_run_that_was_replaced_ends(begun: ShareOfShards) -> None:
    write_json(begun.folder / PARTS / "plan.json", {"fingerprint": "f", "run": "another-run"})
    assert "has ended or was replaced" in str(begun())
    (begun.folder / PARTS / "plan.json").unlink()
    (begun.folder / PARTS / "tasks.lock").unlink()
    assert "has ended or was replaced" in str(begun())
    assert not list(begun.folder.glob("*.tar"))
    assert not list((begun.folder / PARTS).iterdir())


def test_command_waits_a_little_for_tasks_then_refuses(
    begun: ShareOfShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_lock, "_PATIENCE_SECONDS", 0.3)
    with shard_lock.shared_with_tasks(begun.folder, "this-run"):
        (begun.folder / ".lock").unlink()  # as if its command were dead
        with (
            pytest.raises(UserError, match="tasks of an earlier command are still writing"),
            only_writer(begun.folder),
        ):
            pass
    with only_writer(begun.folder):
        assert not is_held(begun.folder / PARTS / "tasks.lock")


def test_lock_file_that_was_taken_away_is_not_trusted(tmp_path: Path) -> None:
    """Who opened the file just before its holder removed it must not hold a lock nobody sees."""
    with only_writer(tmp_path):
        held = os.stat(tmp_path / ".lock").st_ino
    with only_writer(tmp_path):
        assert (tmp_path / ".lock").exists()
        with pytest.raises(UserError, match="another run is writing"), only_writer(tmp_path):
            pass
        assert (tmp_path / ".lock").exists(), f"inode {held} before"
    assert not (tmp_path / ".lock").exists()


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(common_files.fcntl, "flock", refuse)
    with pytest.raises(UserError, match="its file system offers no locks"), only_writer(tmp_path):
        pass


# -- what the cluster is asked --------------------------------------------------------------------

FAKE_SLURM = {
    "sbatch": """
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
open(os.environ["FAKE_SLURM"] + "/asked", "w").write(text)
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", text).groups())
for task in range(first, last + 1):
    ids = {"SLURM_JOB_ID": f"77{task}", "SLURM_ARRAY_JOB_ID": "77", "SLURM_NTASKS": "1"}
    ids |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}
    ids |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node0"}
    null = subprocess.DEVNULL
    subprocess.Popen(["bash", sys.argv[1]], env=os.environ | ids, stdout=null, stderr=null)
print("Submitted batch job 77")
""",
    "srun": """
import os, subprocess, sys
words = sys.argv[1:]
names = {}
while words[0].startswith("--"):
    word = words.pop(0)
    if word in ("--output", "--error"):
        names[word] = words.pop(0)
def log(name):
    for code, key in (("%A", "SLURM_ARRAY_JOB_ID"), ("%a", "SLURM_ARRAY_TASK_ID")):
        name = name.replace(code, os.environ[key])
    return open(name.replace("%t", "0"), "a")
task = os.environ["SLURM_ARRAY_TASK_ID"]
if task != os.environ.get("FAKE_LOST_TASK"):
    subprocess.run(words, stdout=log(names["--output"]), stderr=log(names["--error"]))
open(os.environ["FAKE_SLURM"] + f"/ended-{task}", "w").close()
""",
    "sacct": """
import os
print("JobID|State|NodeList")
for task in range(2):
    ended = os.path.exists(os.environ["FAKE_SLURM"] + f"/ended-{task}")
    print(f"77_{task}|{'NODE_FAIL' if ended else 'RUNNING'}|node0")
""",
    "scancel": "",
}


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands by Slurm's names that run the tasks of an array here."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in FAKE_SLURM.items():
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


SLURM = ["--submitit", "slurm", "--num-tasks", "2", "--slurm-partition", "cpu", "--num-workers",
         "2", "--slurm-time-minutes", "33", "--slurm-mem-gb", "4", "--slurm-option",
         "account=vision lab"]  # fmt: skip


def test_slurm_is_asked_through_sbatch(
    picture_folder: Path, tmp_path: Path, fake_slurm: Path
) -> None:
    done = subprocess.run(
        command(picture_folder, tmp_path / "out", *SLURM), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "40 samples in 4 shards" in done.stdout
    lines = (fake_slurm / "asked").read_text().splitlines()
    for line in ("--partition=cpu", "--time=33", "--mem=4GB", "--cpus-per-task=2",
                 "--account='vision lab'", "--array=0-1%2"):  # fmt: skip
        assert f"#SBATCH {line}" in lines
    classes = ["class-0", "class-1"]
    write_shards(sources(picture_folder), tmp_path / "one", options=TEN, classes=classes)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_task_that_slurm_lost_is_told(
    picture_folder: Path, tmp_path: Path, fake_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LOST_TASK", "1")
    words = command(picture_folder, tmp_path / "out", *SLURM)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "task 2 of 2 (job 77_1), 2 of 2 shards missing: was killed, or never ran" in done.stderr
    assert "state NODE_FAIL" in done.stderr
    monkeypatch.delenv("FAKE_LOST_TASK")
    for mark in fake_slurm.glob("ended-*"):
        mark.unlink()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(2 shards were finished before)" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--submitit", "local"], "--submitit local needs --num-tasks N"),
        (["--num-tasks", "2"], "--num-tasks needs --submitit local or slurm"),
        (["--slurm-partition", "cpu"], "--slurm-partition needs --submitit slurm"),
        ([*THREE, "--slurm-time-minutes", "9"], "--slurm-time-minutes needs --submitit slurm"),
        (["--submitit", "local", "--num-tasks", "0"], "0 tasks: must be at least 1"),
        ([*SLURM, "--slurm-time-minutes", "0"], "0 minutes per task"),
    ],
)
def test_wrong_options(
    picture_folder: Path, tmp_path: Path, words: list[str], message: str,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    assert make_shards.main([str(picture_folder), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_no_slurm_here(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cluster = Cluster("slurm", 2)
    with pytest.raises(UserError, match=r"submitit cannot start tasks: .*srun"):
        write_shards(sources(picture_folder), tmp_path / "out", options=TEN, cluster=cluster)


def test_failed_task_shows_its_last_words(begun: ShareOfShards) -> None:
    (begun.folder / "shard-000002.tar").mkdir()  # the rename of a finished tar fails
    jobs = run_tasks(
        Cluster("local", 2), "this-run", list(begun.plans), 1, begun.folder, TEN, 0
    )  # fmt: skip
    with pytest.raises(TaskError, match=r"(?s)task 2 of 2.*\[Errno 21\] Is a directory.*log: /"):
        list(jobs)


def test_packing_imports_neither_submitit_nor_torch() -> None:
    """Each worker process would pay for them."""
    code = "import sys, tools.make_shards; print({'submitit', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """Processes started here hear SIGINT, even where this one was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_cancels_the_tasks(
    many_pictures: Path, one_process: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path
    for attempt in range(5):  # the tasks may be done before the signal arrives
        out = tmp_path / f"out-{attempt}"
        words = command(many_pictures, out, *THREE)
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        task = task_in_the_middle(out, process)
        with contextlib.suppress(ProcessLookupError):
            os.kill(task, signal.SIGSTOP)  # so that it is not done before the command has seen it
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            os.kill(task, signal.SIGCONT)
        _, said = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert process.returncode == 130
    assert "stopped; the same command goes on" in said
    num_made = len(list(out.glob("shard-*.tar")))
    deadline = time.monotonic() + 20
    while is_held(out / PARTS / "tasks.lock") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(out.glob("shard-*.tar"))) <= num_made + 3, "the tasks went on"
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert contents(out) == one_process
