"""The whole cluster: containers, network, limits and GPUs behave as in production, and nothing leads out of the machine."""

import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from finetune_cluster.api import Api, ApiError, condition
from finetune_cluster.binaries import ensure_binaries
from finetune_cluster.instance import Instance
from finetune_cluster.processes import node_inits, programs
from tests.cluster.conftest import GPUS
from tests.cluster.objects import JOBS, PODS, Object, container, job, limits, pod, termination, unschedulable

pytestmark = pytest.mark.cluster
SECONDS = 40
SERVICES = "/api/v1/namespaces/default/services"
RESTRICTED = {
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
}


def ended(api: Api, name: str) -> Object:
    """How the pod's container ended, once it has."""
    return termination(api.wait(PODS, name, lambda p: bool(termination(p)), SECONDS, f"pod {name} has ended"))


def service(name: str, port: int, **spec: object) -> Object:
    """A service in front of the pods that are labelled with its name."""
    ports = [{"port": 80, "targetPort": port}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": ports, **spec},
    }


def test_a_job_runs_to_complete_and_its_log_can_be_read(api: Api, cluster: Instance, image: str) -> None:
    api.create(JOBS, job("prints", container(image, "print", "hello from the pod")))
    api.wait(JOBS, "prints", lambda j: condition(j, "Complete") == "True", SECONDS, "job is Complete")
    kubectl = [str(ensure_binaries().program("kubectl")), f"--kubeconfig={cluster.kubeconfig}", "logs", "job/prints"]
    assert subprocess.run(kubectl, check=True, capture_output=True, text=True).stdout == "hello from the pod\n"


def test_a_failing_pod_shows_its_exit_code_and_termination_message(api: Api, image: str) -> None:
    api.create(PODS, pod("fails", container(image, "exit", "42", "no such file")))
    end = ended(api, "fails")
    assert (end["exitCode"], end["message"]) == (42, "no such file")


def test_pods_find_each_other_by_name_through_a_service(api: Api, image: str) -> None:
    api.create(PODS, pod("web", container(image, "serve", ":8080", "hello"), labels={"app": "web"}))
    api.create(SERVICES, service("web", 8080))
    api.create(PODS, pod("asks", container(image, "get", "http://web.default.svc.cluster.local/", "20")))
    assert ended(api, "asks")["exitCode"] == 0


def test_the_nodes_own_processes_reach_services_as_the_api_server_must_for_webhooks(api: Api, image: str) -> None:
    api.create(PODS, pod("web", container(image, "serve", ":8080", "hello"), labels={"app": "web"}))
    address = api.create(SERVICES, service("web", 8080))["spec"]["clusterIP"]
    api.create(PODS, pod("on-the-host", container(image, "get", f"http://{address}", "20"), hostNetwork=True))
    assert ended(api, "on-the-host")["exitCode"] == 0


def test_a_name_that_does_not_exist_is_refused_at_once(api: Api, image: str) -> None:
    api.create(
        PODS,
        pod(
            "asks-nobody",
            container(
                image, "resolve", "no-such-bucket.s3.example.com", "0", terminationMessagePolicy="FallbackToLogsOnError"
            ),
        ),
    )
    end = ended(api, "asks-nobody")
    assert end["exitCode"] == 1
    assert "no such host" in end["message"]


def test_the_host_reaches_node_ports_and_pods_reach_servers_of_the_host(
    api: Api, cluster: Instance, image: str
) -> None:
    api.create(PODS, pod("web", container(image, "serve", ":8080", "hello"), labels={"app": "web"}))
    made = api.create(SERVICES, service("web", 8080, type="NodePort"))
    api.wait(PODS, "web", lambda p: condition(p, "Ready") == "True", SECONDS, "web is Ready")
    slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    api.wait(
        slices,
        None,
        lambda e: e["metadata"]["name"].startswith("web-") and bool(e["endpoints"]),
        SECONDS,
        "web has an endpoint",
    )
    transport = httpx.HTTPTransport(retries=5)
    with httpx.Client(transport=transport, trust_env=False) as client:
        assert client.get(f"http://{cluster.api_address}:{made['spec']['ports'][0]['nodePort']}").text == "hello"
    with socket.create_server((cluster.gateway, 0)) as server:
        threading.Thread(target=server.accept, daemon=True).start()
        name = f"host.finetune.internal:{server.getsockname()[1]}"
        api.create(PODS, pod("reaches-host", container(image, "reach", name, "5")))
        assert ended(api, "reaches-host")["exitCode"] == 0


def test_a_pod_has_no_way_out_of_the_machine(api: Api, image: str) -> None:
    beyond = "198.51.100.1:80"  # an address for documentation, which nobody has
    api.create(
        PODS, pod("escapes", container(image, "reach", beyond, "5", terminationMessagePolicy="FallbackToLogsOnError"))
    )
    end = ended(api, "escapes")
    assert end["exitCode"] == 3
    assert "network is unreachable" in end["message"]


def test_a_pod_that_violates_restricted_is_refused_where_that_is_enforced_and_one_that_does_not_runs(
    api: Api, image: str
) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create(
        "/api/v1/namespaces",
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": labels}},
    )
    pods = "/api/v1/namespaces/strict/pods"
    api.wait("/api/v1/namespaces/strict/serviceaccounts", "default", lambda _: True, SECONDS, "service account exists")
    with pytest.raises(ApiError, match='violates PodSecurity "restricted'):
        api.create(pods, pod("loose", container(image, "print", "x")))
    api.create(pods, pod("tight", container(image, "print", "x", **RESTRICTED)))
    api.wait(pods, "tight", lambda p: p["status"].get("phase") == "Succeeded", SECONDS, "the tight pod has succeeded")


def test_the_scheduler_counts_gpus(api: Api, image: str) -> None:
    api.create(PODS, pod("holds", container(image, "sleep", "600", **limits(gpus=str(GPUS)))))
    api.wait(PODS, "holds", lambda p: condition(p, "Ready") == "True", SECONDS, "the first pod runs")
    api.create(PODS, pod("waits", container(image, "sleep", "600", **limits(gpus="1"))))
    api.wait(
        PODS, "waits", lambda p: "Insufficient nvidia.com/gpu" in unschedulable(p), SECONDS, "the second pod waits"
    )
    api.delete(f"{PODS}/holds")
    api.wait(PODS, "waits", lambda p: condition(p, "Ready") == "True", SECONDS, "the second pod runs")


def test_gpus_come_back_after_a_crash_of_the_kubelet(api: Api, cluster: Instance) -> None:
    [init] = node_inits(cluster).values()
    [kubelet] = [p for p in programs(init) if p.program == "kubelet"]
    before = api.get(f"/api/v1/nodes/{cluster.nodes[0].name}")["status"]["conditions"]
    os.kill(kubelet.pid, signal.SIGKILL)
    heartbeat = {c["type"]: c["lastHeartbeatTime"] for c in before}["Ready"]

    def back(node: Object) -> bool:
        beats = {c["type"]: c["lastHeartbeatTime"] for c in node["status"]["conditions"]}
        return bool(beats["Ready"] > heartbeat and node["status"]["allocatable"].get("nvidia.com/gpu") == str(GPUS))

    api.wait("/api/v1/nodes", cluster.nodes[0].name, back, SECONDS, "the GPUs are back")


def test_a_pod_above_its_memory_limit_is_oom_killed(api: Api, image: str) -> None:
    api.create(PODS, pod("eats", container(image, "eat-memory", "200", **limits(memory="50Mi"))))
    assert ended(api, "eats")["reason"] == "OOMKilled"


def test_a_volume_outlives_the_pod_that_wrote_it(api: Api, image: str, tmp_path: Path) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}}
    volume = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    source = {"hostPath": {"path": "/var/lib/finetune-volumes/models", "type": "DirectoryOrCreate"}}
    api.create(
        "/api/v1/persistentvolumes",
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "models"}, "spec": volume | source},
    )
    claims = "/api/v1/namespaces/default/persistentvolumeclaims"
    api.create(
        claims,
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "models"},
            "spec": claim | {"volumeName": "models"},
        },
    )
    api.wait(claims, "models", lambda c: c["status"].get("phase") == "Bound", SECONDS, "claim is Bound")
    mounts = {"volumeMounts": [{"name": "models", "mountPath": "/models"}]}
    volumes = [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}]
    api.create(
        PODS,
        pod(
            "writes",
            container(image, "write", "/models/x", "kept", **mounts, securityContext={"runAsUser": 0}),
            volumes=volumes,
        ),
    )
    assert ended(api, "writes")["exitCode"] == 0
    api.create(PODS, pod("reads", container(image, "read", "/models/x", **mounts), volumes=volumes))
    assert ended(api, "reads")["exitCode"] == 0
