"""The light cluster and the scripted kubelet, on which the operator's tests rest."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_cluster.api import Api, ApiError, condition
from finetune_cluster.light import LightCluster
from finetune_cluster.scripted_kubelet import scripted_kubelet
from finetune_cluster.steps import (
    OOM_KILLED,
    After,
    Call,
    Evicted,
    Pod,
    Running,
    Step,
    Terminated,
    Unschedulable,
    Waiting,
    fail,
    run_forever,
    succeed,
)
from tests.cluster.objects import JOBS, PODS, Object, container, job, limits, pod, termination, unschedulable, waiting

pytestmark = pytest.mark.light

IMAGE = "example/none"
SECONDS = 20


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightCluster]:
    with LightCluster(tmp_path_factory.mktemp("light")) as cluster:
        yield cluster


@pytest.fixture
def api(light: LightCluster) -> Iterator[Api]:
    with light.admin() as client:
        yield client
        for item in client.get(JOBS)["items"]:
            client.delete(f"{JOBS}/{item['metadata']['name']}", propagationPolicy="Background")
        client.http.delete(PODS, params={"gracePeriodSeconds": "0"})
        client.http.delete("/api/v1/nodes")


def script_of(*steps: Step) -> list[Step]:
    return list(steps)


def test_two_clusters_side_by_side_share_nothing(tmp_path: Path) -> None:
    with LightCluster(tmp_path / "a") as a, LightCluster(tmp_path / "b") as b, a.admin() as in_a, b.admin() as in_b:
        in_a.create(PODS, pod("only-in-a", container(IMAGE)))
        assert in_b.get(PODS)["items"] == []


def test_a_job_runs_to_complete(light: LightCluster, api: Api) -> None:
    with scripted_kubelet(light.kubeconfig, lambda _: succeed(message="done")) as kubelet:
        api.create(JOBS, job("runs", container(IMAGE)))
        api.wait(JOBS, "runs", lambda j: condition(j, "Complete") == "True", SECONDS, "job is Complete")
        [ran] = api.get(PODS)["items"]
        assert termination(ran)["message"] == "done"
        assert kubelet.errors == []


def test_a_job_fails_with_the_exit_code_and_message_of_its_pod(light: LightCluster, api: Api) -> None:
    with scripted_kubelet(light.kubeconfig, lambda _: fail(42, "no such file")):
        api.create(JOBS, job("fails", container(IMAGE)))
        api.wait(JOBS, "fails", lambda j: condition(j, "Failed") == "True", SECONDS, "job is Failed")
        [ran] = api.get(PODS)["items"]
        assert (termination(ran)["exitCode"], termination(ran)["message"]) == (42, "no such file")


@pytest.mark.parametrize(
    ("steps", "reached"),
    [
        (
            script_of(Unschedulable("nothing free")),
            lambda p: unschedulable(p) == "nothing free" and not p["spec"].get("nodeName"),
        ),
        (
            script_of(Waiting("ImagePullBackOff")),
            lambda p: waiting(p) == "ImagePullBackOff" and p["status"]["phase"] == "Pending",
        ),
        (script_of(Running()), lambda p: condition(p, "Ready") == "True"),
        (script_of(Running(), OOM_KILLED), lambda p: termination(p).get("reason") == "OOMKilled"),
        (
            script_of(Running(), Evicted()),
            lambda p: condition(p, "DisruptionTarget") == "True" and p["status"]["phase"] == "Failed",
        ),
        (
            script_of(Unschedulable(), After(0.1), Running(), Terminated(0)),
            lambda p: p["status"]["phase"] == "Succeeded",
        ),
    ],
    ids=["unschedulable", "image missing", "running", "out of memory", "evicted", "waits, then runs"],
)
def test_a_pod_reaches_the_state_of_its_script(
    light: LightCluster, api: Api, steps: list[Step], reached: object
) -> None:
    assert callable(reached)
    with scripted_kubelet(light.kubeconfig, lambda _: steps):
        api.create(PODS, pod("scripted", container(IMAGE)))
        api.wait(PODS, "scripted", reached, SECONDS, "state of the script")


def test_a_hook_sees_the_running_pod(light: LightCluster, api: Api) -> None:
    seen: list[Pod] = []

    async def hook(item: Pod) -> None:
        seen.append(item)

    with scripted_kubelet(light.kubeconfig, lambda _: [Running(), Call(hook), Call(seen.append), Terminated()]):
        api.create(PODS, pod("hooked", container(IMAGE)))
        api.wait(PODS, "hooked", lambda p: p["status"].get("phase") == "Succeeded", SECONDS, "pod has succeeded")
    assert [item["status"]["phase"] for item in seen] == ["Running", "Running"]


def test_a_deleted_pod_ends_as_by_sigterm_and_is_replaced_by_its_job(light: LightCluster, api: Api) -> None:
    def running(item: Object) -> bool:
        return bool(item["status"].get("phase") == "Running")

    with scripted_kubelet(light.kubeconfig, lambda _: run_forever()) as kubelet:
        api.create(JOBS, job("replaced", container(IMAGE), backoff_limit=3))
        first = api.wait(PODS, None, running, SECONDS, "a pod runs")["metadata"]
        api.delete(f"{PODS}/{first['name']}")
        second = api.wait(
            PODS, None, lambda p: running(p) and p["metadata"]["uid"] != first["uid"], SECONDS, "another pod runs"
        )
        assert second["metadata"]["uid"] != first["uid"]
        assert kubelet.errors == []


def test_a_deleted_pod_can_end_by_a_script_of_its_own(light: LightCluster, api: Api) -> None:
    ends = [Call(lambda _: None), Terminated(0, "saved a checkpoint")]
    with scripted_kubelet(light.kubeconfig, lambda _: run_forever(), on_delete=lambda _: ends):
        held = pod("graceful", container(IMAGE))
        held["metadata"]["finalizers"] = ["example.com/look"]
        api.create(PODS, held)
        api.wait(PODS, "graceful", lambda p: condition(p, "Ready") == "True", SECONDS, "pod runs")
        evict = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": "graceful", "namespace": "default"},
        }
        api.create(f"{PODS}/graceful/eviction", evict)
        gone = api.wait(PODS, "graceful", lambda p: bool(termination(p)), SECONDS, "pod has ended")
        assert termination(gone)["message"] == "saved a checkpoint"
        assert condition(gone, "DisruptionTarget") == "True", "a condition that another wrote is kept"
        api.merge(f"{PODS}/graceful", {"metadata": {"finalizers": None}})


def test_gpus_are_counted_and_given_back(light: LightCluster, api: Api) -> None:
    with scripted_kubelet(light.kubeconfig, lambda _: run_forever(), gpus_per_node=2):
        api.create(PODS, pod("holds", container(IMAGE, **limits(gpus="2"))))
        api.wait(PODS, "holds", lambda p: condition(p, "Ready") == "True", SECONDS, "the first pod runs")
        api.create(PODS, pod("waits", container(IMAGE, **limits(gpus="1"))))
        api.wait(
            PODS, "waits", lambda p: "Insufficient nvidia.com/gpu" in unschedulable(p), SECONDS, "the second pod waits"
        )
        api.delete(f"{PODS}/holds")
        api.wait(PODS, "waits", lambda p: condition(p, "Ready") == "True", SECONDS, "the second pod runs")


def test_it_goes_on_after_a_crash_of_every_component(light: LightCluster, api: Api) -> None:
    with scripted_kubelet(light.kubeconfig, lambda _: succeed()) as kubelet:
        for component in ("kube-apiserver", "kube-controller-manager", "etcd"):
            light.kill(component)
            light.start(component)
            light.wait_ready()
            api.create(JOBS, job(f"after-{component}", container(IMAGE)))
            api.wait(JOBS, f"after-{component}", lambda j: condition(j, "Complete") == "True", 60, "job is Complete")
        assert kubelet.errors == []


def test_a_service_account_has_only_its_rights(light: LightCluster, api: Api) -> None:
    with Api(light.service_account("default", "default")) as client, pytest.raises(ApiError, match="forbidden"):
        client.get(PODS)


def test_a_pod_that_violates_restricted_is_refused_where_that_is_enforced(api: Api) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create(
        "/api/v1/namespaces",
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": labels}},
    )
    api.wait("/api/v1/namespaces/strict/serviceaccounts", "default", lambda _: True, SECONDS, "service account exists")
    with pytest.raises(ApiError, match='violates PodSecurity "restricted'):
        api.create("/api/v1/namespaces/strict/pods", pod("loose", container(IMAGE)))


def test_every_job_of_a_burst_is_played(light: LightCluster, api: Api) -> None:
    count = 100
    with scripted_kubelet(light.kubeconfig, lambda _: succeed()) as kubelet:
        for number in range(count):
            api.create(JOBS, job(f"burst-{number}", container(IMAGE)))
        left = {f"burst-{number}" for number in range(count)}
        for _, item in api.watch(JOBS, 60):
            if condition(item, "Complete") == "True":
                left.discard(item["metadata"]["name"])
            if not left:
                break
        assert not left
        assert kubelet.errors == []
