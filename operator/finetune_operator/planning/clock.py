"""Times as Kubernetes writes them, and durations as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def rfc3339(moment: datetime) -> str:
    """``2026-03-01T12:00:00Z``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str | None) -> datetime | None:
    """The moment that an RFC 3339 text names; None for none."""
    if not text:
        return None
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def human_duration(seconds: float) -> str:
    """``45s``, ``14m``, ``2h05m``, ``3d04h``: two units at most, and minutes alone up to the hour."""
    whole = max(0, math.floor(seconds + 0.5))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{round(whole / 60)}m" if whole < 3570 else "1h00m"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(whole / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def exact_duration(seconds: float) -> str:
    """``45s``, ``17m02s``, ``2h05m10s``: nothing rounded away but fractions."""
    whole = max(0, int(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m{secs:02d}s"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
