"""Talking to a node's containerd from the host, through ``ctr``."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from finetune_cluster.console import ClusterError, run
from finetune_cluster.instance import Instance, Node
from finetune_cluster.node import containerd_address, sandbox_image

NAMESPACE = "k8s.io"  # where the kubelet's images are


def ctr(init: int, *arguments: str) -> str:
    """Run ``ctr`` against the node whose PID 1 is ``init``."""
    return run(_command(init, *arguments))


def wait_containerd(init: int, seconds: float = 240) -> None:
    """Wait until the node's containerd answers: at its start it syncs its databases, which takes a busy disk a while."""
    end = time.monotonic() + seconds
    while True:
        try:
            ctr(init, "version")
        except ClusterError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


def image_names(init: int) -> set[str]:
    """Full names of the images on the node."""
    return set(ctr(init, "images", "list", "-q").split())


def has_sandbox_image(instance: Instance, node: Node, init: int) -> bool:
    """Whether the node could start a pod: containerd answers, and has the image of every pod's first container."""
    try:
        return sandbox_image(instance, node) in image_names(init)
    except ClusterError:
        return False


def blobs(init: int) -> set[str]:
    """Digests in the node's content store."""
    return set(ctr(init, "content", "list", "-q").split())


def snapshots(init: int) -> set[str]:
    """Names of the layers that are unpacked on the node."""
    return {line.split()[0] for line in ctr(init, "snapshots", "list").splitlines()[1:] if line}


def import_archive(init: int, archive: Path) -> None:
    """Import a docker or OCI archive."""
    ctr(init, "images", "import", str(archive))


def import_stream(init: int, write: Callable[[IO[bytes]], None]) -> None:
    """Import an archive that ``write`` produces on the fly, so that gigabytes need no room for a copy."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *_command(init, "images", "import", "-")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stderr
    broken = False
    try:
        write(process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        broken = True
    message = process.stderr.read().decode(errors="replace")
    if process.wait() or broken:
        raise ClusterError(f"containerd refused the image: {message.strip()}")


def _command(init: int, *arguments: str) -> list[str]:
    return ["ctr", "--address", containerd_address(init), "--namespace", NAMESPACE, *arguments]
