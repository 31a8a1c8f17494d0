"""Shortening texts for places with a limit."""

from __future__ import annotations

import re

ELLIPSIS = "…"
_SURROGATE = re.compile("[\ud800-\udfff]")


def readable(text: str) -> str:
    """``text`` with what UTF-8 cannot carry written out.

    File names and CSV headers in another encoding are read with ``surrogateescape``, so that a byte that is not UTF-8 costs a row
    or a column and not the file. In a report such a byte must not cost the report: it becomes ``\\xf6``.
    """
    return _SURROGATE.sub(_written_out, text)


def is_utf8(text: str) -> bool:
    """Whether :func:`readable` would change nothing."""
    try:
        text.encode()  # takes a tenth of a search's time
    except UnicodeEncodeError:
        return False
    return True


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def shorten(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + ELLIPSIS


def shorten_bytes(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` bytes of UTF-8, never cut inside a character."""
    data = text.encode("utf-8", errors="replace")
    if len(data) <= limit:
        return text
    room = max(0, limit - len(ELLIPSIS.encode()))
    return data[:room].decode("utf-8", errors="ignore").rstrip() + ELLIPSIS


def plural(count: int, noun: str) -> str:
    """``1 row``, ``5,120 rows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
