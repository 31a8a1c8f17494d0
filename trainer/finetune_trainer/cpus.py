"""How many CPUs, and how much memory, this container may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_limit(limit_file: Path = MEMORY_LIMIT) -> int | None:
    """Bytes, by the cgroup; None without a limit."""
    try:
        text = limit_file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def usable_cpus(quota_file: Path = CPU_QUOTA) -> int:
    """CPUs this container may use: the affinity mask, capped by the cgroup's quota.

    Libraries count the machine's cores; with a quota of 2 on 64 cores their threads would wait for each other most of the time.
    """
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.ceil(int(quota) / int(period))))
