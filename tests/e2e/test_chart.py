"""The chart on a real cluster: rights, upgrades, and what an uninstall leaves."""

from __future__ import annotations

import subprocess

import pytest

from demo import images
from demo.install import install_operator
from demo.target import RELEASE, ROOT, SYSTEM_NAMESPACE, DemoError
from tests.e2e.conftest import Stack

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
        ("list", "nodes"),
    ],
)
def test_the_operator_has_no_right_it_does_not_need(stack: Stack, verb: str, resource: str) -> None:
    assert not allowed(stack, verb, resource)


def test_the_operator_has_the_rights_it_needs(stack: Stack) -> None:
    assert allowed(stack, "create", "jobs.batch")
    assert allowed(stack, "patch", "finetunejobs.finetune.dev", subresource="status")


def test_an_upgrade_keeps_the_certificate_and_upgrades_the_crd(stack: Stack) -> None:
    before = stack.target.get("secret", SECRET, "-n", SYSTEM_NAMESPACE)["data"]
    crd = "finetunejobs.finetune.dev"
    stack.target.kubectl("annotate", "crd", crd, "helm.sh/resource-policy-", "--overwrite")
    install_operator(stack.target, images.ensure(stack.target))
    assert stack.target.get("secret", SECRET, "-n", SYSTEM_NAMESPACE)["data"] == before
    assert stack.target.get("crd", crd)["metadata"]["annotations"]["meta.helm.sh/release-name"] == RELEASE


def test_uninstalling_keeps_the_crd_and_its_jobs_and_leaves_nothing_else(stack: Stack) -> None:
    stack.target.kubectl("apply", "-f", str(ROOT / "examples" / "smallest.yaml"), "-n", "default", "--dry-run=server")
    stack.target.helm("uninstall", RELEASE, "-n", SYSTEM_NAMESPACE, "--wait")
    try:
        assert stack.target.exists("crd", "finetunejobs.finetune.dev")
        left = stack.target.kubectl(
            "get", "clusterroles,clusterrolebindings,roles,rolebindings,deployments,services,secrets,serviceaccounts",
            "-A", "-l", f"app.kubernetes.io/instance={RELEASE}", "-o", "name",
        )  # fmt: skip
        assert left.strip() == ""
    finally:
        install_operator(stack.target, images.ensure(stack.target))


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
