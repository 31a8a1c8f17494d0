"""A proxy in front of an S3 server that breaks what networks and stores break."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit


@dataclass
class Fault:
    """What goes wrong with requests whose ``METHOD path`` matches ``where``."""

    where: str
    times: int = 1
    """-1 is for ever."""
    reset_request_at: int | None = None
    """The connection is reset once so many bytes of the request's body were read; the store sees nothing."""
    reset_answer_at: int | None = None
    """The store does what was asked; the connection is reset after so many bytes of its answer, the head included."""
    status: int = 0
    """Answered so, with the S3 error ``code``; the store sees nothing."""
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    silent: bool = False
    """Read, and never answered."""
    trickle_seconds: float | None = None
    """The answer's body comes in single bytes, with this pause after each."""
    before: Callable[[], None] | None = None
    """Called first."""


@dataclass
class S3Faults:
    """What goes wrong. Counters count down; -1 is for ever."""

    unavailable: int = 0
    """Requests answered 503 SlowDown."""
    drop_after_bytes: int = 0
    """GET bodies end after so many bytes…"""
    drops: int = 0
    """…so many times."""
    corrupt: int = 0
    """GET bodies with a flipped last byte."""
    status: int = 0
    """GET requests for objects are answered so, with an S3 error…"""
    statuses: int = 0
    """…so many times."""
    ranges_ignored: bool = False
    """GET requests are answered with the whole object, as by servers that know no ranges (the first one must ask for it all)."""
    whole: dict[str, bytes] = field(default_factory=dict)
    content_range: str = ""
    """Content-Range of partial answers, where it is to be a wrong one."""
    corrupt_uploads: int = 0
    """PUT bodies with a flipped byte."""
    expired: int = 0
    """Requests answered 400 ExpiredToken."""
    refused_deletes: int = 0
    """DELETE requests answered 403 AccessDenied."""
    fail_part: int = 0
    """The multipart part of this number is answered 500, always."""
    script: list[Fault] = field(default_factory=list)
    """Of those that match, the first that is not used up happens."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set when the proxy ends: silent and trickling answers end."""
    requests: list[tuple[str, str]] = field(default_factory=list)


class FaultProxy:
    """Forwards everything to ``upstream``, the Host header unchanged, so that signatures stay right."""

    def __init__(self, upstream: str) -> None:
        self.faults = S3Faults()
        proxy = self
        host = urlsplit(upstream).netloc

        class Handler(_Handler):
            faults = proxy.faults
            upstream = host

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.faults.over.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    faults: S3Faults
    upstream: str
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._forward()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        self.faults.requests.append((self.command, self.path))
        fault = self._next_fault()
        if fault.before is not None:
            fault.before()
        if fault.reset_request_at is not None:
            self.rfile.read(fault.reset_request_at)
            return self._reset()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault.silent:
            self.faults.over.wait()
            return self._reset()
        if fault.status:
            text = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>" if fault.code else ""
            return self._answer(fault.status, fault.headers, b"" if self.command == "HEAD" else text.encode())
        if self._happens("unavailable"):
            return self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
        if self._happens("expired"):
            return self._answer(400, {}, b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>")
        if self.command == "DELETE" and self._happens("refused_deletes"):
            return self._answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>no deletes</Message></Error>")
        if self.faults.fail_part and f"partNumber={self.faults.fail_part}&" in f"{self.path}&":
            return self._answer(500, {}, b"<Error><Code>InternalError</Code><Message>broken</Message></Error>")
        if self.command == "GET" and "list-type" not in self.path and self._happens("statuses"):
            return self._answer(self.faults.status, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
        if self.command == "PUT" and body and self._happens("corrupt_uploads"):
            body = bytes([body[0] ^ 1]) + body[1:]
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        headers = {
            k: v
            for k, v in answer.getheaders()
            if k.lower() not in ("connection", "transfer-encoding", "content-length")
        }
        if self.faults.content_range and answer.status == 206:
            headers["Content-Range"] = self.faults.content_range
        length = answer.getheader("Content-Length")
        connection.close()
        if fault.reset_answer_at is not None:
            return self._cut(answer.status, headers, data, fault.reset_answer_at)
        if fault.trickle_seconds is not None:
            return self._trickle(answer.status, headers, data, fault.trickle_seconds)
        if self.command == "HEAD":
            return self._answer(answer.status, headers, b"", int(length or 0))
        reading = self.command == "GET" and answer.status in (200, 206) and "list-type" not in self.path
        status = answer.status
        if reading and self.faults.ranges_ignored:
            data, status = self.faults.whole.setdefault(self.path, data), 200
            headers.pop("Content-Range", None)
        if reading and data and self._happens("corrupt"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        if reading and len(data) > self.faults.drop_after_bytes and self._happens("drops"):
            self._answer(status, headers, data[: self.faults.drop_after_bytes], len(data))
            self.close_connection = True
            self.connection.close()
            return None
        return self._answer(status, headers, data)

    def _next_fault(self) -> Fault:
        for fault in self.faults.script:
            if fault.times and re.search(fault.where, f"{self.command} {self.path}"):
                fault.times -= fault.times > 0
                return fault
        return Fault("")

    def _reset(self) -> None:
        """A RST, as from a peer that died, instead of an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def _cut(self, status: int, headers: dict[str, str], data: bytes, at: int) -> None:
        lines = [
            f"HTTP/1.1 {status} X",
            *(f"{k}: {v}" for k, v in headers.items()),
            f"Content-Length: {len(data)}",
            "",
            "",
        ]
        self.connection.sendall(("\r\n".join(lines).encode() + data)[:at])
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _trickle(self, status: int, headers: dict[str, str], data: bytes, seconds: float) -> None:
        self._answer(status, headers, b"", len(data))
        for i in range(len(data)):
            self.connection.sendall(data[i : i + 1])
            if self.faults.over.wait(seconds):
                return self._reset()
        return None

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # the client went away

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            self.close_connection = True

    def _happens(self, fault: str) -> bool:
        left = getattr(self.faults, fault)
        if left > 0:
            setattr(self.faults, fault, left - 1)
        return bool(left)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
