"""A process and all that it starts, watched from outside: CPU seconds, and what they hold of memory at a time."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.2
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Ended:
    """What a process wrote and what all of them took."""

    output: str
    cpu_seconds: float
    """Of every process from its first instruction to its last, user and system."""
    peak_rss_mib: float
    """The highest sum of what is resident, shared pages counted for each process that has them."""
    peak_pss_mib: float
    """The same with shared pages counted once, as a container's limit counts them."""


def run(command: Sequence[str | Path], environ: Mapping[str, str]) -> Ended:
    """A command to the end of the last process that it has started.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    rss = pss = 0
    watched = [sys.executable, "-m", "bench.process_tree", *map(str, command)]
    with subprocess.Popen(watched, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            pids = [pid for pid in tree(process.pid) if pid != process.pid]
            rss = max(rss, sum(kib(pid, "status", "VmRSS:") for pid in pids))
            pss = max(pss, sum(kib(pid, "smaps_rollup", "Pss:") for pid in pids))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        output, _, cpu_seconds = process.stdout.read().rpartition("\n")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, watched)
    return Ended(output, json.loads(cpu_seconds), rss / 1024, pss / 1024)


def main() -> None:
    """Between the two: the processes whose parent has ended become this one's children, and their CPU seconds are told to it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    failed = subprocess.run(sys.argv[1:], check=False).returncode
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{json.dumps(used.ru_utime + used.ru_stime)}", end="")
    sys.exit(failed)


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # it has ended
            continue
        for child in found:
            yield from tree(int(child))


def kib(pid: int, file: str, name: str) -> int:
    """A line of a file of its in /proc; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main()
