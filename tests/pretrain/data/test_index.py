import contextlib
import io
import shlex
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from pretrain.data import remote
from pretrain.data import remote as download
from pretrain.data.index import tar_files
from pretrain.data.remote import Patience
from pretrain.data.streaming import RemoteStream, open_stream
from tests.pretrain.data.servers import Faulty, Handler, faulty

PATIENCE = Patience(retries=2, timeout_seconds=2)
FILES = {  # sizes at and beside multiples of 512, an empty file, a name above 100 characters
    "a.jpg": b"1" * 1024,
    "a.cls": b"7",
    "b.jpg": b"2" * 1023,
    "empty.jpg": b"",
    f"{'long/' * 30}c.jpg": bytes(range(256)) * 40,
    "d.json": b"3" * 700,
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)


@pytest.fixture(params=[tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def tar(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "a.tar"
    write_tar(path, FILES, request.param)
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Faulty]:
    with faulty(tmp_path) as state:
        yield state


def write_tar(path: Path, files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as tar:
        tar.addfile(folder := tarfile.TarInfo("folder"))
        folder.type = tarfile.DIRTYPE
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read(url: str | Path, *, wanted: str = "", patience: Patience = PATIENCE) -> dict[str, bytes]:
    with contextlib.closing(open_stream(str(url), patience)) as stream:
        files = tar_files(stream, str(url), lambda name: name.endswith(wanted))
        found = [(member.name, data) for member, data in files]
    assert len(dict(found)) == len(found)
    return dict(found)


def refusal(url: str | Path, **options: Patience) -> str:
    with pytest.raises(UserError) as caught:
        read(url, **options)
    return str(caught.value)


def streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shard-stream"]


def wait_until_none_streams() -> None:
    end = time.monotonic() + 5
    while streams():
        assert time.monotonic() < end, "a thread goes on fetching"
        time.sleep(0.01)


def test_local_tar(tar: Path) -> None:
    assert read(tar) == FILES | {"folder": b""}


def test_only_wanted_files_are_read(tar: Path) -> None:
    assert read(tar, wanted=".cls") == dict.fromkeys([*FILES, "folder"], b"") | {"a.cls": b"7"}


def test_tar_from_a_server_and_from_a_command(tar: Path, server: Faulty) -> None:
    local = read(tar)
    assert read(f"{server.url}/a.tar") == local
    assert read(f"pipe:cat {shlex.quote(str(tar))}") == local
    wait_until_none_streams()


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
    assert "there is no such shard" in refusal(tmp_path / "missing.tar")
    (tmp_path / "text.tar").write_bytes(b"text" * 1000)
    assert "not an uncompressed tar" in refusal(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert "unpack it first" in refusal(tmp_path / "zipped.tar")
    (tmp_path / "empty.tar").touch()
    assert "not an uncompressed tar (empty file)" in refusal(tmp_path / "empty.tar")
    assert "cannot be opened" in refusal(tmp_path)


def test_missing_on_the_server(server: Faulty) -> None:
    message = refusal(f"{server.url}/missing.tar?token=secret")
    assert f"{server.url}/missing.tar" in message
    assert "HTTP 404" in message
    assert "secret" not in message


def test_cut_on_the_server(tar: Path, server: Faulty) -> None:
    tar.write_bytes(tar.read_bytes()[:2048])
    message = refusal(f"{server.url}/a.tar")
    assert f"{server.url}/a.tar" in message
    assert "cut short or damaged" in message


def cut_at(num_bytes: int, num_times: int, *, has_ranges: bool):
    def fault(handler: Handler, count: int) -> bool:
        if not has_ranges:
            del handler.headers["Range"]
        return count < num_times and handler.cut(num_bytes)

    return fault


@pytest.mark.parametrize("has_ranges", [True, False], ids=["ranges", "no ranges"])
def test_broken_connections_are_mended(
    tar: Path, server: Faulty, has_ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_STREAM_BYTES", 1000)
    server.faults = cut_at(3000, 2, has_ranges=has_ranges)
    assert read(f"{server.url}/a.tar") == read(tar)
    assert server.gets["/a.tar"] >= 3


def test_server_that_stays_broken_stops_the_run(tar: Path, server: Faulty) -> None:
    server.faults = cut_at(3000, 100, has_ranges=True)
    message = refusal(f"{server.url}/a.tar")
    assert f"{server.url}/a.tar: could not be fetched in 3 tries" in message


def test_command_that_fails_once_is_run_again(tar: Path, tmp_path: Path) -> None:
    mark = shlex.quote(str(tmp_path / "mark"))
    failing = (
        f"pipe:head -c 5000 {tar}; test -e {mark} && tail -c +5001 {tar} || (: > {mark}; exit 3)"
    )
    assert read(failing) == read(tar)


def test_exit_status_counts_after_the_end_mark(tar: Path) -> None:
    message = refusal(f"pipe:cat {tar}; exit 3")
    assert "exit 3" in message
    assert str(tar) in message


def test_second_try_must_bring_the_same(tar: Path, tmp_path: Path) -> None:
    mark = shlex.quote(str(tmp_path / "mark"))
    once = f"test -e {mark} || (: > {mark}; exit 3)"
    other = f"pipe:test -e {mark} && tr 1 2 < {tar} || cat {tar}; {once}"
    assert "a second try brought other bytes" in refusal(other)
    Path(tmp_path / "mark").unlink()
    shorter = f"pipe:test -e {mark} && head -c 3000 {tar} || cat {tar}; {once}"
    assert "a second try brought other bytes" in refusal(shorter)


def test_reading_ahead_is_bounded_and_ends_when_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_STREAM_BYTES", 10_000)
    log = tmp_path / "log"
    command = f"head -c 3000000 /dev/zero | tee {shlex.quote(str(log))}"
    stream = RemoteStream(f"pipe:{command}", PATIENCE)
    assert stream.read(100) == bytes(100)
    size = -1
    while size != (size := log.stat().st_size):
        time.sleep(0.2)
    assert 0 < size < 400_000  # parts of 10 kB here, two pipes of 64 kB, what tee and head hold
    stream.close()
    wait_until_none_streams()
