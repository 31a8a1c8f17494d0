"""What supervisors of several pods say to each other: JSON objects, one a line, over TCP."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

KEEP_ALIVE_SECONDS, KEEP_ALIVE_PAUSE, KEEP_ALIVE_TRIES = 10, 5, 4
"""A pod whose node lost its power says no more: after half a minute of silence the kernel takes the connection for broken."""
SEND_SECONDS = 10.0
LONGEST = 1 << 20
Message = dict[str, Any]


class Line:
    """One connection. An end that cannot be reached any more reads as closed, and no error is raised."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_ALIVE_PAUSE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_ALIVE_TRIES)
        silence = 1000 * (KEEP_ALIVE_SECONDS + KEEP_ALIVE_PAUSE * KEEP_ALIVE_TRIES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence)
        self._connection = connection
        self._begun = b""
        self.closed = False

    def fileno(self) -> int:
        """Readable when something was said, or the other end is gone."""
        return self._connection.fileno()

    def send(self, **message: object) -> None:
        """Say something; if the other end is gone, that shows when it is read from."""
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[Message]:
        """What was said since; call it when readable."""
        if self.closed:
            return []
        try:
            data = self._connection.recv(65536)
        except OSError:
            data = b""
        *whole, self._begun = (self._begun + data).split(b"\n")
        if not data or len(self._begun) > LONGEST:
            self.close()
        messages = [_read(line) for line in whole]
        return [message for message in messages if message is not None]

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self._connection.close()


def _read(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
