"""Runs on a real SLURM of this machine: preempted, requeued, out of time, robbed of a process."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretrain.data.picture_helpers import pack_pictures
from tests.slurm.tiny_run import (
    ROOT,
    identical,
    last_step,
    run_undisturbed,
    training_processes,
    wait_until,
    write_config,
)

HERE = Path(__file__).parent
TWO_PROCESSES = ("--tasks-per-node", "2", "--cpus-per-node", "2")
TWO_NODES = ("--nodes", "2", "--cpus-per-node", "2")
EPOCHS = 7  # of 6 steps
PATIENCE = 900  # seconds until something that must happen

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("REQUIRE_SLURM") != "1",
        reason="starts a SLURM, as root (apt-get install slurm-wlm munge): asked for with "
        "REQUIRE_SLURM=1",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that talk to a SLURM of two nodes, for as long as it lives."""
    folder = tmp_path_factory.mktemp("slurm")
    script = [str(folder)]
    with open(folder / "start.log", "w") as log:  # daemons would hold a pipe open
        begun = subprocess.run(["bash", str(HERE / "start.sh"), *script], stdout=log, stderr=log)
    assert begun.returncode == 0, (folder / "start.log").read_text()
    yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", str(HERE / "stop.sh"), *script], check=True, timeout=60)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), optim={"epochs": EPOCHS})


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    return run_undisturbed(config, config.parent / "whole")


class Submitted:
    """`submit_pretrain.py --wait` at work."""

    def __init__(self, cluster: dict[str, str], config: Path, out: Path, *words: str) -> None:
        self.cluster, self.out = cluster, out
        command = [
            sys.executable, str(ROOT / "tools/submit_pretrain.py"), str(config), f"out={out}",
            "--cluster", "slurm", "--partition", "test", "--wait", *words,
        ]  # fmt: skip
        self.log = out.with_suffix(".log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, env=cluster, stdout=log, stderr=log)
        wait_until(
            lambda: "submitted" in self.said() or self.process.poll(), PATIENCE, "submission"
        )
        number = re.search(r"job (\d+) submitted", self.said())
        assert number is not None, self.said()
        self.job = number[1]

    def __enter__(self) -> "Submitted":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        subprocess.run(["scancel", self.job], env=self.cluster, capture_output=True, check=False)

    def said(self) -> str:
        return self.log.read_text()

    def slurm(self, *words: str) -> str:
        done = subprocess.run(words, env=self.cluster, capture_output=True, text=True, check=True)
        return done.stdout

    def restarts(self) -> int:
        return int(re.search(r"Restarts=(\d+)", self.slurm("scontrol", "show", "job", self.job))[1])

    def reach(self, step: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.logs()
            return last_step(self.out) >= step

        wait_until(there, PATIENCE, f"step {step}")

    def finish(self) -> None:
        """The end of the job, its way back through the queue included."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = f"no end within {PATIENCE} s"
        assert status == 0, f"{status}\n{self.slurm('squeue', '--long')}\n{self.logs()}"
        assert (self.out / "summary.json").exists()

    def logs(self) -> str:
        """What the command and all tasks said; progress bars are left out."""
        files = [self.log, *sorted((self.out / "submitit").glob("*_log.*"))]
        lines = [line for file in files for line in re.split("[\r\n]+", file.read_text())]
        return "\n".join(re.sub("^pretrain: .*?]", "", line) for line in lines)


def test_signalled_job_is_queued_again_and_cancelled_it_goes_on_by_the_same_command(
    cluster: dict[str, str], config: Path, whole: Path, tmp_path: Path
) -> None:
    with Submitted(cluster, config, tmp_path / "run", *TWO_PROCESSES) as job:
        job.reach(8)
        job.slurm("scancel", "--signal=USR1", job.job)
        wait_until(lambda: job.restarts() == 1, PATIENCE, "the way back into the queue")
        told = [line for line in job.logs().splitlines() if "stopped by" in line]
        saved_after = {int(re.search(r"after step (\d+)", line)[1]) for line in told}
        assert len(saved_after) == 1  # both processes agreed, and lost no step
        assert 8 <= min(saved_after) < last_step(whole)
        job.reach(min(saved_after) + 2)
        job.slurm("scancel", job.job)
        wait_until(lambda: not training_processes(job.out), PATIENCE, "the end of the processes")
    assert job.logs().count("stopped by") > len(told)
    with Submitted(cluster, config, job.out, *TWO_PROCESSES, "--resume") as again:
        again.finish()
    assert identical(whole, job.out)


def test_requeued_job_of_two_nodes_ends_like_a_whole_run(cluster, config, whole, tmp_path):
    """`scontrol requeue` does what SLURM does to a job that makes room: SIGTERM, then SIGKILL."""
    with Submitted(cluster, config, tmp_path / "run", *TWO_NODES) as job:
        job.reach(10)
        job.slurm("scontrol", "requeue", job.job)
        job.finish()
    assert job.restarts() == 1
    assert "stopped by" in job.logs()
    assert identical(whole, job.out)


def test_shards_made_in_tasks_equal_those_made_here(cluster, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pack_pictures(pictures, 96)
    script = [sys.executable, str(ROOT / "tools/make_shards.py"), str(pictures)]
    options = ["--labels", "none", "--max-samples-per-shard", "7"]
    slurm = ["--submitit", "slurm", "--num-tasks", "3", "--slurm-partition", "test",
             "--slurm-time-minutes", "5"]  # fmt: skip
    sets = []
    for name, more in (("here", []), ("tasks", slurm)):
        command = [*script, str(tmp_path / name), *options, *more]
        done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        sets.append({str(f.relative_to(tmp_path / name)): f.read_bytes() for f in files})
    assert sum(name.endswith(".tar") for name in sets[0]) == 14
    assert sets[0] == sets[1]
