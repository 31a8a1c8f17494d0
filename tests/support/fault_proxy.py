"""A proxy in front of an S3 server that breaks what networks and stores break."""

from __future__ import annotations

import fcntl
import http.client
import re
import socket
import struct
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

SLOW_PIECE_BYTES = 10_000
RECEIVE_BUFFER_BYTES = 256 << 10


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
    end_answer_at: int | None = None
    """The same with an orderly end of the connection, as from a proxy that closes it: to a client that is no error by itself."""
    corrupt_answer: bool = False
    """The last byte of the answer's body is another one."""
    take_bytes_per_second: float | None = None
    """The request's body is read so slowly."""
    status: int = 0
    """Answered so, with the S3 error ``code``; the store sees nothing."""
    code: str = ""
    page: str = ""
    """Answered with ``status`` instead of an S3 error."""
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
    away: bool = False
    """Connections that are open still are reset at their next request."""
    bytes_taken: int = 0
    """Of requests' bodies."""
    bytes_given: int = 0
    """Of answers' bodies."""


class FaultProxy:
    """Forwards everything to ``upstream``, the Host header unchanged, so that signatures stay right."""

    def __init__(self, upstream: str) -> None:
        self.faults = S3Faults()
        proxy = self
        host = urlsplit(upstream).netloc

        class Handler(_Handler):
            faults = proxy.faults
            upstream = host

        self._handler = Handler
        self._port = 0
        self.come_back()
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def come_back(self) -> None:
        """Listen, at the same port as before."""
        self.faults.away = False
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        # Else the kernel takes megabytes of a request on behalf of a proxy that reads slowly.
        self._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def go_away(self) -> None:
        """Connections are refused from now on; open ones end at their next request."""
        self.faults.away = True
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.faults.over.set()
        self.go_away()


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
        if self.faults.away:
            return self._reset()
        self.faults.requests.append((self.command, self.path))
        fault = self._next_fault()
        if fault.before is not None:
            fault.before()
        if fault.reset_request_at is not None:
            self.faults.bytes_taken += len(self.rfile.read(fault.reset_request_at))
            return self._reset()
        body = self._take(int(self.headers.get("Content-Length") or 0), fault.take_bytes_per_second)
        if fault.silent:
            self.faults.over.wait()
            return self._reset()
        if fault.status:
            text = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>" if fault.code else fault.page
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
        if fault.corrupt_answer:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault.reset_answer_at is not None:
            self._begin_answer(answer.status, headers, data, fault.reset_answer_at)
            return self._reset()
        if fault.end_answer_at is not None:
            self._begin_answer(answer.status, headers, data, fault.end_answer_at)
            return self._end()
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

    def _end(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _take(self, length: int, bytes_per_second: float | None) -> bytes:
        body = b""
        while len(body) < length and not self.faults.over.is_set():
            piece = self.rfile.read(length if bytes_per_second is None else min(length - len(body), SLOW_PIECE_BYTES))
            if not piece:
                break  # the client gave up
            body += piece
            self.faults.bytes_taken += len(piece)
            if bytes_per_second is not None:
                self.faults.over.wait(len(piece) / bytes_per_second)
        return body

    def _begin_answer(self, status: int, headers: dict[str, str], data: bytes, at: int) -> None:
        """The first ``at`` bytes of an answer; returns once they have arrived, for a reset throws away what is under way."""
        lines = [
            f"HTTP/1.1 {status} X",
            *(f"{k}: {v}" for k, v in headers.items()),
            f"Content-Length: {len(data)}",
            "",
            "",
        ]
        head = "\r\n".join(lines).encode()
        self.connection.sendall((head + data)[:at])
        self.faults.bytes_given += min(len(data), max(0, at - len(head)))
        while unsent_bytes(self.connection) and not self.faults.over.wait(0.002):
            pass

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
        self.faults.bytes_given += len(body)


def unsent_bytes(connection: socket.socket) -> int:
    """Bytes that the peer's kernel has not acknowledged."""
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0])
