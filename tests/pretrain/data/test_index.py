"""Tars file by file, however they are damaged, and the names that an index may hold."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from pretrain.data.index import SAMPLE_DTYPE, ShardPart, check_name, load_table, tar_files

FILES = {  # sizes at and beside multiples of 512, an empty file, a name above 100 characters
    "a.jpg": b"1" * 1024,
    "a.cls": b"7",
    "b.jpg": b"2" * 1023,
    "empty.jpg": b"",
    f"{'long/' * 30}c.jpg": bytes(range(256)) * 40,
    "d.json": b"3" * 700,
}


@pytest.fixture(params=[tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def tar(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=request.param) as tar:
        tar.addfile(folder := tarfile.TarInfo("folder"))
        folder.type = tarfile.DIRTYPE
        for name, data in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class Pipe:
    """Bytes that come in small pieces and only forward."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def read(self, size: int, /) -> bytes:
        return self._stream.read(min(size, 700))


def read(path: Path, *, wanted: str = "") -> dict[str, bytes]:
    """The files, the same from a file and from a pipe."""
    results = []
    for stream in (io.BytesIO(path.read_bytes()), Pipe(path.read_bytes())):
        files = tar_files(stream, str(path), lambda name, size: name.endswith(wanted))
        results.append([(member.name, member.data) for member in files])
    assert results[0] == results[1]
    return dict(results[0])


def refusal(path: Path) -> str:
    messages = []
    for stream in (io.BytesIO(path.read_bytes()), Pipe(path.read_bytes())):
        with pytest.raises(UserError) as caught:
            list(tar_files(stream, str(path), lambda name, size: True))
        messages.append(str(caught.value))
    assert messages[0].partition("(")[0] == messages[1].partition("(")[0]
    return messages[0]


def test_local_tar(tar: Path) -> None:
    assert read(tar) == FILES | {"folder": b""}


def test_only_wanted_files_are_read(tar: Path) -> None:
    assert read(tar, wanted=".cls") == dict.fromkeys([*FILES, "folder"], b"") | {"a.cls": b"7"}


def test_every_cut_is_found(tar: Path, tmp_path: Path) -> None:
    data = tar.read_bytes()
    with tarfile.open(tar) as whole:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in whole)
    cut = tmp_path / "cut.tar"
    for length in [*range(512, end, 512), *range(700, end, 1999)]:
        cut.write_bytes(data[:length])
        message = refusal(cut)
        assert str(cut) in message
        assert "cut short or damaged" in message


def test_damaged_header_is_not_taken_for_the_end(tar: Path, tmp_path: Path) -> None:
    with tarfile.open(tar) as whole:
        offsets = [member.offset for member in whole][1:]
    for offset in offsets:
        data = bytearray(tar.read_bytes())
        data[offset + 3] ^= 1
        damaged = tmp_path / "damaged.tar"
        damaged.write_bytes(data)
        assert "cut short or damaged" in refusal(damaged)


def test_what_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_bytes(b"text" * 1000)
    assert "not an uncompressed tar" in refusal(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert "unpack it first" in refusal(tmp_path / "zipped.tar")
    (tmp_path / "empty.tar").touch()
    assert "not an uncompressed tar (empty file)" in refusal(tmp_path / "empty.tar")


@pytest.mark.parametrize(
    "name",
    ["", "/etc/a.tar", "../a.tar", "x/../../a.tar", "x//a.tar", "./a.tar", "http://evil/a.tar",
     "pipe:touch x", "file:a.tar", "C:a.tar", "a\\..\\b.tar", "a\n.tar", "\0", None, 3, ["a"]],
)  # fmt: skip
def test_names_that_leave_the_folder_are_refused(name: object) -> None:
    with pytest.raises(UserError, match=r"does not lie below the folder; .* not trusted"):
        check_name(name, "index.json")


def test_names_below_the_folder_are_taken() -> None:
    for name in ("a.tar", "x/y..z.tar", "ü {0..1}.tar", "%2e%2e%2fa.tar"):
        assert check_name(name, "") == name


@pytest.mark.parametrize("field", ["offset", "size"])
def test_places_beyond_a_shard_are_refused(tmp_path: Path, field: str) -> None:
    path, table = tmp_path / "samples.npy", np.zeros(1, SAMPLE_DTYPE)
    index = {"samples": "samples.npy", "num_samples": 1, "classes": None,
             "shards": [{"num_samples": 1, "bytes": 1024}]}  # fmt: skip
    for value in (1024, np.iinfo(SAMPLE_DTYPE[field]).max):
        table[field] = value
        np.save(path, table)
        index["samples_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        if value == 1024:
            assert len(load_table(tmp_path, index)) == 1
            continue
        with pytest.raises(UserError, match="beyond the end of their shards"):
            load_table(tmp_path, index)


def test_samples_of_each_shard_are_counted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pretrain.data.index._ROWS_AT_ONCE", 2)
    path, table = tmp_path / "samples.npy", np.zeros(5, SAMPLE_DTYPE)
    table["shard"] = [0, 0, 0, 1, 1]
    np.save(path, table)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    index = {"samples": "samples.npy", "num_samples": 5, "classes": None, "samples_sha256": digest}
    index["shards"] = [{"num_samples": 3, "bytes": 1024}, {"num_samples": 2, "bytes": 1024}]
    assert len(load_table(tmp_path, index)) == 5
    index["shards"].reverse()
    with pytest.raises(UserError, match="its shards are not those of"):
        load_table(tmp_path, index)


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    path, index = tmp_path / "samples.npy", {"samples": "samples.npy", "num_samples": 3}
    np.save(path, np.zeros(3, SAMPLE_DTYPE))
    whole = path.read_bytes()
    np.savez(tmp_path / "a.npz", np.zeros(3))
    damaged = [whole[:at] + bytes(9) + whole[at + 9 :] for at in range(0, 128, 3)]
    for data in (b"", whole[:60], whole[:200], (tmp_path / "a.npz").read_bytes(), *damaged):
        path.write_bytes(data)
        (tmp_path / "samples.json").write_text('{"fingerprint": "", "shard": {}, "skipped": []}')
        with pytest.raises(UserError, match=r"samples\.npy: (cannot be read|does not fit)"):
            load_table(tmp_path, index)
        assert ShardPart.load(tmp_path / "samples") is None
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="named pipe"):
        load_table(tmp_path, index)
