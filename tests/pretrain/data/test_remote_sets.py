"""Sets on servers: an S3 server, and servers that fail on purpose."""

import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from pretrain.data import remote, shards
from pretrain.data.cache import CacheOptions
from pretrain.data.remote import Patience
from pretrain.data.shards import ShardIndex
from pretrain.data.sources import expand
from tests.pretrain.data.picture_helpers import NUM_PICTURES
from tests.pretrain.data.servers import Faulty, Handler, faulty, s3_server

ALL = "shard-{000000..000003}.tar"


@pytest.fixture(scope="module")
def clients() -> dict:
    """A client takes most of a test's time to make: all tests have one server and its clients."""
    return {}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    with faulty(tmp_path_factory.mktemp("nothing")) as one:
        yield one


@pytest.fixture(autouse=True)
def quick(clients: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_filesystems", clients)  # those of other modules know another one
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture
def broken(server: Faulty, shard_folder: Path) -> Faulty:
    return server.serve(shard_folder)


def cache(tmp_path: Path, **options: float) -> CacheOptions:
    return CacheOptions(**{"folder": tmp_path / "cache", "patience": Patience(2), **options})


def same_pictures(index: ShardIndex, local: ShardIndex) -> bool:
    """Compare all samples with the local set, by key."""
    ids = range(local.num_samples)
    expected = {local.key_name(i): (local.read_bytes(i), local.labels[i]) for i in ids}
    found = {index.key_name(i): (index.read_bytes(i), index.labels[i]) for i in ids}
    return found == expected and index.num_samples == local.num_samples


@pytest.fixture(params=["http", "s3"])
def store(request, server, shard_folder, monkeypatch):
    """The address of the set on a server, and the server; that of S3 cannot list."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    where = server.url if request.param == "http" else "s3:/"
    return f"{where}/shards", server.serve(shard_folder.parent)


@pytest.mark.parametrize("name", ["/", f"/{ALL}"], ids=["index", "tars"])
def test_sets_on_servers_are_those_on_the_disk(store, index, tmp_path, name, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 10_000)
    found = ShardIndex.open(store[0] + name, cache(tmp_path))
    assert found.is_remote
    assert found.classes == (index.classes if name == "/" else None)
    assert found.fingerprint == index.fingerprint  # samples.npy and the tars are the same bytes
    assert same_pictures(found, index)


@pytest.mark.parametrize(
    "act",
    [
        lambda handler: handler.refuse(503),
        lambda handler: handler.cut(1000),
        lambda handler: handler.cut(1000, wait=True),
    ],
    ids=["503", "connection cut", "stall"],
)
@pytest.mark.parametrize("store", ["s3"], indirect=True)  # http: see test_remote.py
def test_failed_parts_are_fetched_again(store, index, tmp_path, monkeypatch, act):
    address, server = store
    monkeypatch.setattr(remote, "CHUNK_BYTES", 10_000)
    found = ShardIndex.open(address, cache(tmp_path, patience=Patience(2, 0.3)))
    server.faults = lambda handler, count: count in (1, 2) and act(handler)
    assert found.read_bytes(3) == index.read_bytes(3)
    size = (index.folder / "shard-000000.tar").stat().st_size
    assert server.gets["/shards/shard-000000.tar"] == -(-size // 10_000) + 2


@pytest.mark.parametrize(
    ("act", "message", "num"),
    [
        (lambda handler: handler.refuse(503), "in 3 tries, the last one: HTTP 503", 3),
        (lambda handler: handler.cut(9, wait=True), "in 3 tries, .* no byte for 0.1 s", 3),
        (lambda handler: handler.refuse(401), r"not allowed \(HTTP 401\)", 1),
        (lambda handler: handler.refuse(403), r"not allowed \(HTTP 403\); check the cred", 1),
        (lambda handler: handler.refuse(404), r"there is no such file \(HTTP 404\)", 1),
    ],
    ids=["503", "stall", "401", "403", "404"],
)
@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_one_clear_error(store, tmp_path, act, message, num):
    address, server = store
    found = ShardIndex.open(address, cache(tmp_path, patience=Patience(2, 0.1)))
    server.faults = lambda handler, count: act(handler)
    with pytest.raises(UserError, match=rf"^{address}/shard-000000.tar: .*{message}"):
        found.fetch([3])
    assert server.gets["/shards/shard-000000.tar"] == num


def test_missing_and_cut_shards_are_told_at_the_first_opening(store, shard_folder, tmp_path):
    path = shard_folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"shard-000002.tar: 5000 bytes instead of .*upload both"):
        ShardIndex.open(store[0], cache(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar: there is no such file \(HTTP 404\)"):
        ShardIndex.open(store[0], cache(tmp_path))


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as url:
        yield url


def test_object_store(s3_address, index, shard_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_address)
    monkeypatch.setattr(remote, "_filesystems", {})
    client = boto3.client("s3")
    client.create_bucket(Bucket="set")
    for path in shard_folder.glob("*.tar"):
        client.upload_file(str(path), "set", f"train/{path.name}")
    for name in ("train", f"train/{ALL}", "train/*.tar", "t*/shard-?????[0-3].tar"):
        assert expand(f"s3://set/{name}") == [f"s3://set/train/{n}" for n in index.shard_names]
    first = ShardIndex.open("s3://set/train/", cache(tmp_path))
    assert first.fingerprint == index.fingerprint
    assert same_pictures(first, index)

    # Another shard under the same name.
    first.close()
    client.upload_file(str(shard_folder / "shard-000000.tar"), "set", "train/shard-000001.tar")
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar: .*stale; run again: .* indexed anew"):
        first.read_bytes(12)
    second = ShardIndex.open("s3://set/train/*.tar", cache(tmp_path))
    assert second.fingerprint != first.fingerprint
    assert second.read_bytes(12) == first.read_bytes(2)

    for name, message in [
        ("s3://set/nowhere/", r"s3://set/nowhere/: holds neither index.json nor .tar files"),
        ("s3://set/x-*.tar", r"s3://set/x-\*.tar: no file fits this pattern"),
        ("s3://set/train/shard-{000000..000009}.tar", r"shard-000004.tar: there is no such file"),
        ("s3://other-bucket/a.tar", r"s3://other-bucket/a.tar: there is no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            ShardIndex.open(name, cache(tmp_path))
    client.close()


def test_index_of_tars_is_made_once(broken, index, shard_folder, tmp_path, capfd):
    for is_indexed in (True, False):
        found = ShardIndex.open(f"{broken.url}/{ALL}", cache(tmp_path))
        assert same_pictures(found, index)
        assert ("indexing http://127.0.0.1" in capfd.readouterr().err) == is_indexed
        assert broken.gets.total() == 4
    assert not list(tmp_path.glob("cache/indexes/*/parts"))
    data = (shard_folder / "shard-000003.tar").read_bytes()  # of another size: there is no ETag
    (shard_folder / "shard-000001.tar").write_bytes(data + bytes(512))
    second = ShardIndex.open(f"{broken.url}/{ALL}", cache(tmp_path))
    assert found.fingerprint != second.fingerprint
    assert second.read_bytes(12) == index.read_bytes(32)


def test_slow_server(broken: Faulty, index: ShardIndex, tmp_path: Path) -> None:
    """Slower than the time limit as a whole, but never silent for so long."""

    def slow(handler: Handler, count: int) -> bool:
        data = handler.content()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for start in range(0, len(data), len(data) // 4):
            time.sleep(0.15)
            handler.wfile.write(data[start : start + len(data) // 4])
        return True

    broken.faults = slow
    options = cache(tmp_path, patience=Patience(0, 0.5))
    found = ShardIndex.open(f"{broken.url}/shard-000000.tar", options)
    assert found.read_bytes(3) == index.read_bytes(3)


def test_index_that_changed_is_fetched_again(broken, shard_folder, index, tmp_path):
    first = ShardIndex.open(broken.url, cache(tmp_path))
    content = json.loads((shard_folder / "index.json").read_text())
    removed = content["shards"].pop()
    table = np.load(shard_folder / "samples.npy")
    np.save(shard_folder / "samples.npy", table[: -removed["num_samples"]])
    digest = hashlib.sha256((shard_folder / "samples.npy").read_bytes()).hexdigest()
    content |= {"num_samples": NUM_PICTURES - 10, "samples_sha256": digest}
    (shard_folder / "index.json").write_text(json.dumps(content))
    second = ShardIndex.open(broken.url, cache(tmp_path))
    assert (first.num_samples, second.num_samples) == (NUM_PICTURES, NUM_PICTURES - 10)
    assert first.fingerprint != second.fingerprint
    assert second.read_bytes(5) == index.read_bytes(5)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"name": "../shard-000001.tar"}, "index.json: names the file '../shard-000001.tar'"),
        ({"name": "pipe:touch x.tar"}, "names the file 'pipe:touch x.tar'.* is not trusted"),
        ({"samples": "../samples.npy"}, "names the file '../samples.npy'"),
        ({"sha256": "../../x"}, "index.json: damaged index .*sizes or sha256"),
        ({"bytes": -1}, "damaged index .*sizes or sha256 are impossible"),
        ({"bytes": "many"}, "damaged index"),
        ({"shards": None}, "damaged index"),
        ({"num_samples": 39}, "damaged index .*40 samples in the shards, num_samples 39"),
        ({"samples_sha256": "0" * 64}, "samples.npy: its SHA-256 is not the one in index.json"),
        ({"bytes": 7}, r"shard-000001.tar: [\d,]+ bytes instead of 7"),
        ({"format": "x"}, "not an index of format 'fa-shards-1'"),
    ],
)
def test_index_that_is_not_trusted(broken, shard_folder, tmp_path, entries, message):
    """Neither on a server nor on the disk."""
    content = json.loads((shard_folder / "index.json").read_text())
    of_shard = set(entries) & {"name", "sha256", "bytes"}
    (content["shards"][1] if of_shard else content).update(entries)
    (shard_folder / "index.json").write_text(json.dumps(content))
    for place in (broken.url, shard_folder):
        with pytest.raises(UserError, match=message):
            ShardIndex.open(place, cache(tmp_path))
    assert not any("shard-" in path for path in broken.gets)


def test_shard_that_changes_later_is_told_when_it_is_fetched(broken, shard_folder, tmp_path):
    index = ShardIndex.open(broken.url, cache(tmp_path))
    path = shard_folder / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"shard-000001.tar: [\d,]+ bytes instead of .*stale"):
        index.read_bytes(12)
    path.write_bytes(b"x" + data[1:])
    with pytest.raises(UserError, match=r"its SHA-256 is not the one in the index: .* upload the"):
        index.fetch([12])
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar: there is no such file"):
        index.read_many([3, 12])
    assert index.describe(12).startswith("sample 12 in http://127.0.0.1")
    path.write_bytes(data)
    assert len(index.read_many([3, 12])) == 2


def test_damaged_copy_names_its_place(broken: Faulty, tmp_path: Path) -> None:
    index = ShardIndex.open(broken.url, cache(tmp_path))
    index.fetch([0])
    (copy,) = (tmp_path / "cache" / "shards").iterdir()
    copy.write_bytes(b"\0" * copy.stat().st_size)
    with pytest.raises(UserError, match=rf"\(copy: {copy}\) at byte .*delete the copy to fetch it"):
        index.read_bytes(0)


def test_killed_indexing_goes_on_where_it_was(broken, index, tmp_path):
    broken.faults = lambda handler, count: "3.tar" in handler.path and handler.refuse(503)
    with pytest.raises(UserError, match=r"shard-000003.tar: could not be fetched in 3 tries"):
        ShardIndex.open(f"{broken.url}/{ALL}", cache(tmp_path))
    broken.faults = lambda handler, count: False
    assert same_pictures(ShardIndex.open(f"{broken.url}/{ALL}", cache(tmp_path)), index)
    assert [broken.gets[f"/shard-00000{i}.tar"] for i in range(4)] == [1, 1, 1, 4]


def test_one_of_several_makes_the_index(broken: Faulty, index: ShardIndex, tmp_path: Path) -> None:
    url = f"{broken.url}/{ALL}"
    broken.faults = lambda handler, count: time.sleep(0.1) is not None
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: ShardIndex.open(url, cache(tmp_path)), range(3)))
    assert {one.fingerprint for one in found} == {index.fingerprint}
    assert [broken.gets[f"/shard-00000{i}.tar"] for i in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("is_remote", [False, True])
def test_read_many_in_the_order_asked(broken, index, tmp_path, monkeypatch, is_remote):
    found = ShardIndex.open(broken.url, cache(tmp_path)) if is_remote else index
    ids = np.random.default_rng(0).integers(0, NUM_PICTURES, 60)
    expected = [index.read_bytes(int(i)) for i in ids]
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 2)
    reads: list[tuple[int, int]] = []
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda file, size, at: reads.append((file, at)) or pread(file, size, at)
    )
    assert found.read_many(ids) == expected
    assert len(reads) == 60
    changes = sum(one[0] != two[0] or one[1] > two[1] for one, two in itertools.pairwise(reads))
    assert changes <= 3  # shard by shard, forwards in each
    assert found.read_many([]) == []


def test_shards_thrown_out_are_closed(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_TOUCH_SECONDS", 0.0)
    size = max(path.stat().st_size for path in broken.root.glob("*.tar"))
    for i in range(6):  # other bytes, so that the cache sees other shards
        data = (broken.root / f"shard-00000{i % 4}.tar").read_bytes()
        (broken.root / f"copy-{i}.tar").write_bytes(data + b"\0" * 512 * i)
    url = broken.url + "/copy-{0..5}.tar"
    index = ShardIndex.open(url, cache(tmp_path, max_bytes=4 * size + 20_000))
    for i in range(0, 60, 10):
        index.read_bytes(i)
    linked = [os.fstat(file).st_nlink for file in index._files.values()]
    assert linked == [1] * len(linked)
    assert 3 <= len(linked) <= 5
    index.close()


class Bytes(Dataset):
    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        return os.getpid(), self.index.read_bytes(i)


@pytest.mark.filterwarnings(  # Python 3.12 warns of every fork beside threads; this is the test
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_the_parent_opened(store, index, tmp_path, method):
    found = ShardIndex.open(store[0], cache(tmp_path))
    assert found.read_bytes(0) == index.read_bytes(0)  # the parent has an event loop and a client
    loader = DataLoader(
        Bytes(found), batch_size=None, num_workers=2, multiprocessing_context=method,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    workers, pictures = zip(*loader, strict=True)
    assert list(pictures) == [index.read_bytes(i) for i in range(NUM_PICTURES)]
    assert len(set(workers) - {os.getpid()}) == 2
    assert found.read_bytes(39) == index.read_bytes(39)
    if store[0].startswith("http"):  # each fetched once, by three processes
        assert sum(n for path, n in store[1].gets.items() if ".tar" in path) == 4
