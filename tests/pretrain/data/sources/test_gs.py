"""gs:// through gcsfs, where it is installed, against the few answers of Google that it needs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from fsspec.config import conf

from common.errors import UserError
from pretrain.data.shards import ShardIndex
from pretrain.data.sources import remote
from pretrain.data.sources import remote as download
from pretrain.data.sources.cache import CacheOptions
from pretrain.data.sources.remote import Patience
from tests.pretrain.data.sources.servers import Faulty, Handler, faulty
from tests.pretrain.data.sources.test_http import same_pictures

# Read when gcsfs is imported: without it, it asks Google over gRPC of what kind the bucket is.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
pytest.importorskip("gcsfs")


def answer(handler: Handler, value: object) -> bool:
    data = json.dumps(value).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
    return True


def describe(root: Path, bucket: str, path: Path) -> dict[str, str]:
    name = path.relative_to(root / bucket).as_posix()
    return {
        "kind": "storage#object", "name": name, "bucket": bucket, "size": str(path.stat().st_size),
        "etag": f"{path.stat().st_mtime_ns}", "updated": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip


def google(handler: Handler, count: int) -> bool:
    """Objects and listings under /storage/v1/b/BUCKET/o, bytes with alt=media."""
    root, url = handler.state.root, urlsplit(handler.path)
    query = {key: values[0] for key, values in parse_qs(url.query).items()}
    bucket, _, name = url.path.split("/b/", 1)[1].partition("/o")
    if name:
        path = root / bucket / unquote(name[1:])
        if not path.is_file():
            return handler.refuse(404)
        if query.get("alt") != "media" and "/download/" not in url.path:
            return answer(handler, describe(root, bucket, path))
        handler.path = f"/{path.relative_to(root)}"
        return False
    prefix = query.get("prefix", "")
    files = [p for p in sorted((root / bucket).rglob("*")) if p.is_file()]
    items = [describe(root, bucket, path) for path in files]
    return answer(handler, {"items": [i for i in items if i["name"].startswith(prefix)]})


@pytest.fixture
def gs(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A server with the set in gs://shards/ (which has an index)."""
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setitem(conf, "gs", {"token": "anon"})
    with faulty(shard_folder.parent) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        server.faults = google
        yield server


@pytest.mark.parametrize("name", ["", "shard-{000000..000003}.tar", "*.tar"])
def test_folders_braces_and_globs(
    gs: Faulty, index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)
    options = CacheOptions(tmp_path / "cache", patience=Patience(1))
    found = ShardIndex.open(f"gs://shards/{name}", options)
    assert found.fingerprint == index.fingerprint
    assert same_pictures(found, index)


def test_missing_and_closed(gs: Faulty, tmp_path: Path) -> None:
    options = CacheOptions(tmp_path / "cache", patience=Patience(1))
    found = ShardIndex.open("gs://shards/", options)
    for status, message in [
        (404, r"^gs://shards/shard-000000.tar: there is no such file \(HTTP 404\)"),
        (403, r"^gs://shards/shard-000000.tar: not allowed \(HTTP 403\)"),
        (401, r"^gs://shards/shard-000000.tar: not allowed \(HTTP 401\)"),
    ]:
        gs.faults = lambda handler, count, status=status: handler.refuse(status)
        with pytest.raises(UserError, match=message):
            found.fetch([0])
