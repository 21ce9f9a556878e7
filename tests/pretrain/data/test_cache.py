import contextlib
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import locked
from pretrain.data import cache as cache_module
from pretrain.data import remote
from pretrain.data.cache import CacheOptions, RemoteShard, ShardCache
from pretrain.data.remote import Patience, RemoteFile, look
from tests.pretrain.data.servers import Faulty, Handler, faulty

SIZE = 100_000
NUM_SHARDS = 12


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    root = tmp_path / "root"
    root.mkdir()
    for i in range(NUM_SHARDS):
        (root / f"{i}.tar").write_bytes(content(i))
    with faulty(root) as state:
        yield state


def content(i: int) -> bytes:
    return bytes([i, 255 - i]) * (SIZE // 2)


def wanted(server: Faulty, i: int) -> RemoteShard:
    return RemoteShard(f"{server.url}/{i}.tar", SIZE, hashlib.sha256(content(i)).hexdigest())


def make(tmp_path: Path, num: float = 4) -> ShardCache:
    """A cache that holds `num` shards."""
    kept = CacheOptions(tmp_path / "cache", int(num * SIZE), patience=Patience(2))
    return ShardCache(kept, remedy="make it again")


def read(cache: ShardCache, shard: RemoteShard) -> bytes:
    with os.fdopen(cache.open(shard), "rb") as stream:
        return stream.read()


def held(cache: ShardCache, server: Faulty) -> list[int]:
    return [i for i in range(NUM_SHARDS) if cache.path(wanted(server, i)).exists()]


def num_bytes(folder: Path) -> int:
    """Bytes of shards and downloads in flight, while nobody moves them."""
    with locked(folder / "space.lock", patience=math.inf):
        files = [*(folder / "shards").iterdir(), *(folder / "partial").iterdir()]
        return sum(path.stat().st_size for path in files)


def empty(cache: ShardCache) -> bool:
    """True if no download and no lock is left."""
    return not any(list((cache.folder / name).iterdir()) for name in ("partial", "locks"))


def test_least_recently_used_goes_first(server: Faulty, tmp_path: Path) -> None:
    cache = make(tmp_path)
    for i in (0, 1, 2, 3, 0, 1):
        assert read(cache, wanted(server, i)) == content(i)
    assert server.gets.total() == 4
    for i, left in ((4, [0, 1, 3, 4]), (5, [0, 1, 4, 5]), (0, [0, 1, 4, 5]), (6, [0, 4, 5, 6])):
        assert read(cache, wanted(server, i)) == content(i)
        assert held(cache, server) == left
        assert num_bytes(cache.folder) == 4 * SIZE
    assert server.gets.total() == 7
    assert empty(cache)


def test_ensure_fetches_side_by_side_what_the_bound_holds(server: Faulty, tmp_path: Path) -> None:
    cache = make(tmp_path)
    cache.ensure([wanted(server, i) for i in range(NUM_SHARDS)])
    assert held(cache, server) == [0, 1, 2, 3]
    cache.ensure([wanted(server, i) for i in (3, 9, 2)])
    assert held(cache, server)[-3:] == [2, 3, 9]
    assert server.gets.total() == 5


def test_bounds_that_are_too_small(server: Faulty, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.cache_gb: 0.0003 is too small for shards of up to 0"
    ):
        make(tmp_path, 3).check_bound([SIZE] * 9)
    make(tmp_path, 3).check_bound([SIZE] * 3)
    with pytest.raises(UserError, match=r"100,000 bytes or more do not fit into the cache of 50,0"):
        make(tmp_path, 0.5).open(wanted(server, 0))
    with pytest.raises(UserError, match=r"data.cache_gb: 0.0: must be above 0"):
        CacheOptions(max_bytes=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (b"x" * SIZE, "its SHA-256 is not the one in the index: the shard or"),
        (b"x" * (SIZE - 1), "99,999 bytes instead of 100,000: the shard or the index is stale"),
        (b"x" * (SIZE + 1), "100,001 bytes instead of 100,000: .* or the index is stale; make it"),
    ],
)
def test_changed_shard_is_never_kept(server, tmp_path, changed, message):
    cache = make(tmp_path)
    (server.root / "0.tar").write_bytes(changed)
    with pytest.raises(UserError, match=message):
        cache.open(wanted(server, 0))
    assert num_bytes(cache.folder) == 0
    assert empty(cache)
    (server.root / "0.tar").write_bytes(content(0))
    assert read(cache, wanted(server, 0)) == content(0)


def test_space_is_given_back_while_nobody_counts(server: Faulty, tmp_path: Path) -> None:
    cache, is_asked, may_answer = make(tmp_path), threading.Event(), threading.Event()

    def faults(handler: Handler, count: int) -> bool:
        is_asked.set()
        may_answer.wait(60)
        return False

    server.faults = faults
    (server.root / "0.tar").write_bytes(content(1))
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(cache.open, wanted(server, 0))
        assert is_asked.wait(60)
        with locked(cache.folder / "space.lock", patience=math.inf):
            may_answer.set()
            (partial,) = (cache.folder / "partial").iterdir()
            time.sleep(0.3)
            assert partial.exists()
        with pytest.raises(UserError, match="its SHA-256 is not the one in the index"):
            fetching.result(60)
    assert num_bytes(cache.folder) == 0


def test_full_disk(server, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = make(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cache: the disk is full; .*lower data.cache_gb, or put"):
        cache.open(wanted(server, 0))
    assert num_bytes(cache.folder) == 0
    assert empty(cache)
    assert server.gets.total() == 1


def test_output_of_a_command_is_named_by_its_content(server: Faulty, tmp_path: Path) -> None:
    cache = make(tmp_path)
    file = RemoteFile(f"pipe:cat {server.root}/0.tar", None, "")
    descriptor, size, sha256 = cache.fetch_unknown(file)
    os.close(descriptor)
    shard = RemoteShard(file.url, SIZE, hashlib.sha256(content(0)).hexdigest())
    assert (size, sha256) == (SIZE, shard.sha256)
    assert read(cache, shard) == content(0)
    again = RemoteShard(f"pipe:cat {server.root}/1.tar", SIZE - 2, "0" * 64)
    with pytest.raises(UserError, match="more than 99,998 bytes: the shard or the index is stale"):
        cache.open(again)
    with pytest.raises(UserError, match=r"do not fit into the cache of 50,000 bytes"):
        make(tmp_path, 0.5).fetch_unknown(file)
    assert empty(cache)


def test_commands_in_each_others_way_all_finish(server, tmp_path, monkeypatch):
    cache = make(tmp_path, 1.5)  # two that grow at once block each other
    monkeypatch.setattr(cache_module, "_WAIT_SECONDS", 0.005)
    together = threading.Barrier(3)

    def fetch(i: int) -> str:
        together.wait()
        tar = f"{server.root}/{i}.tar"
        slow = f"pipe:head -c 80000 {tar}; sleep 0.3; tail -c 20000 {tar}"
        descriptor, _, sha256 = cache.fetch_unknown(RemoteFile(slow, None, ""))
        os.close(descriptor)
        return sha256

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(fetch, range(3)))
    assert found == [wanted(server, i).sha256 for i in range(3)]
    assert num_bytes(cache.folder) <= 1.5 * SIZE
    assert empty(cache)


def test_file_that_changes_while_it_is_fetched(server: Faulty, tmp_path: Path) -> None:
    cache = make(tmp_path)
    before = look(f"{server.url}/0.tar", cache.options.patience)

    def change(handler: Handler, count: int) -> bool:
        handler.send_file(with_body=True)
        (server.root / "0.tar").write_bytes(b"other")
        return True

    server.faults = change
    with pytest.raises(UserError, match=r"0.tar: changed while it was fetched; run again"):
        cache.fetch_unknown(before)


READER = """
import hashlib, json, os, random, sys
from pathlib import Path
from pretrain.data.remote import Patience
from pretrain.data.cache import CacheOptions, ShardCache, RemoteShard
folder, bound, url, seed, num, hashes = sys.argv[1:7]
cache = ShardCache(CacheOptions(Path(folder), int(bound), patience=Patience(2)))
hashes = json.loads(hashes)
chosen = random.Random(int(seed)).choices(range(len(hashes)), k=int(num))
print("ready", flush=True)
for i in chosen:
    shard = RemoteShard(f"{url}/{i}.tar?{seed}", 100_000, hashes[i])
    with os.fdopen(cache.open(shard), "rb") as stream:
        assert hashlib.sha256(stream.read()).hexdigest() == hashes[i]
"""


@contextlib.contextmanager
def reader(server: Faulty, folder: Path, seed: int, num: int) -> Iterator[subprocess.Popen]:
    hashes = json.dumps([wanted(server, i).sha256 for i in range(NUM_SHARDS)])
    arguments = [str(folder), str(5 * SIZE), server.url, str(seed), str(num), hashes]
    process = subprocess.Popen([sys.executable, "-c", READER, *arguments], stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_many_processes_one_killed(server: Faulty, tmp_path: Path) -> None:
    cache = make(tmp_path, 5)
    is_cut = threading.Event()

    def faults(handler: Handler, count: int) -> bool:
        if handler.path.endswith("?9") and server.gets.total() > 40:
            is_cut.set()  # the victim dies in the middle of this
            return handler.cut(SIZE // 2, wait=True)
        return False

    server.faults = faults
    most = 0
    with contextlib.ExitStack() as stack:
        readers = {i: stack.enter_context(reader(server, cache.folder, i, 60)) for i in range(3)}
        victim = stack.enter_context(reader(server, cache.folder, 9, 100_000))
        while any(process.poll() is None for process in readers.values()):
            most = max(most, num_bytes(cache.folder))
            if is_cut.is_set() and victim.poll() is None:
                victim.send_signal(signal.SIGKILL)
                victim.wait()
            time.sleep(0.002)
        assert all(process.returncode == 0 for process in readers.values())
    assert victim.returncode == -signal.SIGKILL
    assert 4 * SIZE <= most <= 5 * SIZE
    for i in readers:
        served = sum(n for path, n in server.gets.items() if path.endswith(f"?{i}"))
        assert 0 < served < 60, "each reader fetches some shards and finds some"
    cache.ensure([wanted(server, i) for i in range(5)])
    assert held(cache, server) == [0, 1, 2, 3, 4]  # the victim's leftover takes no room
    assert empty(cache)
