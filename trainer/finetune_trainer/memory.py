"""What the container's memory cgroup counted (version 2, or 1), and what it need not hold any more."""

from __future__ import annotations

import ctypes
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def peak_bytes(root: Path = CGROUP) -> int | None:
    """The most memory that this container has held, in bytes; None where no cgroup tells."""
    for name in ("memory.peak", "memory/memory.max_usage_in_bytes"):
        value = _number(root / name)
        if value is not None:
            return value
    return None


def kills(root: Path = CGROUP) -> int:
    """How many processes of this container were killed for exceeding its memory."""
    for name in ("memory.events", "memory/memory.oom_control"):
        try:
            lines = (root / name).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0


def give_back() -> None:
    """Hand memory that is free to the kernel. glibc keeps what a thread has freed in an arena of that thread's, where no other looks for it:
    after transformers' loading threads have quantized a base of 52M parameters, that was 10 to 200 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
    if trim is not None:
        trim(0)


def gibibytes(count: int) -> str:
    """``12.3 GiB``."""
    return f"{count / 2**30:.1f} GiB"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
