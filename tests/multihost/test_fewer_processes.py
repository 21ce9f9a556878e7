"""A process that is gone for good: torchrun goes on with the one that is left."""

import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill_resume import BATCH, read_rows
from tests.slurm.tiny_run import (
    ROOT,
    STEPS_PER_EPOCH,
    kill_all,
    last_step,
    wait_until,
    write_config,
)

EPOCHS = 8
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("REQUIRE_NETNS") != "1",
        reason="takes minutes and an idle machine: asked for with REQUIRE_NETNS=1",
    ),
]


def start(number: int, port: int, config: Path, out: Path) -> subprocess.Popen:
    """torchrun of one process; one or two of them make the job. Number 0 holds the rendezvous."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1",
        "--max-restarts=3", "--monitor-interval=0.5", "--rdzv-backend=c10d", "--rdzv-id=fewer",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
        f"--rdzv-conf=is_host={int(number == 0)},last_call_timeout=10,keep_alive_interval=1",
        str(Path(__file__).parent / "recorded_run.py"), f"{out}-{number}.jsonl",
        str(config), f"out={out}", "--resume",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(f"{out}-{number}.log", "w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def global_batches(out: Path) -> tuple[dict[tuple[int, int], list[int]], set[int]]:
    """Samples of each (epoch, step) in rank order, and the numbers of processes that were seen.

    A step that was run again, after a restart, must have had the same samples.
    """
    parts: dict[tuple[int, int, int], dict[int, list[int]]] = {}
    for number in range(2):
        for line in Path(f"{out}-{number}.jsonl").read_text().splitlines():
            row = json.loads(line)
            key = (row["epoch"], row["step"], row["world_size"])
            known = parts.setdefault(key, {}).setdefault(row["rank"], row["samples"])
            assert known == row["samples"], key
    batches: dict[tuple[int, int], list[int]] = {}
    for (epoch, step, world_size), ranks in sorted(parts.items()):
        if len(ranks) == world_size:  # else the job ended before the other process got there
            samples = [sample for rank in range(world_size) for sample in ranks[rank]]
            assert batches.setdefault((epoch, step), samples) == samples, (epoch, step)
    return batches, {world_size for _, _, world_size in parts}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_rows(out / "metrics.jsonl") if row["kind"] == "train"]


def test_one_of_two_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    config = write_config(tmp_path, optim={"epochs": EPOCHS})
    whole, fewer = tmp_path / "whole", tmp_path / "fewer"
    jobs: list[subprocess.Popen] = []
    try:
        port = free_port()
        jobs = [start(number, port, config, whole) for number in range(2)]
        assert [job.wait(180) for job in jobs] == [0, 0], Path(f"{whole}-0.log").read_text()[-4000:]
        port = free_port()
        jobs = [start(number, port, config, fewer) for number in range(2)]
        wait_until(lambda: last_step(fewer) >= 2 * STEPS_PER_EPOCH, 180, "the second epoch")
        kill_all(jobs[1])
        assert jobs[0].wait(240) == 0, Path(f"{fewer}-0.log").read_text()[-4000:]
    finally:
        for job in jobs:
            kill_all(job)
    expected, whole_sizes = global_batches(whole)
    found, fewer_sizes = global_batches(fewer)
    assert (whole_sizes, fewer_sizes) == ({2}, {1, 2})
    assert len(expected) == EPOCHS * STEPS_PER_EPOCH
    assert all(len(samples) == BATCH for samples in expected.values())
    assert found == expected
    ends = [statistics.mean(losses(out)[-STEPS_PER_EPOCH:]) for out in (whole, fewer)]
    start_loss = losses(whole)[0]
    # Batch norm now sees 16 samples where it saw 8: near, not equal.
    assert abs(ends[0] - ends[1]) < 0.2 * (start_loss - ends[0])
