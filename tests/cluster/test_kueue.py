"""Kueue runs on the cluster for real: its webhooks, its quota for pretended GPUs and its aggregated API."""

import os
from pathlib import Path

import pytest

from finetune_cluster.api import Api, condition
from finetune_cluster.kueue import install_kueue
from finetune_cluster.up import up
from tests.cluster.objects import JOBS, Object, container, job, limits

FOLDER = os.environ.get("KUEUE_DIR", "")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not FOLDER, reason="KUEUE_DIR does not name a folder with Kueue's manager and chart.tgz"),
]
ROOT = "/apis/kueue.x-k8s.io/v1beta2"
PENDING = "/apis/visibility.kueue.x-k8s.io/v1beta2/clusterqueues/one-gpu/pendingworkloads"


def kueue_object(kind: str, name: str, spec: Object | None = None) -> Object:
    """An object of Kueue's."""
    return {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}, "spec": spec or {}}


def queued_job(name: str, image: str) -> Object:
    """A Job of one GPU that ends when told to, in the queue."""
    made = job(
        name, container(image, "sleep", "600", resources={"requests": {"cpu": "10m"}, **limits(gpus="1")["resources"]})
    )
    made["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team"}
    made["spec"]["suspend"] = True
    return made


def test_the_second_of_two_jobs_waits_for_the_quota(second: str, image: str) -> None:
    instance = up(second, 1, 2)
    install_kueue(instance, Path(FOLDER))
    resources = [{"name": name, "nominalQuota": quota} for name, quota in (("cpu", 8), ("nvidia.com/gpu", 1))]
    group = {"coveredResources": [r["name"] for r in resources], "flavors": [{"name": "any", "resources": resources}]}
    with Api(instance.kubeconfig) as api:
        api.create(f"{ROOT}/resourceflavors", kueue_object("ResourceFlavor", "any"))
        queue = kueue_object("ClusterQueue", "one-gpu", {"namespaceSelector": {}, "resourceGroups": [group]})
        api.create(f"{ROOT}/clusterqueues", queue)
        local = kueue_object("LocalQueue", "team", {"clusterQueue": "one-gpu"})
        api.create(f"{ROOT}/namespaces/default/localqueues", local)
        api.create(JOBS, queued_job("first", image))
        api.wait(JOBS, "first", lambda j: j["status"].get("ready") == 1, 60, "the first job runs")
        api.create(JOBS, queued_job("second", image))
        workloads = f"{ROOT}/namespaces/default/workloads"

        def waits(workload: Object) -> bool:
            return (
                workload["metadata"]["name"].startswith("job-second")
                and condition(workload, "QuotaReserved") == "False"
            )

        api.wait(workloads, None, waits, 60, "the second job waits for quota")
        assert [w["metadata"]["name"][:10] for w in api.get(PENDING)["items"]] == ["job-second"]
        api.delete(f"{JOBS}/first", propagationPolicy="Background")
        api.wait(JOBS, "second", lambda j: j["status"].get("ready") == 1, 60, "the second job runs")
