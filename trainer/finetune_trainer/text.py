"""Shortening texts for places with a limit."""

from __future__ import annotations

ELLIPSIS = "…"


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
