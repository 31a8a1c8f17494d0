"""Sets the demo up, one step a function: cluster, store, operator, model and data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from demo import dataset, images, store
from demo.target import CRD, NAMESPACE, RELEASE, ROOT, SYSTEM_NAMESPACE, DemoError, Target
from finetune_cluster.paths import cache_root
from finetune_cluster.up import up

MODEL = "SmolLM2-135M-Instruct"
DATASET = "kubernetes-api"
GPU_PRODUCT = "Pretend"
"""Label nvidia.com/gpu.product of the local cluster's nodes."""
MODEL_CACHE = f"{MODEL}-1"
"""Folder name in the cache; the number rises when what demo/model.py writes changes."""


def cluster_up() -> None:
    """The local cluster with pretended GPUs."""
    name = os.environ.get("CLUSTER_NAME", "finetune")
    up(
        name,
        nodes=int(os.environ.get("NODES", "1")),
        gpus_per_node=int(os.environ.get("GPUS_PER_NODE", "2")),
        gpu_product=GPU_PRODUCT,
    )


def namespace(name: str) -> dict[str, Any]:
    """A namespace that enforces the restricted pod security standard."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def install_store(target: Target, references: images.References) -> None:
    """Namespaces and the S3 server."""
    target.apply(namespace(NAMESPACE), namespace(SYSTEM_NAMESPACE))
    store.install(target, references.store)


def model_folder() -> Path:
    """The base model, built once and kept in the cache. In a process of its own, which then frees torch's memory."""
    folder = cache_root() / "demo" / MODEL_CACHE
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "demo.model", str(folder)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL
        )
    return folder


def dataset_folder() -> Path:
    """The dataset, built anew (two seconds)."""
    folder = cache_root() / "demo" / DATASET
    print(f"    {dataset.build(folder)}")
    return folder


def upload(client: Any, model: Path, data: Path) -> None:
    """What is not in the buckets yet."""
    store.ensure_buckets(client)
    sent = store.upload_folder(client, model, "models", MODEL) + store.upload_folder(client, data, "datasets", DATASET)
    print(f"    {sent} files sent")


def install_operator(target: Target, references: images.References) -> None:
    """The chart, as a user installs it.

    Raises:
        DemoError: an operator that is not the demo's is installed: two would work on the same jobs.
    """
    owner = crd_owner(target)
    if owner not in (None, (SYSTEM_NAMESPACE, RELEASE)):
        raise DemoError(
            f"the CRD {CRD} belongs to Helm release {owner[1]} in namespace {owner[0]}: an operator is installed here, and a "
            "second one would work on the same jobs. Use that one (`kubectl apply -f`), or run the demo on another cluster."
        )
    repair_release(target)
    arguments = ["upgrade", "--install", RELEASE, str(ROOT / "charts" / "finetune-operator")]
    arguments += ["--namespace", SYSTEM_NAMESPACE, "--create-namespace", "--wait", "--timeout", "180s"]
    for name, reference in (
        ("operator", references.operator),
        ("prepare", references.prepare),
        ("trainer", references.trainer),
    ):
        repository, _, tag = reference.rpartition(":")
        arguments += ["--set", f"images.{name}.repository={repository}", "--set-string", f"images.{name}.tag={tag}"]
    target.helm(*arguments)


def crd_owner(target: Target) -> tuple[str, str] | None:
    """Namespace and name of the Helm release that the CRD belongs to; None without CRD."""
    if not target.exists("crd", CRD):
        return None
    annotations = target.get("crd", CRD)["metadata"].get("annotations", {})
    return annotations.get("meta.helm.sh/release-namespace", "?"), annotations.get("meta.helm.sh/release-name", "?")


def repair_release(target: Target) -> None:
    """Bring a release whose helm was killed into a state from which it can be upgraded: helm itself refuses for ever."""
    releases = json.loads(target.helm("list", "--all", "--namespace", SYSTEM_NAMESPACE, "--output", "json"))
    status = next((r["status"] for r in releases if r["name"] == RELEASE), "")
    if status in ("pending-upgrade", "pending-rollback"):
        target.helm("rollback", RELEASE, "--namespace", SYSTEM_NAMESPACE)
    elif status in ("pending-install", "uninstalling"):
        target.helm("uninstall", RELEASE, "--namespace", SYSTEM_NAMESPACE, "--no-hooks", "--wait")
