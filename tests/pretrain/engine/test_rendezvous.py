"""Processes that meet: none may be missing, and a group that died does not count."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from pretrain import collectives as dist

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "1/2 clients joined"), (1, "could not form the group at 127.0.0.1:")]
)
def test_missing_process_is_told_with_rank_and_address(monkeypatch, rank, message):
    with socket.socket() as bound:  # a port that is free, and where nobody listens
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank,
              "WORLD_SIZE": 2}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=rf"rank {rank} of 2 on .*{message}"):
        dist.start("cpu", 0.2)
    assert not dist.is_on()


def test_lacking_variables_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="environment variable RANK expected, but not set"):
        dist.start("cpu")


RESTARTED = """
import os, signal, sys, time
import torch
from pretrain import collectives as dist

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt and rank == int(sys.argv[1]):
    time.sleep(3)  # the other one looks for its address meanwhile
dist.start("cpu")
found = int(dist.total(torch.tensor(rank + 1.0)))
open(f"{sys.argv[2]}/{attempt}-{rank}", "w").write(str(found))
if not attempt:
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.total(torch.ones(1))
dist.stop()
"""


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("late", [0, 1])
def test_job_whose_process_was_killed_meets_again(tmp_path, late):
    """Else the quicker process would dial the dead one's address until Gloo gives up."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
        "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.2", str(script), str(late),
        str(tmp_path),
    ]  # fmt: skip
    variables = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.name: path.read_text() for path in tmp_path.glob("[01]-[01]")}
    assert found == {f"{attempt}-{rank}": "3" for attempt in (0, 1) for rank in (0, 1)}
