"""What this process holds."""

from __future__ import annotations

import os

from bench.process_tree import kib


def anonymous_bytes() -> int:
    """Resident memory that is no file's."""
    return kib(os.getpid(), "status", "RssAnon:") * 1024
