"""Finding a cluster's processes. /proc is asked, not a pid file: that is right after any crash, and pids are reused."""

import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from finetune_cluster.console import ClusterError
from finetune_cluster.instance import Instance, Node

REAP_SECONDS = 5.0


@dataclass(frozen=True)
class Process:
    """A process as the host sees it."""

    pid: int
    argv: tuple[str, ...]

    @property
    def program(self) -> str:
        """Name of its program."""
        return Path(self.argv[0]).name if self.argv else "?"


def spec_file(instance: Instance, node: Node) -> Path:
    """What the node's PID 1 reads; it stands on its command line, and so marks the process."""
    return instance.folder(node) / "spec.json"


def node_inits(instance: Instance) -> dict[str, int]:
    """Pids of the PID 1 of running nodes, by the node's name; also of nodes that instance.json does not list (any more)."""
    found = {}
    prefix = f"{instance.state / 'nodes'}/"
    for process in _all():
        if len(process.argv) == 3 and process.argv[:2] == ("nodeinit", "run") and process.argv[2].startswith(prefix):
            found[Path(process.argv[2]).parent.name] = process.pid
    return found


def programs(init: int) -> list[Process]:
    """The programs that a node's PID 1 runs. (/proc/PID/task/TID/children knows those of one thread only.)"""
    children = (process for process in _all() if _parent(process.pid) == init)
    return [process for process in children if process.program != "containerd-shim-runc-v2"]


def of_container(container_id: str) -> list[Process]:
    """The processes of a container, its first one first. ``container_id`` is as a pod's status has it, with or without scheme."""
    wanted = container_id.rpartition("/")[2]
    found = [(_pid_inside(p.pid), p) for p in _all() if wanted in _text(f"/proc/{p.pid}/cgroup")]
    return [process for _, process in sorted(found, key=lambda item: item[0])]


def kill_and_wait(pid: int, seconds: float = 60) -> None:
    """Kill -9 and wait until it is gone. A node's PID 1 goes only after everything in its namespaces has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise ClusterError(
                f"Process {pid} was killed and still runs after {seconds:.0f} s; it may hang in the kernel (see /proc/{pid}/stack)."
            )
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)
    # What is left is an entry in the process table, which the host's init removes; some take a moment.
    reaped = time.monotonic() + REAP_SECONDS
    while Path(f"/proc/{pid}").exists() and time.monotonic() < reaped:
        time.sleep(0.01)


def resident_mib(pid: int) -> int:
    """Memory of a process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def _all() -> list[Process]:
    return [
        process
        for process in (_read(int(e)) for e in (entry.name for entry in Path("/proc").iterdir()) if e.isdigit())
        if process
    ]


def _pid_inside(pid: int) -> int:
    """The process's id in its innermost pid namespace."""
    lines = _text(f"/proc/{pid}/status").splitlines()
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), pid)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _read(pid: int) -> Process | None:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, tuple(part.decode(errors="replace") for part in raw.split(b"\0")[:-1])) if raw else None
