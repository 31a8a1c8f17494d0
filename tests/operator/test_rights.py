"""The operator works with the rights that its documentation lists, and with nothing else: above all without Secrets."""

from __future__ import annotations

import re

import pytest

from finetune_operator import client
from tests.operator.harness import Bench, is_true
from tests.operator.manifests import Raw, finetunejob

pytestmark = pytest.mark.light


def documented_rules() -> list[Raw]:
    """The table in client.py, as RBAC rules."""
    groups = {"authentication...": "authentication.k8s.io", "coordination...": "coordination.k8s.io", '""': ""}
    rules = []
    rows = (client.__doc__ or "").split("=\n")[2].splitlines()
    for row in rows:
        found = re.match(r"(\S+)\s{2,}(\S+)\s{2,}([a-z ]+?)(\s{2,}\(.*\))?$", row.strip())
        if found is not None:
            group, resource, verbs = found.group(1, 2, 3)
            rules.append({"apiGroups": [groups.get(group, group)], "resources": [resource], "verbs": verbs.split()})
    return rules


def test_the_documented_rights_suffice_and_hold_no_secret(bench: Bench) -> None:
    rules = documented_rules()
    assert len(rules) == 9
    assert not any("secrets" in r["resources"] for r in rules)
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    name = f"operator-{bench.namespace}"
    bench.api.create(f"/api/v1/namespaces/{bench.namespace}/serviceaccounts", {"metadata": {"name": "operator"}})
    bench.api.create(f"{rbac}/clusterroles", {"metadata": {"name": name}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": bench.namespace}
    bench.api.create(
        f"{rbac}/clusterrolebindings",
        {
            "metadata": {"name": name},
            "subjects": [subject],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        },
    )
    kubeconfig = bench.cluster.service_account(bench.namespace, "operator")
    operator = bench.start_operator(KUBECONFIG=str(kubeconfig), FINETUNE_NAMESPACES="", FINETUNE_LEADER_ELECTION="true")
    with bench.script():
        bench.apply(finetunejob("least").ttl(1).build())
        bench.until("least", lambda j: is_true(j, "Complete"), "Complete")
        bench.until_gone(f"/apis/finetune.dev/v1alpha1/namespaces/{bench.namespace}/finetunejobs")
    assert "forbidden" not in operator.log.read_text().lower()
