"""A web server on loopback that serves bytes, and fails as told."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Seen(NamedTuple):
    """A request, and how many bytes of a file it was given."""

    path: str
    range: str | None
    status: int
    sent: int


@dataclass
class Fault:
    """What happens to one request instead of the right answer."""

    status: int = 0  # 0 = the right one
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None  # bytes of the body, then the connection ends
    reset: bool = False  # it ends with a reset
    hold: threading.Event | None = None  # wait there for this, before it ends


@dataclass
class Host:
    """`files` by path; `faults` are taken by one request each, in order."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)  # of the answers, by path
    etag: bool = True
    weak: bool = False
    dated: bool = False
    if_range: bool = True
    bare: bool = False  # a 206 says nothing of the version
    piece: int | None = None  # the most bytes of a 206
    ranges: bool = True
    chunked: bool = False
    seen: list[Seen] = field(default_factory=list)
    reached: threading.Event = field(default_factory=threading.Event)  # set before a fault's hold
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.seen)

    def validators(self, body: bytes) -> dict[str, str]:
        found = {}
        if self.etag:
            found["ETag"] = f'{"W/" if self.weak else ""}"{hash(body) & 0xFFFFFFFF:x}"'
        if self.dated:
            found["Last-Modified"] = f"Thu, 01 Jan 2026 00:{len(body) % 60:02}:00 GMT"
        return found


@contextlib.contextmanager
def serving(host: Host) -> Iterator[Host]:
    """Serves until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            fault = host.faults.pop(0) if host.faults else Fault()
            body = host.files.get(self.path)
            asked = self.headers.get("Range")
            if fault.status or body is None:
                host.seen.append(Seen(self.path, asked, fault.status or 404, 0))
                self.send_response(fault.status or 404)
                for name, value in {"Content-Length": "0", **fault.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            validators = host.validators(body)
            strong = [value for value in validators.values() if not value.startswith("W/")]
            same = self.headers.get("If-Range") in (None, *strong)
            start, status = 0, 200
            if asked and host.ranges and (same or not host.if_range):
                match = re.fullmatch(r"bytes=(\d+)-", asked)
                assert match is not None
                start, status = int(match[1]), 206
                if start >= len(body):
                    status = 416
            end = min(len(body), start + host.piece) if status == 206 and host.piece else len(body)
            part = b"" if status == 416 else body[start:end][: fault.after]
            host.seen.append(Seen(self.path, asked, status, len(part)))
            self.send_response(status)
            if status == 206 and host.bare:
                validators = {}
            for name, value in {**validators, **host.headers.get(self.path, {})}.items():
                self.send_header(name, value)
            if status == 416:
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
            elif host.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(end - start))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
            self.end_headers()
            if host.chunked and part:
                self.wfile.write(b"%x\r\n" % len(part) + part + b"\r\n")
            else:
                with contextlib.suppress(ConnectionError):  # the client was killed
                    self.wfile.write(part)
            if fault.after is not None:
                host.reached.set()
                if fault.hold is not None:
                    fault.hold.wait(60)
                if fault.reset:
                    never = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, never)
                self.close_connection = True
            elif host.chunked:
                self.wfile.write(b"0\r\n\r\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    host.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_ports() -> int:
    """The first of two neighbouring free ports."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", port + 1))
                return port
