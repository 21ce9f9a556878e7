import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from pretrain.data import shards
from pretrain.data.shards import ShardIndex
from pretrain.data.sources import remote
from pretrain.data.sources import remote as download
from pretrain.data.sources.cache import CacheOptions
from pretrain.data.sources.remote import Patience
from tests.pretrain.data.picture_helpers import NUM_PICTURES
from tests.pretrain.data.sources.servers import Faulty, Nginx, faulty, nginx


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web(shard_folder: Path, tmp_path: Path) -> Iterator[Nginx]:
    with nginx(shard_folder, tmp_path / "nginx") as server:
        yield server


@pytest.fixture
def broken(shard_folder: Path) -> Iterator[Faulty]:
    with faulty(shard_folder) as server:
        yield server


def cache(tmp_path: Path, **options: float) -> CacheOptions:
    return CacheOptions(**{"folder": tmp_path / "cache", "patience": Patience(2), **options})


def same_pictures(index: ShardIndex, local: ShardIndex) -> bool:
    """Compare all samples with the local set, by key."""
    ids = range(local.num_samples)
    expected = {local.key_name(i): (local.read_bytes(i), local.labels[i]) for i in ids}
    found = {index.key_name(i): (index.read_bytes(i), index.labels[i]) for i in ids}
    return found == expected and index.num_samples == local.num_samples


# -- nginx ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "whole/"], ids=["with ranges", "without ranges"])
def test_folder_with_index(
    web: Nginx, index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)
    found = ShardIndex.open(f"{web.url}/{place}", cache(tmp_path))
    assert found.is_remote
    assert found.classes == index.classes
    assert found.fingerprint == index.fingerprint
    assert not any("shard-" in line and line.startswith("GET") for line in web.requests())
    assert same_pictures(found, index)
    lines = [line for line in web.requests() if line.startswith(f"GET /{place}shard-000001.tar")]
    size = (index.folder / "shard-000001.tar").stat().st_size
    statuses = [int(line.split()[-1]) for line in lines]
    if place:
        assert statuses[-1] == 200
        assert len(statuses) <= 3  # first part, perhaps a second that is refused, then the stream
    else:
        assert statuses == [206] * (-(-size // 10_000))


def test_braces_without_index(
    web: Nginx, index: ShardIndex, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    url = web.url + "/shard-{000000..000003}.tar"
    found = ShardIndex.open(url, cache(tmp_path))
    assert "indexing http://127.0.0.1" in capfd.readouterr().err
    assert found.classes is None
    assert found.fingerprint == index.fingerprint  # samples.npy and the tars are the same bytes
    assert same_pictures(found, index)
    num = len([line for line in web.requests() if line.startswith("GET")])
    again = ShardIndex.open(url, cache(tmp_path))
    assert same_pictures(again, index)
    assert "indexing" not in capfd.readouterr().err
    assert len([line for line in web.requests() if line.startswith("GET")]) == num == 4
    assert not list(tmp_path.glob("cache/indexes/*/parts"))


def test_slow_server(index: ShardIndex, tmp_path: Path) -> None:
    size = (index.folder / "shard-000000.tar").stat().st_size
    with nginx(index.folder, tmp_path / "nginx", rate=str(size // 4)) as web:
        # Slower than the time limit as a whole, but never silent for so long.
        options = cache(tmp_path, patience=Patience(0, 2))
        start = time.monotonic()
        found = ShardIndex.open(f"{web.url}/slow/shard-000000.tar", options)
        assert time.monotonic() - start > 2.5
    assert found.read_bytes(3) == index.read_bytes(3)


def test_not_there_and_closed(web: Nginx, tmp_path: Path) -> None:
    for url, message in [
        ("/nowhere/", r"/nowhere/: there is no index.json, and a web server cannot be searched"),
        ("/shard-{000000..000009}.tar", r"shard-00000[4-9].tar: there is no such file .*address"),
        ("/closed/", r"/closed/index.json: not allowed \(HTTP 403\)"),
        ("/closed/a.tar", r"/closed/a.tar: not allowed \(HTTP 403\)"),
        ("/away/a.tar", r"/away/a.tar: there is no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            ShardIndex.open(web.url + url, cache(tmp_path))
    assert len([line for line in web.requests() if "/closed/a.tar" in line]) <= 2


def test_index_that_changed_is_fetched_again(
    web: Nginx, shard_folder: Path, index: ShardIndex, tmp_path: Path
) -> None:
    first = ShardIndex.open(web.url, cache(tmp_path))
    content = json.loads((shard_folder / "index.json").read_text())
    removed = content["shards"].pop()
    table = np.load(shard_folder / "samples.npy")
    np.save(shard_folder / "samples.npy", table[: -removed["num_samples"]])
    digest = hashlib.sha256((shard_folder / "samples.npy").read_bytes()).hexdigest()
    content |= {"num_samples": NUM_PICTURES - 10, "samples_sha256": digest}
    (shard_folder / "index.json").write_text(json.dumps(content))
    second = ShardIndex.open(web.url, cache(tmp_path))
    assert (first.num_samples, second.num_samples) == (NUM_PICTURES, NUM_PICTURES - 10)
    assert first.fingerprint != second.fingerprint
    assert second.read_bytes(5) == index.read_bytes(5)


def test_tars_that_changed_are_indexed_again(
    web: Nginx, shard_folder: Path, tmp_path: Path
) -> None:
    url = web.url + "/shard-{000000..000001}.tar"
    first = ShardIndex.open(url, cache(tmp_path))
    shutil.copy(shard_folder / "shard-000003.tar", shard_folder / "shard-000001.tar")
    os.utime(shard_folder / "shard-000001.tar", (1, 1))  # nginx's ETag: size and second
    second = ShardIndex.open(url, cache(tmp_path))
    assert first.fingerprint != second.fingerprint
    assert second.read_bytes(12) == ShardIndex.open(
        shard_folder / "shard-000003.tar", cache(tmp_path)
    ).read_bytes(2)


# -- what can be wrong with a set -----------------------------------------------------------------


def change_index(folder: Path, **entries: object) -> None:
    content = json.loads((folder / "index.json").read_text())
    shard = {key[6:]: value for key, value in entries.items() if key.startswith("shard_")}
    content["shards"][1] |= shard
    content |= {key: value for key, value in entries.items() if not key.startswith("shard_")}
    (folder / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"shard_name": "../shard-000001.tar"}, "index.json: names the file '../shard-000001.tar'"),
        ({"shard_name": "/etc/passwd"}, "names the file '/etc/passwd'.* is not trusted"),
        ({"shard_name": "http://127.0.0.1/a.tar"}, "names the file 'http://.* is not trusted"),
        ({"shard_name": "pipe:touch x.tar"}, "names the file 'pipe:touch x.tar'"),
        ({"samples": "../samples.npy"}, "names the file '../samples.npy'"),
        ({"samples": "pipe:touch x"}, "names the file 'pipe:touch x'"),
        ({"shard_sha256": "../../x"}, "index.json: damaged index .*bytes or sha256"),
        ({"shard_bytes": -1}, "damaged index .*bytes or sha256 are impossible"),
        ({"shard_bytes": "many"}, "damaged index"),
        ({"shard_num_samples": 11}, "damaged index .*41 samples in the shards, num_samples 40"),
        ({"shards": None}, "damaged index"),
        ({"num_samples": 39}, "damaged index"),
        ({"samples_sha256": "0" * 64}, "samples.npy: its SHA-256 is not the one in index.json"),
        ({"shard_bytes": 7}, r"shard-000001.tar: [\d,]+ bytes instead of 7: .* upload both again"),
        ({"format": "x"}, "not an index of format 'fa-shards-1'"),
    ],
)
def test_index_that_is_not_trusted(
    broken: Faulty, shard_folder: Path, tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    if entries == {"shards": None}:
        content = json.loads((shard_folder / "index.json").read_text()) | entries
        (shard_folder / "index.json").write_text(json.dumps(content))
    else:
        change_index(shard_folder, **entries)
    with pytest.raises(UserError, match=message):
        ShardIndex.open(broken.url, cache(tmp_path))
    assert not any("shard-" in path for path in broken.gets)


def test_local_index_is_not_trusted_either(shard_folder: Path) -> None:
    change_index(shard_folder, shard_name="../shards/shard-000001.tar")
    with pytest.raises(UserError, match=r"names the file '../shards/shard-000001.tar'"):
        ShardIndex.open(shard_folder)


def test_missing_shard_is_told_at_the_first_opening(
    broken: Faulty, shard_folder: Path, tmp_path: Path
) -> None:
    (shard_folder / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar: there is no such file \(HTTP 404\)"):
        ShardIndex.open(broken.url, cache(tmp_path))


def test_shard_that_changes_later_is_told_when_it_is_fetched(
    broken: Faulty, shard_folder: Path, tmp_path: Path
) -> None:
    index = ShardIndex.open(broken.url, cache(tmp_path))
    path = shard_folder / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"shard-000001.tar: [\d,]+ bytes instead of .*cut short"):
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


def test_damaged_tar_of_others(broken: Faulty, shard_folder: Path, tmp_path: Path) -> None:
    path = shard_folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/shard-000001.tar: the tar is cut short"):
        ShardIndex.open(broken.url + "/shard-{000000..000003}.tar", cache(tmp_path))


def test_damaged_copy_names_its_place(broken: Faulty, tmp_path: Path) -> None:
    index = ShardIndex.open(broken.url, cache(tmp_path))
    index.fetch([0])
    (copy,) = (tmp_path / "cache" / "shards").iterdir()
    size = copy.stat().st_size
    copy.write_bytes(b"\0" * size)
    with pytest.raises(UserError, match=rf"\(copy: {copy}\) at byte .*delete the copy to fetch it"):
        index.read_bytes(0)


def test_cache_too_small_for_the_set(broken: Faulty, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.cache_gb: 5e-05 is too small for shards of up to"):
        ShardIndex.open(broken.url, cache(tmp_path, max_bytes=50_000))


def test_killed_indexing_goes_on_where_it_was(
    broken: Faulty, index: ShardIndex, tmp_path: Path
) -> None:
    url = broken.url + "/shard-{000000..000003}.tar"
    broken.faults = lambda handler, count: "3.tar" in handler.path and handler.refuse(503)
    with pytest.raises(UserError, match=r"shard-000003.tar: could not be fetched in 3 tries"):
        ShardIndex.open(url, cache(tmp_path))
    broken.faults = lambda handler, count: False
    assert same_pictures(ShardIndex.open(url, cache(tmp_path)), index)
    assert [broken.gets[f"/shard-00000{i}.tar"] for i in range(4)] == [1, 1, 1, 4]


def test_one_of_several_makes_the_index(broken: Faulty, index: ShardIndex, tmp_path: Path) -> None:
    url = broken.url + "/shard-{000000..000003}.tar"
    broken.faults = lambda handler, count: time.sleep(0.1) is not None
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: ShardIndex.open(url, cache(tmp_path)), range(3)))
    assert {one.fingerprint for one in found} == {index.fingerprint}
    assert [broken.gets[f"/shard-00000{i}.tar"] for i in range(4)] == [1, 1, 1, 1]


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_remote", [False, True])
def test_read_many_in_the_order_asked(
    broken: Faulty, index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    is_remote: bool,
) -> None:  # fmt: skip
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


def test_shards_thrown_out_are_closed(
    broken: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_workers_read_what_the_parent_opened(
    web: Nginx, index: ShardIndex, tmp_path: Path, method: str
) -> None:
    found = ShardIndex.open(web.url, cache(tmp_path))
    assert found.read_bytes(0) == index.read_bytes(0)  # the parent has an event loop and a client
    loader = DataLoader(
        Bytes(found), batch_size=None, num_workers=2, multiprocessing_context=method,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    workers, pictures = zip(*loader, strict=True)
    assert list(pictures) == [index.read_bytes(i) for i in range(NUM_PICTURES)]
    assert len(set(workers) - {os.getpid()}) == 2
    assert found.read_bytes(39) == index.read_bytes(39)
    fetched = [line for line in web.requests() if line.startswith("GET /shard-")]
    assert len(fetched) == 4  # once each, in three processes
