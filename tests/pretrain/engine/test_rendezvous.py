"""Processes that meet: none may be missing, and what a dead group left behind does not count."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from common.errors import UserError
from pretrain import collectives as dist
from pretrain.engine.rendezvous import group_store, start

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stores():
    """A function that gives a new client of one store, as each process of a job has."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    patience = timedelta(seconds=20)

    def client():
        return TCPStore(
            "127.0.0.1", server.port, is_master=False, timeout=patience, wait_for_workers=False
        )

    return client


def meet(stores, world_size, late=()):
    """The group's own part of the store, as each rank has it; ranks in `late` come 0.3 s later."""

    def one(rank):
        time.sleep(0.3 * (rank in late))
        return group_store(stores(), rank, world_size, 15, f"rank {rank}")

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


@pytest.mark.parametrize("late", [(), (0,), (1,), (1, 2)])
def test_group_that_meets_anew_sees_nothing_of_the_one_before(stores, late):
    first = meet(stores, 3)
    for rank, store in enumerate(first):
        store.set(f"address of {rank}", f"first {rank}")
    assert first[0].get("address of 2") == b"first 2"
    again = meet(stores, 3, late)
    assert not again[0].check(["address of 2"])
    again[1].set("address of 1", "again 1")
    assert [store.get("address of 1") for store in again] == [b"again 1"] * 3
    assert first[2].get("address of 1") == b"first 1"


def test_group_may_grow_and_shrink(stores):
    for world_size in (2, 4, 1, 3):
        found = meet(stores, world_size)
        found[0].set("key", str(world_size))
        assert {store.get("key") for store in found} == {str(world_size).encode()}


def test_missing_rank_is_named(stores):
    meet(stores, 4)  # its answers are no answers to the next call
    with ThreadPoolExecutor(1) as pool:
        present = pool.submit(group_store, stores(), 2, 4, 1, "rank 2 of 4")
        with pytest.raises(UserError, match="rank 0 of 4: rank 1, 3 did not answer within 1 s"):
            group_store(stores(), 0, 4, 1, "rank 0 of 4")
        with pytest.raises(UserError, match="rank 2 of 4: rank 0 did not answer"):
            present.result()


def test_absent_first_rank_is_named(stores):
    meet(stores, 2)
    with pytest.raises(UserError, match="me: rank 0 did not answer within 1 s"):
        group_store(stores(), 1, 2, 1, "me")


def environment(port, rank=1):
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank,
              "WORLD_SIZE": 2}  # fmt: skip
    return {name: str(value) for name, value in values.items()}


@pytest.fixture
def closed_port():
    with socket.socket() as bound:  # bound, but it does not listen
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_unreachable_place_is_told(monkeypatch, closed_port):
    for name, value in environment(closed_port).items():
        monkeypatch.setenv(name, value)
    message = rf"rank 1 of 2 on .* does not reach 127.0.0.1:{closed_port}.* refused"
    with pytest.raises(UserError, match=message):
        start("cpu", 0.5)
    assert not dist.is_on()


def test_name_that_does_not_resolve_is_told(monkeypatch, closed_port):
    def resolve(*words, **more):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for name, value in (environment(closed_port) | {"MASTER_ADDR": "gpu-7"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UserError, match=rf"gpu-7:{closed_port}.* Name or service not known"):
        start("cpu", 0.5)


def test_lacking_variables_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT, RANK, LOCAL_RANK not: start"):
        start("cpu")


RESTARTED = """
import os, signal, sys, time
import torch
from pretrain import collectives as dist
from pretrain.engine import rendezvous

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt and rank == int(sys.argv[1]):
    time.sleep(3)  # the other one looks for its address meanwhile
rendezvous.start("cpu")
found = int(dist.total(torch.tensor(rank + 1.0)))
open(f"{sys.argv[2]}/{attempt}-{rank}", "w").write(str(found))
if not attempt:
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.total(torch.ones(1))
rendezvous.stop()
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
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.name: path.read_text() for path in tmp_path.glob("[01]-[01]")}
    assert found == {f"{attempt}-{rank}": "3" for attempt in (0, 1) for rank in (0, 1)}
