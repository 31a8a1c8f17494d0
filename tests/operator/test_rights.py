"""The operator works with the rights that the chart grants, and the chart grants no others: above all no Secrets."""

from __future__ import annotations

import asyncio
import subprocess

import pytest
import yaml

from finetune_api.names import Stage
from finetune_cluster.binaries import ensure_helm
from finetune_cluster.steps import Call, Pod, Step
from tests.operator.harness import ROOT, Bench, combinations_of, condition, is_true, stage_of, succeed_stage
from tests.operator.manifests import Raw, combination, finetunejob, success
from tests.operator.poster import Poster

RBAC = "/apis/rbac.authorization.k8s.io/v1"

ON_JOBS = {
    # delete: ttlSecondsAfterFinished; patch: the finalizer of output.deletionPolicy
    ("finetune.dev", "finetunejobs"): {"get", "list", "watch", "delete", "patch"},
    ("finetune.dev", "adaptercombinations"): {"get", "list", "watch", "delete"},
    ("finetune.dev", "finetunejobs/status"): {"patch"},
    ("finetune.dev", "adaptercombinations/status"): {"patch"},
    ("finetune.dev", "finetunejobs/finalizers"): {"update"},  # blockOwnerDeletion, where that is guarded
    ("finetune.dev", "adaptercombinations/finalizers"): {"update"},
    ("batch", "jobs"): {"get", "list", "watch", "create", "delete"},
    ("", "pods"): {"get", "list", "watch"},
    ("", "configmaps"): {"get", "create"},
    ("", "services"): {"get", "create"},
    ("", "events"): {"create", "list"},
}
EVERYWHERE = {("authentication.k8s.io", "tokenreviews"): {"create"}, ("", "nodes"): {"list"}}
LEASES = {("coordination.k8s.io", "leases"): {"get", "create", "update"}}

Rights = dict[tuple[str, str], set[str]]


def rendered(release: str, namespace: str, watched: str = "", **values: str) -> list[Raw]:
    """The chart's objects."""
    options = ["--set-string", f"watchNamespaces[0]={watched}"] if watched else []
    options += [f"--set=operator.{name}={value}" for name, value in values.items()]
    command = [str(ensure_helm()), "template", release, str(ROOT / "charts/finetune-operator")]
    command += ["--kube-version", "1.34", "--namespace", namespace, *options]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [document for document in yaml.safe_load_all(text) if document]


def rights(documents: list[Raw], kind: str, name: str) -> Rights:
    """What the roles of a kind and name grant."""
    found: Rights = {}
    for role in documents:
        if role["kind"] != kind or role["metadata"]["name"] != name:
            continue
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    found.setdefault((group, resource), set()).update(rule["verbs"])
    return found


def test_the_chart_grants_what_is_used_and_nothing_else() -> None:
    everywhere = rendered("finetune", "system")
    assert rights(everywhere, "ClusterRole", "finetune-operator") == {**EVERYWHERE, **ON_JOBS}
    assert rights(everywhere, "Role", "finetune-operator-leader") == LEASES
    narrow = rendered("finetune", "system", "team-a")
    assert rights(narrow, "ClusterRole", "finetune-operator") == EVERYWHERE
    assert rights(narrow, "Role", "finetune-operator") == ON_JOBS
    assert {d["metadata"]["namespace"] for d in narrow if d["kind"] == "Role"} == {"system", "team-a"}


def counts_free_gpus(documents: list[Raw]) -> str:
    [deployment] = [d for d in documents if d["kind"] == "Deployment"]
    env = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    return next(str(e["value"]) for e in env if e["name"] == "FINETUNE_COUNT_FREE_GPUS")


def test_free_gpus_are_counted_where_that_needs_no_right_and_else_where_it_is_asked_for() -> None:
    assert counts_free_gpus(rendered("finetune", "system")) == "true"
    assert counts_free_gpus(rendered("finetune", "system", countFreeGPUs="false")) == "false"
    assert counts_free_gpus(rendered("finetune", "system", "team-a")) == "false"
    asked = rendered("finetune", "system", "team-a", countFreeGPUs="true")
    assert counts_free_gpus(asked) == "true"
    assert rights(asked, "ClusterRole", "finetune-operator") == {**EVERYWHERE, ("", "pods"): {"list"}}


def test_of_leases_only_its_own_can_be_read_and_changed() -> None:
    [role] = [d for d in rendered("finetune", "system") if d["metadata"]["name"] == "finetune-operator-leader"][:1]
    named = [r for r in role["rules"] if set(r["verbs"]) != {"create"}]
    assert [r["resourceNames"] for r in named] == [["finetune-operator"]]


def test_names_that_look_like_numbers_stay_texts() -> None:
    documents = rendered("1e3", "456", "0789")
    for document in documents:
        assert isinstance(document["metadata"].get("namespace", ""), str), document
        assert all(isinstance(v, str) for v in (document["metadata"].get("labels") or {}).values()), document
    [deployment] = [d for d in documents if d["kind"] == "Deployment"]
    env = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    assert all(isinstance(e.get("value", ""), str) for e in env)
    assert {e["name"]: e.get("value") for e in env}["FINETUNE_LEASE_NAMESPACE"] == "456"


@pytest.mark.light
@pytest.mark.parametrize("narrow", [False, True], ids=["everywhere", "in watchNamespaces"])
def test_with_the_charts_rights_everything_works(bench: Bench, narrow: bool) -> None:
    release = f"r-{bench.namespace}"
    name = f"{release}-finetune-operator"
    paths = {
        "ServiceAccount": f"/api/v1/namespaces/{bench.namespace}/serviceaccounts",
        "ClusterRole": f"{RBAC}/clusterroles",
        "ClusterRoleBinding": f"{RBAC}/clusterrolebindings",
        "Role": f"{RBAC}/namespaces/{bench.namespace}/roles",
        "RoleBinding": f"{RBAC}/namespaces/{bench.namespace}/rolebindings",
    }
    for document in rendered(release, bench.namespace, bench.namespace if narrow else ""):
        if document["kind"] in paths:
            bench.api.create(paths[document["kind"]], document)
    operator = bench.start_operator(
        KUBECONFIG=str(bench.cluster.service_account(bench.namespace, name)),
        FINETUNE_NAMESPACES=bench.namespace if narrow else "",
        FINETUNE_LEADER_ELECTION="true",
        FINETUNE_LEASE_NAME=name,
    )

    def script(pod: Pod) -> list[Step]:
        def post(_: Pod) -> None:
            answer = Poster(bench, operator, pod, "least").post(final=success(stage_of(pod)).to_json_dict())
            assert answer.json()["recorded"], answer.text

        running, *rest = succeed_stage(pod)
        return (
            [running, Call(lambda p: asyncio.to_thread(post, p)), *rest]
            if stage_of(pod) is Stage.PREPARE
            else [running, *rest]
        )

    with bench.script(script) as kubelet:
        bench.apply(finetunejob("least").ttl(1).build())
        bench.until("least", lambda j: is_true(j, "Complete"), "Complete")
        bench.until_gone(f"/apis/finetune.dev/v1alpha1/namespaces/{bench.namespace}/finetunejobs")
        bench.combine(combination("least", ttlSecondsAfterFinished=1))
        assert "Combined" in dict(bench.told("least", "Combined", kind="AdapterCombination"))
        bench.until_gone(combinations_of(bench.namespace))
        assert kubelet.errors == []
    bench.apply(finetunejob("podless").set(runtime={"serviceAccountName": "nobody"}).build())
    waiting = bench.until_waiting("podless", "AdmissionRefused")
    assert 'serviceaccount "nobody" not found' in condition(waiting, "Waiting")["message"], "its Job's Events are read"
    bench.merge("podless", {"suspend": True})
    bench.until_phase("podless", "Suspended")
    assert ("Suspended", condition(bench.job("podless"), "Suspended")["message"]) in bench.told("podless", "Suspended")
    assert "forbidden" not in operator.log.read_text().lower().replace("is forbidden: error looking up", "")
