"""The chart on a real cluster: rights, upgrades, and what an uninstall leaves."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo import images
from demo.install import install_operator
from demo.target import CRD, RELEASE, ROOT, SYSTEM_NAMESPACE, DemoError
from tests.e2e.stack import Stack

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ACCOUNT = f"system:serviceaccount:{SYSTEM_NAMESPACE}:finetune-operator"
SECRET = "finetune-operator-tls"


def allowed(stack: Stack, verb: str, resource: str, namespace: str = "default", subresource: str = "") -> bool:
    command = stack.target.kubectl_command(
        "auth", "can-i", verb, resource, "-n", namespace, f"--as={ACCOUNT}", f"--subresource={subresource}"
    )
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == "yes"


@pytest.mark.parametrize("verb", ["get", "list", "watch", "create", "update", "patch", "delete"])
def test_the_operator_has_no_right_on_secrets(stack: Stack, verb: str) -> None:
    assert not allowed(stack, verb, "secrets")
    assert not allowed(stack, verb, "secrets", SYSTEM_NAMESPACE)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("create", "pods"),
        ("delete", "pods"),
        ("update", "finetunejobs.finetune.dev"),
        ("watch", "nodes"),
        ("patch", "nodes"),
    ],
)
def test_the_operator_has_no_right_it_does_not_need(stack: Stack, verb: str, resource: str) -> None:
    assert not allowed(stack, verb, resource)


def test_the_operator_has_the_rights_it_needs(stack: Stack) -> None:
    assert allowed(stack, "create", "jobs.batch")
    assert allowed(stack, "list", "nodes"), "their labels tell which GPUs there are"
    assert allowed(stack, "patch", "finetunejobs.finetune.dev", subresource="status")


def test_an_upgrade_keeps_the_certificate_and_upgrades_the_crd(stack: Stack, tmp_path: Path) -> None:
    before = stack.target.get("secret", SECRET, "-n", SYSTEM_NAMESPACE)["data"]
    older = tmp_path / "finetune-operator"
    shutil.copytree(ROOT / "charts" / "finetune-operator", older)
    file = older / "files" / f"{CRD}.yaml"
    definition = yaml.safe_load(file.read_text())
    del spec_of(definition)["ttlSecondsAfterFinished"]
    file.write_text(yaml.safe_dump(definition))
    stack.target.helm("upgrade", RELEASE, str(older), "-n", SYSTEM_NAMESPACE, "--reuse-values")
    assert "ttlSecondsAfterFinished" not in spec_of(stack.target.get("crd", CRD))
    install_operator(stack.target, images.ensure(stack.target))
    assert "ttlSecondsAfterFinished" in spec_of(stack.target.get("crd", CRD))
    assert stack.target.get("secret", SECRET, "-n", SYSTEM_NAMESPACE)["data"] == before


def spec_of(crd: dict[str, Any]) -> dict[str, Any]:
    """The fields of spec in a CRD."""
    [version] = crd["spec"]["versions"]
    fields = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    assert isinstance(fields, dict)
    return fields


@pytest.mark.parametrize("state", ["pending-upgrade", "pending-install", "uninstalling"])
def test_a_release_whose_helm_was_killed_can_be_installed_again(stack: Stack, state: str, tmp_path: Path) -> None:
    """Helm refuses to touch a release that it left in the middle of something; the demo must not."""
    history = stack.target.get("secrets", "-n", SYSTEM_NAMESPACE, "-l", f"owner=helm,name={RELEASE}")["items"]
    newest = max(history, key=lambda s: int(s["metadata"]["labels"]["version"]))
    stored = base64.b64decode(base64.b64decode(newest["data"]["release"]))
    release = json.loads(gzip.decompress(stored))
    release["info"]["status"] = state
    body = base64.b64encode(base64.b64encode(gzip.compress(json.dumps(release).encode()))).decode()
    patch = {"data": {"release": body}, "metadata": {"labels": {"status": state}}}
    file = tmp_path / "patch.json"  # a release with its CRDs is longer than an argument may be
    file.write_text(json.dumps(patch))
    stack.target.kubectl(
        "patch", "secret", newest["metadata"]["name"], "-n", SYSTEM_NAMESPACE, "--type=merge", f"--patch-file={file}"
    )
    install_operator(stack.target, images.ensure(stack.target))
    stack.target.kubectl("rollout", "status", "deployment/finetune-operator", "-n", SYSTEM_NAMESPACE, "--timeout=60s")


def test_uninstalling_keeps_the_crd_and_its_jobs_and_leaves_nothing_else(stack: Stack) -> None:
    manifest = yaml.safe_load((ROOT / "examples" / "smallest.yaml").read_text())
    manifest["metadata"] = {"name": "kept", "namespace": "default"}
    manifest["spec"]["suspend"] = True
    stack.target.apply(manifest)
    stack.target.helm("uninstall", RELEASE, "-n", SYSTEM_NAMESPACE, "--wait")
    try:
        assert stack.target.exists("crd", CRD)
        assert stack.target.exists("ftj", "kept", "-n", "default")
        left = stack.target.kubectl(
            "get", "clusterroles,clusterrolebindings,roles,rolebindings,deployments,services,secrets,serviceaccounts",
            "-A", "-l", f"app.kubernetes.io/instance={RELEASE}", "-o", "name",
        )  # fmt: skip
        assert left.strip() == ""
    finally:
        install_operator(stack.target, images.ensure(stack.target))
        stack.target.kubectl("delete", "ftj", "kept", "-n", "default", "--ignore-not-found")


def test_a_misspelled_value_is_refused(stack: Stack) -> None:
    with pytest.raises(DemoError, match="replica"):
        stack.target.helm(
            "upgrade",
            RELEASE,
            str(ROOT / "charts" / "finetune-operator"),
            "-n",
            SYSTEM_NAMESPACE,
            "--dry-run",
            "--set",
            "replica=2",
        )


def test_the_operator_runs_in_a_namespace_that_enforces_the_restricted_standard(stack: Stack) -> None:
    labels = stack.target.get("namespace", SYSTEM_NAMESPACE)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    stack.target.kubectl("rollout", "status", "deployment/finetune-operator", "-n", SYSTEM_NAMESPACE, "--timeout=60s")
