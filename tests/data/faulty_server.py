"""A real HTTP server that serves a folder, with the faults that a test asks for.

::

    faults = {"a.tar": [Fault(times=2, status=500), Fault(times=1, cut_after=1000)]}
    with FaultyServer(folder, faults) as server:
        fetch(f"{server.url}/a.tar")      # 500, 500, a cut, then fine
        server.requests                   # [Request(path="a.tar", range=None, sent=0), …]

It keeps HTTP/1.1 connections alive, answers HEAD and ranges, and sends strong ETags, unless told otherwise. It can
also be used as a proxy: of an absolute address it reads the path only. :class:`FaultyProxy` passes requests on to
another server.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request; several things may. Offsets are those in the body of the answer."""

    times: int | None = None
    """How many requests of a path have this fault; None: all."""
    of: str = ""
    """Only requests that ask for "ranges", or for the "whole" file, have this fault."""
    status: int = 0
    """Answer this status and no file."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent as well (Retry-After, Location, a Content-Range of its own …)."""
    delay_s: float = 0.0
    """Seconds before the answer begins."""
    stall_after: int | None = None
    """Send so many bytes, then nothing more, and keep the connection."""
    trickle_after: int | None = None
    """Send so many bytes, then one every ``trickle_s``."""
    trickle_s: float = 0.05
    cut_after: int | None = None
    """Send so many bytes, then close."""
    reset: bool = False
    """Where ``cut_after`` closes: with a reset instead of an orderly end."""
    wrong_bytes: bool = False
    """Send other bytes, as many as there are."""
    length_off_by: int = 0
    """Added to Content-Length; the body stays as it is."""
    no_length: bool = False
    """Send no Content-Length; the end of the connection is the end of the file."""
    chunked: bool = False
    """Send in chunks, which tells no length either."""
    body: bytes = b""
    """What is sent with ``status``."""


@dataclass
class Request:
    """One request, listed when it begins."""

    path: str
    """Relative to the folder, without query."""
    range: str | None
    """The Range header."""
    sent: int = 0
    """Bytes of the body so far."""
    headers: Message = field(default_factory=Message)
    """By name, in upper or lower case."""


class FaultyServer:
    """Serves ``folder`` at :attr:`url` while it is entered. Left and entered again, it has the same address.

    Args:
        folder: what is served.
        faults: by path relative to the folder, "*" for all other paths: a fault, or several that come one after the
            other. After the last of them, the path is served without faults.
        ranges: whether Range headers are answered; if not, the whole file is sent.
        etags: whether files carry an ETag.
        conditions: whether If-Range and If-Match are looked at.
        tls: files of a certificate and its key, to be asked by ``https://``.
    """

    def __init__(
        self,
        folder: str | Path,
        faults: Mapping[str, Fault | Sequence[Fault]] | None = None,
        *,
        ranges: bool = True,
        etags: bool = True,
        conditions: bool = True,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.ranges, self.etags, self.conditions, self.tls = ranges, etags, conditions, tls
        self.requests: list[Request] = []
        """All requests in the order in which they came."""
        self.connections = 0
        """Connections that were made."""
        self.open_requests = 0
        """Requests that are being answered."""
        self.closing = threading.Event()
        self._port = 0
        self._lock = threading.Lock()
        self.set_faults(faults or {})
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> FaultyServer:
        outer = self

        class Handler(self._handler()):  # type: ignore[misc]
            server_of_faults = outer

        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        if self.tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.tls)
            # The handshake is made by the thread of the connection.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def set_faults(self, faults: Mapping[str, Fault | Sequence[Fault]]) -> None:
        """From now on these faults, for requests that are counted anew."""
        listed = {path: [given] if isinstance(given, Fault) else list(given) for path, given in faults.items()}
        with self._lock:
            self._faults, self._seen = listed, Counter[str]()

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``, or ``https``, without a slash at the end."""
        assert self._port
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self._port}"

    def gets(self, path: str | None = None) -> int:
        """How many requests came, for a path or for all."""
        return sum(path in (None, request.path) for request in list(self.requests))

    def wait_for(self, path: str, sent: int = 0, timeout_s: float = 20.0) -> None:
        """Wait until a request for this path has been sent so many bytes."""
        deadline = time.monotonic() + timeout_s
        while not any(request.path == path and request.sent >= sent for request in list(self.requests)):
            assert time.monotonic() < deadline, f"nobody asked for {path}"
            time.sleep(0.01)

    def _handler(self) -> type[_Handler]:
        return _Handler

    @contextmanager
    def _begun(self, path: str, headers: Message) -> Iterator[tuple[Request, Fault]]:
        request = Request(path, headers.get("Range"), headers=headers)
        with self._lock:
            self.requests.append(request)
            self.open_requests += 1
            number = self._seen[path]
            self._seen[path] += 1
        try:
            yield request, self._fault(path, number, "whole" if request.range is None else "ranges")
        finally:
            with self._lock:
                self.open_requests -= 1

    def _fault(self, path: str, number: int, asked: str) -> Fault:
        for fault in self._faults.get(path, self._faults.get("*", [])):
            if fault.of not in ("", asked):
                continue
            if fault.times is None or number < fault.times:
                return fault
            number -= fault.times
        return Fault()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Clients that are killed are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_faults: FaultyServer

    def log_message(self, *_: object) -> None:
        """Silence."""

    def setup(self) -> None:
        with self.server_of_faults._lock:
            self.server_of_faults.connections += 1
        super().setup()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        with (
            suppress(ConnectionError, ssl.SSLError),
            self.server_of_faults._begun(path, self.headers) as (request, fault),
        ):
            self._answer(request, fault)

    do_HEAD = do_GET  # noqa: N815 - as the standard library calls it

    def _answer(self, request: Request, fault: Fault) -> None:
        server = self.server_of_faults
        if server.closing.wait(fault.delay_s):
            self.close_connection = True
            return
        if fault.status:
            self._begin(fault.status, {"Content-Length": str(len(fault.body)), **fault.headers})
            self.wfile.write(fault.body)
            return
        self._answer_with_file(request, fault)

    def _answer_with_file(self, request: Request, fault: Fault) -> None:
        server = self.server_of_faults
        file = server.folder / request.path
        if not file.is_file():
            self._begin(404, {"Content-Length": "0"})
            return
        data = file.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        if server.conditions and self.headers.get("If-Match", etag) != etag:
            self._begin(412, {"Content-Length": "0"})
            return
        headers = {"Last-Modified": formatdate(file.stat().st_mtime, usegmt=True)}
        if server.etags:
            headers["ETag"] = etag
        if fault.wrong_bytes:
            data = _spoilt(data)
        status, part = 200, self._part(request, etag)
        if part is not None:
            start, end = part[0], min(part[1] + 1, len(data))
            if start >= len(data):
                self._begin(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(data)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data = data[start:end]
        if fault.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif fault.no_length:
            headers["Connection"] = "close"
            self.close_connection = True
        else:
            headers["Content-Length"] = str(len(data) + fault.length_off_by)
        self._begin(status, {**headers, **fault.headers})
        if self.command == "HEAD":
            return
        self._send_body(request, fault, data)

    def _part(self, request: Request, etag: str) -> tuple[int, int] | None:
        """First and last byte asked for, if a range is and may be answered."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "")
        if match is None or not self.server_of_faults.ranges:
            return None
        if self.server_of_faults.conditions and self.headers.get("If-Range", etag) != etag:
            return None
        return int(match[1]), int(match[2] or 1 << 62)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_body(self, request: Request, fault: Fault, data: bytes) -> None:
        closing = self.server_of_faults.closing
        stops = [at for at in (fault.stall_after, fault.trickle_after, fault.cut_after) if at is not None]
        until = min([len(data), *stops])
        for at in range(0, until, _BLOCK):
            self._send(request, fault, data[at : min(at + _BLOCK, until)])
        if fault.cut_after is not None and fault.cut_after <= until:
            self._cut(fault.reset)
            return
        if fault.stall_after is not None and fault.stall_after <= until:
            closing.wait()
            self.close_connection = True
            return
        for at in range(until, len(data)):
            if closing.wait(fault.trickle_s):
                self.close_connection = True
                return
            self._send(request, fault, data[at : at + 1])
        if fault.chunked:
            self.wfile.write(b"0\r\n\r\n")
        elif fault.length_off_by:
            self.close_connection = True

    def _send(self, request: Request, fault: Fault, block: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if fault.chunked else block)
        request.sent += len(block)

    def _cut(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # the linger of 0 makes it a reset
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


def _spoilt(data: bytes) -> bytes:
    return bytes(255 - byte for byte in data[:1000]) + data[1000:]


class _ProxyHandler(_Handler):
    def _answer_with_file(self, request: Request, fault: Fault) -> None:
        proxy = self.server_of_faults
        assert isinstance(proxy, FaultyProxy)
        connection = http.client.HTTPConnection(proxy.upstream, timeout=20)
        connection.request("GET", self.path, headers=dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        kept = ("etag", "last-modified", "content-type", "content-range", "x-amz-request-id")
        headers = {name: value for name, value in answer.getheaders() if name.lower() in kept}
        if fault.wrong_bytes:
            data = _spoilt(data)
        self._begin(answer.status, {**headers, "Content-Length": str(len(data)), **fault.headers})
        self._send_body(request, fault, data)


class FaultyProxy(FaultyServer):
    """Passes requests on to ``upstream``, ``HOST:PORT``, with faults as :class:`FaultyServer` has them."""

    def __init__(
        self,
        upstream: str,
        faults: Mapping[str, Fault | Sequence[Fault]] | None = None,
        *,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        super().__init__("", faults, tls=tls)
        self.upstream = upstream

    def _handler(self) -> type[_Handler]:
        return _ProxyHandler
