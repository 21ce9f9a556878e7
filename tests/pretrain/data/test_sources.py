import json
from pathlib import Path

import pytest

from common.errors import UserError
from pretrain.data import sources as locations
from pretrain.data.index import FORMAT
from pretrain.data.remote import displayed
from pretrain.data.sources import expand, parse
from tests.pretrain.data.servers import faulty


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"tar")


@pytest.mark.parametrize(
    ("text", "scheme", "is_folder"),
    [
        ("/nowhere/shards", "file", True),
        ("/data/train-{000..099}.tar", "file", False),
        ("/data/*.tar", "file", False),
        ("one.tar", "file", False),
        ("http://host/dir/", "http", True),
        ("http://host/dir?token=a.tar", "http", True),
        ("https://host:81/a-{0..3}.tar?token=x", "https", False),
        ("http://[::1]:8080/a.tar", "http", False),
        ("s3://bucket", "s3", True),
        ("s3://bucket/prefix/", "s3", True),
        ("S3://bucket/train-*.tar", "s3", False),
        ("s3://bucket/train-??.tar", "s3", False),
        ("gs://bucket/a.tar", "gs", False),
        ("pipe:curl -s http://host/{0..3}.tar", "pipe", False),
    ],
)
def test_forms(text: str, scheme: str, is_folder: bool) -> None:
    found = parse(text)
    assert (found.scheme, found.is_folder) == (scheme, is_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/a.tar", r"ftp://host/a.tar: give a local path, http"),
        ("pipe: ", "needs a command"),
        ("s3:///a.tar", "names no bucket"),
        ("http:///a.tar", "names no server"),
        ("http://host/*.tar", r"a web server cannot be searched; .*train-\{000000..000099\}.tar"),
        ("s3://bucket/part-{0..3}/", "a pattern must name .tar files"),
        ("s3://bucket/part-*/", "a pattern must name .tar files"),
        ("/data/{a,b}", r"/data/\{a,b\}: a pattern must name .tar files"),
        ("/data/*.tar.gz", "compressed tars have no random access; unpack"),
        ("http://host/a.tgz", "compressed tars have no random access; unpack"),
    ],
)
def test_impossible_forms_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)


def test_braces_as_in_a_shell() -> None:
    assert expand("http://h/t-{08..11}.tar") == [f"http://h/t-{i:02d}.tar" for i in range(8, 12)]
    assert expand("s3://b/{x,y}/{0..1}.tar") == [
        f"s3://b/{f}/{i}.tar" for f in "xy" for i in (0, 1)
    ]
    assert expand("/nowhere/{a,b}.tar") == ["/nowhere/a.tar", "/nowhere/b.tar"]


def test_local_globs_and_folders_are_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.tar", "a.tar", "a.txt", "c/a.tar")
    assert expand(tmp_path) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert expand(f"{tmp_path}/[ab].tar") == expand(tmp_path)
    assert expand(f"{tmp_path}/{{b,c/*}}.tar") == [f"{tmp_path}/b.tar", f"{tmp_path}/c/a.tar"]


def index_of(name: str) -> str:
    """The index.json of a set with one shard."""
    shard = {"name": name, "num_samples": 0, "bytes": 0, "sha256": "0" * 64}
    rest = {"classes": None, "options": {}, "skipped": [], "samples": "samples.npy"}
    hashes = {"samples_sha256": "0" * 64}
    return json.dumps({"format": FORMAT, "num_samples": 0, "shards": [shard], **rest, **hashes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/nowhere/*.tar", "no file fits this pattern"),
        ("/nowhere", "no such folder of shards"),
        ("/nowhere/{a,a}.tar", r"names /nowhere/a.tar more than once"),
        ("/nowhere/{0..9}{.tar", "a brace is not closed"),
        ("http://h/{0..9999}.tar", "more than 1,000 shards"),
    ],
)
def test_nothing_or_too_much(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "_MAX_SHARDS", 1000)
    with pytest.raises(UserError, match=message):
        expand(text)


def test_web_folder_needs_an_index(tmp_path: Path) -> None:
    touch(tmp_path, "a b.tar")
    with faulty(tmp_path) as server:
        with pytest.raises(UserError, match=r"no index.json, and a web server cannot be searched"):
            expand(server.url)
        (tmp_path / "index.json").write_text(index_of("a b.tar"))
        assert expand(server.url + "/") == [f"{server.url}/a%20b.tar"]
        (tmp_path / "index.json").write_text(index_of("../a.tar"))
        with pytest.raises(UserError, match=r"index.json: names the file '../a.tar'.*not trusted"):
            expand(server.url)
        (tmp_path / "index.json").write_text("{")
        with pytest.raises(UserError, match=r"index.json: cannot be read as an index"):
            expand(server.url)


def test_messages_hide_passwords_and_tokens() -> None:
    assert displayed("https://me:secret@host:81/a.tar?token=secret") == "https://host:81/a.tar?..."
    assert displayed("/local/a.tar") == "/local/a.tar"
