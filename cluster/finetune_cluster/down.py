"""Taking a cluster away so that nothing of it is left, whatever state it is in."""

import shutil
from pathlib import Path

from finetune_cluster import cgroups, network
from finetune_cluster.console import run, say, step
from finetune_cluster.instance import Instance, load
from finetune_cluster.locks import locked
from finetune_cluster.paths import clusters_root
from finetune_cluster.processes import kill_and_wait, node_inits

REMOVING = "removing"
"""A file that stands in the cluster's folder while there is something left to delete beside it."""


def down(name: str) -> bool:
    """Delete the cluster of that name and all its data; says whether there was one. Binaries and the image store are kept."""
    with locked(clusters_root() / f".{name}.lock", f"cluster {name}"):
        instance = load(name)
        if not instance:
            say(f"There is no cluster {name}")
            return False
        remove(instance)
        return True


def half_removed(instance: Instance) -> bool:
    """Whether a removal began and was killed: what is left is no cluster to start."""
    return (instance.state / REMOVING).exists()


def remove(instance: Instance) -> None:
    """Delete a cluster. The caller holds its lock."""
    with step(f"Taking down cluster {instance.name}"):
        (instance.state / REMOVING).touch()
        for pid in node_inits(instance).values():
            kill_and_wait(pid)
        network.remove(instance)
        cgroups.remove(instance)
        for mount in _mounts_below(instance.state):
            run(["umount", "--lazy", mount])
        # instance.json goes last: it reserves the index, and tells a second `down` what to do if this one is killed.
        for entry in instance.state.iterdir():
            if entry.name not in ("instance.json", REMOVING):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        # Nothing is left to be finished: a mark that outlived instance.json would condemn the next cluster of this name.
        (instance.state / REMOVING).unlink()
        shutil.rmtree(instance.state)


def _mounts_below(folder: Path) -> list[str]:
    """Mounts of the host there: there should be none, and deleting through one would be a disaster."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True)
