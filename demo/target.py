"""Where the demo runs: the local cluster, or an existing one named by CONTEXT and REGISTRY."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SYSTEM_NAMESPACE = "finetune-demo-system"
"""Not the namespace of the documented installation: on an existing cluster the demo leaves that one alone."""
NAMESPACE = "finetune-demo"
RELEASE = "finetune"
CRD = "finetunejobs.finetune.dev"
CRDS = (CRD, "adaptercombinations.finetune.dev")


class DemoError(Exception):
    """Something the demo needs is not as it should be; the message says what to do."""


@dataclass(frozen=True)
class Target:
    """A cluster, and programs to speak to it."""

    kubeconfig: Path | None
    context: str | None
    registry: str | None
    kubectl_path: str
    helm_path: str
    cluster_name: str | None
    """Name of the local cluster; None for an existing one."""

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl and return what it prints.

        Raises:
            DemoError: with kubectl's own words.
        """
        return self._run([self.kubectl_path, *self._flags(), *arguments], stdin)

    def kubectl_command(self, *arguments: str) -> list[str]:
        """The command line, for a process of one's own."""
        return [self.kubectl_path, *self._flags(), *arguments]

    def get(self, *arguments: str) -> dict[str, Any]:
        """``kubectl get … -o json``."""
        result = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        assert isinstance(result, dict)
        return result

    def exists(self, *arguments: str) -> bool:
        """Whether ``kubectl get`` finds it."""
        return bool(self.kubectl("get", *arguments, "--ignore-not-found", "-o", "name").strip())

    def apply(self, *objects: dict[str, Any]) -> None:
        """Server-side apply of objects."""
        body = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=body)

    def helm(self, *arguments: str) -> str:
        """Run helm."""
        flags = [f"--kubeconfig={self.kubeconfig}"] if self.kubeconfig else []
        flags += [f"--kube-context={self.context}"] if self.context else []
        return self._run([self.helm_path, *flags, *arguments], None)

    def _flags(self) -> list[str]:
        flags = [f"--kubeconfig={self.kubeconfig}"] if self.kubeconfig else []
        return flags + ([f"--context={self.context}"] if self.context else [])

    @staticmethod
    def _run(command: list[str], stdin: str | None) -> str:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoError(f"`{' '.join(command[:1] + command[2:6])} …` failed: {done.stderr.strip()}")
        return done.stdout


def existing_target() -> Target | None:
    """The cluster that CONTEXT and REGISTRY name, if they do."""
    context, registry = os.environ.get("CONTEXT"), os.environ.get("REGISTRY")
    if not context:
        return None
    if not registry:
        raise DemoError(
            "CONTEXT is set but REGISTRY is not: name a registry that the cluster pulls from, e.g. REGISTRY=ghcr.io/you"
        )
    return Target(None, context, registry, "kubectl", "helm", None)


def local_target(name: str) -> Target:
    """The local cluster, which must be up."""
    from finetune_cluster.binaries import ensure_binaries, ensure_helm
    from finetune_cluster.instance import require

    instance = require(name)
    return Target(
        kubeconfig=instance.kubeconfig,
        context=None,
        registry=None,
        kubectl_path=str(ensure_binaries().folder / "kubectl"),
        helm_path=str(ensure_helm()),
        cluster_name=name,
    )


def current_target() -> Target:
    """Where a running demo is."""
    return existing_target() or local_target(os.environ.get("CLUSTER_NAME", "finetune"))


def content_hash(paths: list[Path]) -> str:
    """Twelve hex digits over names and contents of files and folders: the image tag of what they build."""
    digest = hashlib.sha256()
    for path in sorted(files_below(paths)):
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def files_below(paths: list[Path]) -> Iterator[Path]:
    """Every source file, without what Python leaves behind."""
    for path in paths:
        if path.is_file():
            yield path
        else:
            yield from (p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
