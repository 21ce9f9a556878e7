import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from torch.utils.data import DataLoader

from common.errors import UserError
from pretrain.data.shards import ShardIndex
from pretrain.data.sources import remote
from pretrain.data.sources import remote as download
from pretrain.data.sources.cache import CacheOptions
from pretrain.data.sources.locations import expand
from pretrain.data.sources.remote import Patience, look_at_all
from tests.pretrain.data.picture_helpers import NUM_PICTURES
from tests.pretrain.data.sources.servers import Faulty, Handler, faulty, s3_server
from tests.pretrain.data.sources.test_http import Bytes, same_pictures

CLIENTS: dict = {}  # of the one server, for all tests; making one takes half a second


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str):
    found = boto3.client(
        "s3", endpoint_url=address, aws_access_key_id="test", aws_secret_access_key="test",
        region_name="us-east-1",
    )  # fmt: skip
    yield found
    found.close()


@pytest.fixture
def s3(client, address: str, shard_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A client of a server with the shards in s3://set/train/ (no index) and s3://set/whole/."""
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_filesystems", CLIENTS)
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("http_proxy", raising=False)
    client.create_bucket(Bucket="set")
    for path in shard_folder.iterdir():
        client.upload_file(str(path), "set", f"whole/{path.name}")
        if path.suffix == ".tar":
            client.upload_file(str(path), "set", f"train/{path.name}")
    yield client
    for item in client.list_objects_v2(Bucket="set").get("Contents", []):
        client.delete_object(Bucket="set", Key=item["Key"])
    client.delete_bucket(Bucket="set")


def cache(tmp_path: Path, **options: float) -> CacheOptions:
    return CacheOptions(**{"folder": tmp_path / "cache", "patience": Patience(2), **options})


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_folder_with_index(
    s3, index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    address = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(remote, "_filesystems", {})  # the address is read when a client is made
    monkeypatch.setenv(name, address)
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)
    found = ShardIndex.open("s3://set/whole/", cache(tmp_path))
    assert found.fingerprint == index.fingerprint
    assert found.classes == index.classes
    assert same_pictures(found, index)


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "train/",
        "train/shard-{000000..000003}.tar",
        "train/*.tar",
        "t*/shard-?????[0-3].tar",
    ],
)
def test_folders_braces_and_globs_without_index(
    s3, index: ShardIndex, tmp_path: Path, name: str
) -> None:
    found = ShardIndex.open(f"s3://set/{name}", cache(tmp_path))
    assert expand(f"s3://set/{name}") == [f"s3://set/train/{n}" for n in index.shard_names]
    assert found.fingerprint == index.fingerprint
    assert same_pictures(found, index)


def test_index_is_made_again_when_a_shard_changes(s3, tmp_path: Path, shard_folder: Path) -> None:
    first = ShardIndex.open("s3://set/train/*.tar", cache(tmp_path))
    s3.upload_file(str(shard_folder / "shard-000000.tar"), "set", "train/shard-000001.tar")
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar: .*stale; run again: .* indexed anew"):
        first.read_bytes(12)
    second = ShardIndex.open("s3://set/train/*.tar", cache(tmp_path))
    assert second.fingerprint != first.fingerprint
    assert second.read_bytes(12) == first.read_bytes(2)
    s3.delete_object(Bucket="set", Key="train/shard-000001.tar")
    assert ShardIndex.open("s3://set/train/*.tar", cache(tmp_path)).num_samples == NUM_PICTURES - 10


def test_sizes_come_from_one_listing(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "look", lambda url, patience: pytest.fail(f"asked for {url} alone"))
    urls = expand("s3://set/train/shard-{000000..000003}.tar")
    files = look_at_all(urls, Patience())
    assert [file.url for file in files] == urls
    assert all((file.size or 0) > 1000 and file.version for file in files)


def test_missing_shards_and_buckets(s3, tmp_path: Path) -> None:
    s3.delete_object(Bucket="set", Key="whole/shard-000002.tar")
    for name, message in [
        ("s3://set/whole/", r"s3://set/whole/shard-000002.tar: there is no such file"),
        ("s3://set/nowhere/", r"s3://set/nowhere/: holds neither index.json nor .tar files"),
        ("s3://set/x-*.tar", r"s3://set/x-\*.tar: no file fits this pattern"),
        ("s3://set/train/shard-{000000..000009}.tar", r"shard-000004.tar: there is no such file"),
        ("s3://other-bucket/a.tar", r"s3://other-bucket/a.tar: there is no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            ShardIndex.open(name, cache(tmp_path))


def test_truncated_shard_and_traversal(s3, shard_folder: Path, tmp_path: Path) -> None:
    data = (shard_folder / "shard-000001.tar").read_bytes()
    s3.put_object(Bucket="set", Key="whole/shard-000001.tar", Body=data[:5000])
    with pytest.raises(UserError, match=r"shard-000001.tar: 5,000 bytes instead of .*upload both"):
        ShardIndex.open("s3://set/whole", cache(tmp_path))
    content = json.loads((shard_folder / "index.json").read_text())
    content["shards"][0]["name"] = "../train/shard-000000.tar"
    s3.put_object(Bucket="set", Key="whole/index.json", Body=json.dumps(content).encode())
    with pytest.raises(
        UserError, match=r"whole/index.json: names the file '../train/.*not trusted"
    ):
        ShardIndex.open("s3://set/whole", cache(tmp_path))


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3) -> None:
    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not be fetched in 3 tries, .*127.0.0.1:9"):
        ShardIndex.open("s3://set/whole", cache(tmp_path))


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3) -> None:
    monkeypatch.setattr(remote, "_filesystems", {})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no credentials; set AWS_ACCESS_KEY_ID .*FSSPEC_S3_ANON"):
        ShardIndex.open("s3://set/whole", cache(tmp_path))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers(s3, index: ShardIndex, tmp_path: Path) -> None:
    found = ShardIndex.open("s3://set/whole", cache(tmp_path))
    found.fetch([0])
    loader = DataLoader(
        Bytes(found), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    workers, pictures = zip(*loader, strict=True)
    assert list(pictures) == [index.read_bytes(i) for i in range(NUM_PICTURES)]
    assert len(set(workers)) == 2


# -- an object store that fails now and then ------------------------------------------------------


@pytest.fixture
def failing(s3, shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A server that knows objects, but no listings: s3://shards/ holds the set."""
    with faulty(shard_folder.parent) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setattr(remote, "_filesystems", {})
        yield server


@pytest.mark.parametrize(
    "act",
    [
        lambda handler: handler.refuse(503),
        lambda handler: handler.refuse(500),
        lambda handler: handler.cut(1000),
        lambda handler: handler.cut(1000, wait=True),
    ],
    ids=["503", "500", "connection cut", "stall"],
)
def test_failed_parts_are_fetched_again(
    failing: Faulty, index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Handler], bool],
) -> None:  # fmt: skip
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)
    found = ShardIndex.open("s3://shards/", cache(tmp_path, patience=Patience(2, 0.5)))
    failing.faults = lambda handler, count: count in (1, 2) and act(handler)
    assert found.read_bytes(3) == index.read_bytes(3)
    size = (index.folder / "shard-000000.tar").stat().st_size
    assert failing.gets["/shards/shard-000000.tar"] == -(-size // 10_000) + 2


@pytest.mark.parametrize(
    ("act", "message", "num"),
    [
        (lambda handler: handler.refuse(503), "in 3 tries, the last one: HTTP 503", 3),
        (lambda handler: handler.cut(9, wait=True), "in 3 tries, .* no byte for 0.2 s", 3),
        (lambda handler: handler.refuse(403), r"not allowed \(HTTP 403\); check the cred", 1),
        (lambda handler: handler.refuse(404), r"there is no such file \(HTTP 404\)", 1),
    ],
)
def test_one_clear_error(
    failing: Faulty, tmp_path: Path, act: Callable[[Handler], bool], message: str, num: int
) -> None:
    found = ShardIndex.open("s3://shards/", cache(tmp_path, patience=Patience(2, 0.2)))
    failing.faults = lambda handler, count: act(handler)
    with pytest.raises(UserError, match=rf"^s3://shards/shard-000000.tar: .*{message}"):
        found.fetch([3])
    assert failing.gets["/shards/shard-000000.tar"] == num
