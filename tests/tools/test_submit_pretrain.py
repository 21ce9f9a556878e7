"""What submit_pretrain.py refuses, what it hands to torchrun, and one run through submitit."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from tests.slurm import tiny_run
from tools import submit_pretrain
from tools.submit_pretrain import TorchrunNode, node_environment, torchrun_command

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tools/submit_pretrain.py")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "run"), "data": {"batch_size": 24}}))
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=null"], "out is not set"),
        (["--tasks-per-node", "5"], "batch_size=24 cannot be divided among 1 nodes of 5"),
        (["--nodes", "4", "--min-nodes", "1", "--tasks-per-node", "3", "data.batch_size=12"],
         "divided among 3 nodes of 3"),
        (["--nodes", "3", "--min-nodes", "2", "data.batch_size=24", "optim.micro_batch_size=8",
          "optim.accumulation=cached"], "micro_batch_size=8 cannot be divided among 3 nodes of 1"),
        (["--nodes", "2", "--min-nodes", "3"], "--min-nodes 3 is above --nodes 2"),
        (["--cluster", "local", "--nodes", "2"], "--cluster local has one node"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_submitted(
    config: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert submit_pretrain.main([config, "--cluster", "slurm", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_and_no_slurm_is_reported(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert submit_pretrain.main([config, "--cluster", "slurm"]) == 2
    assert "submitit cannot submit the job" in capsys.readouterr().err
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/checkpoint.pth").touch()
    assert submit_pretrain.main([config, "--cluster", "local"]) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def test_the_command_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node needs no rendezvous with others; several meet at the first one."""
    node = TorchrunNode(("a.yaml", "out=b c", "--resume"), 1, 1, 8, 3, 77)
    command = torchrun_command(node, "77", 0, "first")
    assert {"--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=8"} <= set(command)
    assert command[-5:] == ["-m", "pretrain", "a.yaml", "out=b c", "--resume"]
    nodes = TorchrunNode(("a.yaml",), 8, 6, 8, 3, 120)
    first, other = (torchrun_command(nodes, "4077", n, "gpu-1") for n in (0, 5))
    assert {"--nnodes=6:8", "--rdzv-endpoint=gpu-1:24077", "--rdzv-id=4077"} <= set(first)
    assert set(first) ^ set(other) == {"--rdzv-conf=is_host=1", "--rdzv-conf=is_host=0"}
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = node_environment(node)
    assert environment["PYTHONPATH"] == f"{ROOT}{os.pathsep}elsewhere"
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "77"


def test_checkpoint_stops_torchrun_once_and_hands_back_the_same_work(monkeypatch):
    node = TorchrunNode(("a.yaml",), 1, 1, 1, 0, 77)
    fresh = asdict(node)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    sent = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: (sent.append(number), kill(pid, 9)))
    node._pid = child.pid
    again = node.checkpoint()
    node.checkpoint()
    assert sent == [signal.SIGINT]
    assert child.wait() == -9  # still there to be waited for
    assert asdict(again.function) == fresh


@pytest.mark.slow
def test_local_job_is_preempted_and_ends_like_a_whole_run(tmp_path: Path) -> None:
    config = tiny_run.write_config(tmp_path, optim={"epochs": 5})
    whole = tiny_run.run_undisturbed(config, tmp_path / "whole")
    out = tmp_path / "run"
    command = [sys.executable, SCRIPT, str(config), f"out={out}", "--cluster", "local",
               "--tasks-per-node", "2", "--wait"]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        tiny_run.wait_until(
            lambda: tiny_run.last_step(out) >= 10 or process.poll() is not None, 900, "step 10"
        )
        tasks = [pid for pid in tiny_run.descendants(process.pid) if is_task(pid)]
        os.kill(tasks[0], signal.SIGUSR1)
        assert process.wait(900) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    said = "".join(file.read_text() for file in (out / "submitit").glob("*_log.*"))
    assert "Calling checkpoint method" in said
    assert "stopped by" in said
    assert tiny_run.identical(whole, out)


def is_task(pid: int) -> bool:
    """Whether a process is the one in which submitit calls the node's work."""
    return b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()
