"""Servers on loopback for tests of remote shards: nginx, and a handler that fails on purpose."""

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
CONFIG = """
daemon off; master_process off; worker_processes 1;
pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        location / {{ }}
        location /whole/ {{ alias {root}/; max_ranges 0; }}
        location /slow/ {{ alias {root}/; limit_rate {rate}; }}
        location /closed/ {{ return 403; }}
        location /away/ {{ return 302 /$request_id; }}
    }}
}}
"""


def require_server(found: object, name: str) -> None:
    """Skip the test if a server is not installed, or fail if it must be."""
    if found:
        return
    if os.environ.get("REQUIRE_SERVERS") == "1":
        pytest.fail(f"{name} is not installed")
    pytest.skip(f"{name} is not installed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Nginx:
    """A running nginx. `/` serves with ranges, `/whole/` without, `/slow/` at a limited rate."""

    url: str
    folder: Path

    def requests(self) -> list[str]:
        """Request lines with their status, as 'GET /a.tar 206'."""
        lines = (self.folder / "access.log").read_text().splitlines()
        found = [re.search(r'"(\S+) (\S+) HTTP/1.1" (\d+)', line) for line in lines]
        return [" ".join(match.groups()) for match in found if match]


@contextmanager
def nginx(root: Path, folder: Path, rate: str = "200k") -> Iterator[Nginx]:
    """Serve `root` from nginx with configuration, logs and pid in `folder`."""
    require_server(NGINX, "nginx")
    folder.mkdir()
    port = free_port()
    config = CONFIG.format(folder=folder, port=port, root=root, rate=rate)
    (folder / "nginx.conf").write_text(config)
    command = [str(NGINX), "-p", str(folder), "-e", str(folder / "error.log"),
               "-c", str(folder / "nginx.conf")]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        _wait_for(port, process)
        yield Nginx(f"http://127.0.0.1:{port}", folder)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, "the server ended at once"
        time.sleep(0.05)
    raise AssertionError("the server does not listen")


@dataclass
class Faulty:
    """A server that serves a folder, and does what `faults` says to a request first.

    Attributes:
        url: Its address.
        faults: Called with the handler and the number of earlier GETs for this path; returns true
            if it has answered.
        gets: Number of GETs per path.
        heads: Number of HEADs per path.
    """

    url: str
    root: Path
    faults: Callable[["Handler", int], bool] = lambda handler, count: False
    gets: Counter[str] = field(default_factory=Counter)
    heads: Counter[str] = field(default_factory=Counter)
    released: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """Serves files with ranges."""

    protocol_version = "HTTP/1.1"
    state: Faulty

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.state.heads[self.path] += 1
        self.send_file(with_body=False)

    def do_GET(self) -> None:
        count = self.state.gets[self.path]
        self.state.gets[self.path] += 1
        with suppress(BrokenPipeError, ConnectionResetError):
            if not self.state.faults(self, count):
                self.send_file(with_body=True)

    def content(self) -> bytes:
        return (self.state.root / self.path.lstrip("/").split("?")[0]).read_bytes()

    def send_file(self, with_body: bool) -> None:
        try:
            data = self.content()
        except OSError:
            self.send_error(404)
            return
        status, first = 200, 0
        if wanted := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, total = int(wanted[1]), len(data)
            data = data[first : int(wanted[2]) + 1]
            status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def refuse(self, status: int) -> bool:
        self.send_error(status)
        self.close_connection = True
        return True

    def cut(self, num_bytes: int, wait: bool = False) -> bool:
        """Announce the whole answer, send some bytes, then hang up or fall silent."""
        data = self.content()
        if wanted := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/*")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:num_bytes])
        self.wfile.flush()
        if wait:
            self.state.released.wait(20)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True


@contextmanager
def faulty(root: Path) -> Iterator[Faulty]:
    """Serve `root` from a handler whose faults the test sets."""
    handler = type("BoundHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    state = Faulty(f"http://127.0.0.1:{server.server_address[1]}", root)
    handler.state = state
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server in memory; gives its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
