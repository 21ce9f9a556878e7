"""Servers on loopback for tests of remote shards: one that fails on purpose, and one of S3."""

import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


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

    def serve(self, root: Path) -> "Faulty":
        """Begin anew with another folder; whoever waits is released. Clients may stay."""
        self.released.set()
        self.root, self.faults = root, lambda handler, count: False
        self.gets, self.heads, self.released = Counter(), Counter(), threading.Event()
        return self


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
        with suppress(OSError):  # the other side has gone already
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
