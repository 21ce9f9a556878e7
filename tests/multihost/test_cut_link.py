"""One torchrun job on two hosts (network namespaces) over Gloo; the link is cut in the middle."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.kill_resume import identical
from tests.slurm.tiny_run import (
    ROOT,
    kill_all,
    last_step,
    run_undisturbed,
    training_processes,
    wait_until,
    write_config,
)

SCRIPT = str(Path(__file__).parent / "hosts.sh")
ENDPOINT = "10.99.0.1:29400"
PATIENCE = 900  # seconds until something that must happen
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("REQUIRE_NETNS") != "1",
        reason="makes network namespaces, as root (iproute2): asked for with REQUIRE_NETNS=1",
    ),
]


@pytest.fixture
def hosts() -> Iterator[str]:
    """Name of two hosts that are there until the test ends."""
    name = f"fa{os.getpid() % 100000}"
    tried = subprocess.run(["bash", SCRIPT, "up", name], capture_output=True, text=True)
    if tried.returncode:
        subprocess.run(["bash", SCRIPT, "down", name], check=False)
        pytest.fail(
            f"network namespaces cannot be made here (root? iproute2?): {tried.stderr.strip()}"
        )
    for host in (f"{name}-a", f"{name}-b"):  # a dead peer is noticed in seconds, not in 15 minutes
        command = ["ip", "netns", "exec", host, "sh", "-c",
                   "echo 4 > /proc/sys/net/ipv4/tcp_retries2"]  # fmt: skip
        subprocess.run(command, check=True)
    yield name
    subprocess.run(["bash", SCRIPT, "down", name], check=True)


class Node:
    """torchrun on one host, begun again when it ends before the run is complete."""

    def __init__(self, name: str, side: str, config: Path, out: Path) -> None:
        self.out, self.num_starts = out, 0
        self.log = out.parent / f"node-{side}.log"
        self.command = [
            shutil.which("ip", path=f"{os.environ['PATH']}:/sbin:/usr/sbin") or "ip",
            "netns", "exec", f"{name}-{side}", sys.executable, "-m", "torch.distributed.run",
            "--nnodes=2", "--nproc-per-node=1", "--max-restarts=20", "--monitor-interval=0.5",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={ENDPOINT}", "--rdzv-id=cut",
            f"--rdzv-conf=is_host={int(side == 'a')},keep_alive_interval=2,"
            "keep_alive_max_attempt=5,read_timeout=20",
            f"--local-addr=10.99.0.{1 if side == 'a' else 2}",
            "-m", "pretrain", str(config), f"out={out}", "--resume",
        ]  # fmt: skip
        self.environment = os.environ | {
            "GLOO_SOCKET_IFNAME": f"{name}0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        self.num_starts += 1
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log
            )

    def keep_up(self) -> bool:
        """Start again what ended too early; true while torchrun is there."""
        if self.process.poll() is None:
            return True
        if (self.out / "summary.json").exists():
            return False
        time.sleep(1)
        self.start()
        return True

    def said(self) -> str:
        return self.log.read_text()[-6000:]


def num_there(nodes: list[Node]) -> int:
    return sum([node.keep_up() for node in nodes])


def test_cut_link_ends_in_the_same_weights(hosts: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, optim={"epochs": 8})
    whole = run_undisturbed(config, tmp_path / "whole")
    out = tmp_path / "run"
    nodes = [Node(hosts, side, config, out) for side in "ab"]
    try:
        wait_until(lambda: num_there(nodes) == 2 and last_step(out) >= 10, PATIENCE, "step 10")
        trained_before = training_processes(out)
        subprocess.run(["bash", SCRIPT, "cut", hosts], check=True)
        # A side that waits to receive hears nothing at all; one that sends gives up.
        wait_until(
            lambda: num_there(nodes) and not set(trained_before) <= set(training_processes(out)),
            PATIENCE, "that a host notices the cut",
        )  # fmt: skip
        step_when_cut = last_step(out)
        for _ in range(10):  # no host trains on alone
            time.sleep(0.5)
            num_there(nodes)
        assert last_step(out) == step_when_cut < 48
        subprocess.run(["bash", SCRIPT, "mend", hosts], check=True)
        wait_until(lambda: num_there(nodes) == 0, PATIENCE, "the end")
    except AssertionError as error:
        raise AssertionError(f"{error}\n" + "\n".join(n.said() for n in nodes)) from error
    finally:
        for node in nodes:
            kill_all(node.process)
    assert last_step(out) == 48
    assert identical(whole, out)
