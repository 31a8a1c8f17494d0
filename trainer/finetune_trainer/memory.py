"""What the container's memory cgroup counted (version 2, or 1), and what it need not hold any more."""

from __future__ import annotations

import ctypes
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3
"""malloc.h's."""
LARGE_BYTES = 1 << 20


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


def map_large_blocks() -> None:
    """Have each block of LARGE_BYTES or more mapped by itself, and unmapped when it is freed, in this process from now on.

    glibc does so from 128 KiB on, but takes the size of each mapped block that is freed for its new threshold, up to 32 MiB
    (mallopt(3), M_MMAP_THRESHOLD). From then on activations come from the heap, where small blocks that stay keep what was freed
    around them: of 966 MiB of heap 332 MiB were free at the end of a forward pass of QLoRA on a CPU, and 2 MiB with this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


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
