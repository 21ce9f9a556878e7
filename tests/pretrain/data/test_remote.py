import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from pretrain.data import remote
from pretrain.data import remote as download_module
from pretrain.data.remote import (
    NotThereError,
    Patience,
    RemoteFile,
    download,
    retried,
)
from tests.pretrain.data.servers import Faulty, Handler, faulty

DATA = os.urandom(300_000)
PATIENCE = Patience(retries=3, timeout_seconds=0.5)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(download_module, "CHUNK_BYTES", 100_000)
    (tmp_path / "a.tar").write_bytes(DATA)
    with faulty(tmp_path) as state:
        yield state


def fetch(server: Faulty, *, has_ranges: bool = True, patience: Patience = PATIENCE) -> bytes:
    url = f"{server.url}/a.tar"
    return b"".join(download(RemoteFile(url, len(DATA), "", has_ranges), patience))


def on_get(number: int, act: Callable[[Handler], bool]) -> Callable[[Handler, int], bool]:
    """A fault that happens at the GET of this number only, over all ranges."""
    return lambda handler, count: count == number and act(handler)


def test_whole_file_in_parts(server: Faulty) -> None:
    assert fetch(server) == DATA
    assert server.gets["/a.tar"] == 3


@pytest.mark.parametrize(
    "act",
    [
        lambda handler: handler.refuse(503),
        lambda handler: handler.refuse(500),
        lambda handler: handler.refuse(429),
        lambda handler: handler.cut(40_000),
        lambda handler: handler.cut(40_000, wait=True),
        lambda handler: handler.cut(0, wait=True),
    ],
    ids=["503", "500", "429", "connection cut", "stall in the middle", "no answer"],
)
def test_only_the_failed_part_is_fetched_again(server, act):
    server.faults = on_get(1, act)
    assert fetch(server) == DATA
    assert server.gets["/a.tar"] == 4


@pytest.mark.parametrize(
    "act",
    [lambda handler: handler.refuse(503), lambda handler: handler.cut(250_000)],
    ids=["503", "cut"],
)
def test_stream_begins_again(server: Faulty, act: Callable[[Handler], bool]) -> None:
    server.faults = lambda handler, count: count < 3 and act(handler)
    assert fetch(server, has_ranges=False) == DATA
    assert server.gets["/a.tar"] == 4


def test_server_that_ignores_ranges_is_read_as_a_stream(server: Faulty) -> None:
    def without_range(handler: Handler, count: int) -> bool:
        del handler.headers["Range"]
        return False

    server.faults = without_range
    assert fetch(server) == DATA
    assert server.gets["/a.tar"] <= 3


def test_wrong_length_is_no_file(server: Faulty) -> None:
    server.faults = lambda handler, count: short_answer(handler)
    with pytest.raises(UserError, match=r"4 tries, the last one: EOFError: 1,000 bytes came inst"):
        fetch(server)


def short_answer(handler: Handler) -> bool:
    handler.send_response(206)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(DATA[:1000])
    return True


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda handler: handler.refuse(502), "HTTP 502"),
        (lambda handler: handler.cut(10, wait=True), "no byte for 0.1 s (timeout)"),
        (lambda handler: handler.cut(10), "ClientPayloadError"),
    ],
)
def test_after_the_last_try_one_clear_error(server, act, reason):
    server.faults = lambda handler, count: act(handler)
    patience = Patience(retries=2, timeout_seconds=0.1)
    with pytest.raises(UserError) as caught:
        fetch(server, patience=patience)
    text = str(caught.value)
    assert f"{server.url}/a.tar: could not be fetched in 3 tries, the last one: {reason}" in text
    assert "data.read_retries and data.read_timeout_seconds" in text
    assert server.gets["/a.tar"] == 3


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"a.tar: there is no such file \(HTTP 404\); check the address"),
        (403, r"a.tar: not allowed \(HTTP 403\); check the credentials"),
        (401, r"a.tar: not allowed \(HTTP 401\)"),
        (400, r"a.tar: the server refuses \(HTTP 400"),
    ],
)
def test_what_will_not_change_is_told_at_once(server: Faulty, status: int, message: str) -> None:
    server.faults = lambda handler, count: handler.refuse(status)
    with pytest.raises(UserError, match=message) as caught:
        fetch(server)
    assert isinstance(caught.value, NotThereError) is (status == 404)
    assert server.gets["/a.tar"] == 1


def test_delays_grow_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    monkeypatch.setattr(time, "sleep", delays.append)

    def broken() -> None:
        raise ConnectionResetError("gone")

    with pytest.raises(UserError, match=r"in 11 tries, the last one: ConnectionResetError: gone"):
        retried(broken, "http://h/a", Patience(retries=10))
    for number, delay in enumerate(delays):
        longest = min(30.0, 0.5 * 2**number)
        assert longest / 2 <= delay <= longest
    assert len({round(delay / 30, 6) for delay in delays[6:]}) > 1  # jitter


def run(command: str, size: int | None = None, patience: Patience = PATIENCE) -> bytes:
    return b"".join(download(RemoteFile(f"pipe:{command}", size, ""), patience))


def test_output_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    (tmp_path / "a.tar").write_bytes(DATA)
    assert run(f"cat {tmp_path}/a.tar | cat", len(DATA)) == DATA
    once = f"cat {tmp_path}/a.tar; test -e {tmp_path}/seen || {{ touch {tmp_path}/seen; exit 3; }}"
    assert run(once) == DATA  # fails the first time, after all its output
    with pytest.raises(
        UserError, match=r"^pipe:echo x; exit 3: could not .* 4 tries.*ended with exit status 3"
    ):
        run("echo x; exit 3")
    with pytest.raises(UserError, match=r"the command cannot be run \(exit status 127\); check"):
        run("no-such-command-here 2>/dev/null")
    with pytest.raises(UserError, match=r"EOFError: 2 bytes came instead of 3"):
        run("echo x", 3)


def test_command_that_stalls_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"in 1 tries, the last one: no byte for 0.2 s"):
        run("echo x; exec sleep 60", patience=Patience(retries=0, timeout_seconds=0.2))
    assert time.monotonic() - start < 10


def test_second_try_must_bring_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    (tmp_path / "a.tar").write_bytes(b"1" * 5000)
    once = f"test -e {tmp_path}/mark || (: > {tmp_path}/mark; exit 3)"
    for second in ("tr 1 2 <", "head -c 3000"):
        command = f"test -e {tmp_path}/mark && {second} {tmp_path}/a.tar || cat {tmp_path}/a.tar"
        with pytest.raises(UserError, match="a second try brought other bytes"):
            run(f"{command}; {once}")
        (tmp_path / "mark").unlink()
