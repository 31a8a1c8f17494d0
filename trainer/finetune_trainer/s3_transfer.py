"""What transfers in both directions share."""

from __future__ import annotations

import base64
import hashlib
import io
import time
from collections.abc import Callable

OnBytes = Callable[[int], None]
CHUNK_BYTES = 1 << 20
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
IDLE_ATTEMPTS = 4
"""Attempts in a row that bring no byte before a transfer is given up (and, by the caller, waited for)."""
STALL_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 10_000
"""A transfer slower than this for STALL_SECONDS counts as one that stands still: timeouts of sockets begin anew with each byte."""


class TooSlow(Exception):
    """Bytes arrive, but so few that it makes no difference."""


class Pace:
    """Raises TooSlow where a stretch of STALL_SECONDS moved less than SLOWEST_BYTES_PER_SECOND."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._bytes = 0

    def moved(self, count: int) -> None:
        """``count`` more bytes; 0 for a try that brought none."""
        self._bytes += count
        seconds = self._clock() - self._since
        if seconds < STALL_SECONDS:
            return
        if self._bytes < SLOWEST_BYTES_PER_SECOND * seconds:
            raise TooSlow(
                f"{self._bytes:,} bytes in {seconds:.0f} seconds, expected {SLOWEST_BYTES_PER_SECOND:,} a second at least"
            )
        self._since, self._bytes = self._clock(), 0


class PacedBody(io.BytesIO):
    """A request's body that is sent in small pieces.

    ``bytes`` are sent by one sendall, whose timeout (urllib3's for connecting, 5 s, on a new connection) is for all of them: a part
    of 16 MiB would need 3.3 MB/s. Pieces have a timeout each, and the pace bounds them together.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._pace = Pace()

    def read(self, size: int | None = -1, /) -> bytes:
        """The next piece; TooSlow, which botocore takes for a broken connection."""
        piece = super().read(size)
        self._pace.moved(len(piece))
        return piece

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """botocore goes back to the start before each try."""
        self._pace = Pace()
        return super().seek(offset, whence)


def told(on_bytes: OnBytes | None, count: int) -> None:
    """``count`` more bytes were moved (negative: must be moved again)."""
    if on_bytes is not None and count:
        on_bytes(count)


def md5_base64(data: bytes) -> str:
    """Content-MD5 of a request body."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
