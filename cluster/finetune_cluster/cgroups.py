"""Cgroups of a cluster: one folder of its own below every hierarchy (v1 and hybrid) or below the one of v2."""

import contextlib
import os
import time
from pathlib import Path

from finetune_cluster.console import ClusterError
from finetune_cluster.instance import Instance

ROOT = Path("/sys/fs/cgroup")


def folders(instance: Instance) -> list[Path]:
    """The cluster's folders that exist."""
    candidates = [
        ROOT / instance.cgroup_parent,
        *(entry / instance.cgroup_parent for entry in ROOT.iterdir() if entry.is_dir()),
    ]
    return [folder for folder in candidates if folder.is_dir()]


def remove(instance: Instance, seconds: float = 20) -> None:
    """Remove the cluster's folders. The processes are dead by now, but the kernel may need a moment to let go of them."""
    end = time.monotonic() + seconds
    for folder in folders(instance):
        while folder.exists():
            for path, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    Path(path).rmdir()
            if folder.exists():
                if time.monotonic() > end:
                    raise ClusterError(
                        f"{folder} cannot be removed; the processes listed in its cgroup.procs files still run."
                    )
                time.sleep(0.05)
