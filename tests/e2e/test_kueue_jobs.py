"""A job in a queue of the real Kueue keeps its place in it: through a failing rank, a lost container and a preemption. While it waits its base
model is fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.names import LABEL_NAME, LABEL_STAGE, PIPELINE, Stage
from finetune_cluster.api import Api, condition
from finetune_cluster.binaries import ensure_binaries
from finetune_cluster.instance import Instance, require
from finetune_cluster.kueue import install_kueue, uninstall_kueue
from finetune_cluster.node import pause_image
from tests.chaos.run import Lives, ended
from tests.chaos.schedule import Kind
from tests.e2e.conftest import Reference
from tests.e2e.stack import GPU, Job, Space, Stack, claim_on, finished, is_true, rows, spec_for

FOLDER = os.environ.get("KUEUE_DIR", "")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not FOLDER, reason="KUEUE_DIR does not name a folder with Kueue's manager and chart.tgz"),
]
ROOT = "/apis/kueue.x-k8s.io/v1beta2"
QUEUE = "team"
Raw = dict[str, Any]


def kueue_object(kind: str, name: str, **fields: Any) -> Raw:
    return {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}, **fields}


@pytest.fixture
def kueue(stack: Stack, space: Space) -> Iterator[Api]:
    """Kueue, with one GPU for the namespace and two priorities. It goes again: its webhooks stand before every Job."""
    if stack.target.cluster_name is None:
        pytest.skip("Kueue is installed on the local cluster only")
    instance: Instance = require(stack.target.cluster_name)
    install_kueue(instance, Path(FOLDER))
    quota = [{"name": n, "nominalQuota": q} for n, q in (("cpu", "8"), ("memory", "16Gi"), (GPU, "1"))]
    group = {"coveredResources": [r["name"] for r in quota], "flavors": [{"name": "any", "resources": quota}]}
    spec = {
        "namespaceSelector": {},
        "resourceGroups": [group],
        "preemption": {"withinClusterQueue": "LowerPriority"},
    }
    try:
        with Api(instance.kubeconfig) as api:
            api.create(f"{ROOT}/resourceflavors", kueue_object("ResourceFlavor", "any", spec={}))
            api.create(f"{ROOT}/clusterqueues", kueue_object("ClusterQueue", "one-gpu", spec=spec))
            for name, value in (("low", 1), ("high", 1000)):
                body = kueue_object("WorkloadPriorityClass", name, value=value)
                api.create(f"{ROOT}/workloadpriorityclasses", body)
            queue = kueue_object("LocalQueue", QUEUE, spec={"clusterQueue": "one-gpu"})
            api.create(f"{ROOT}/namespaces/{space.name}/localqueues", queue)
            yield api
            # What is queued goes before Kueue does, which holds it by finalizers.
            stack.target.kubectl("delete", "ftj,jobs.batch", "--all", "-n", space.name, "--timeout=120s")
    finally:
        uninstall_kueue(instance, Path(FOLDER))


def urgent(namespace: str) -> Raw:
    """A Job of somebody else's, of a higher priority."""
    security = {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "main",
        "image": pause_image(ensure_binaries()),
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": {"cpu": "10m"}, "limits": {GPU: "1"}},
        "securityContext": security,
    }
    labels = {"kueue.x-k8s.io/queue-name": QUEUE, "kueue.x-k8s.io/priority-class": "high"}
    template = {"spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container]}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "urgent", "namespace": namespace, "labels": labels},
        "spec": {"suspend": True, "template": template},
    }


def queued_for(job: Job) -> bool:
    """Whether status says that the job is held back by its queue, and for what."""
    status = job.get("status", {})
    return (status.get("phase"), status.get("message")) == ("Queued", f"Queued in {QUEUE}: waits for 1 × {GPU}.")


def test_a_job_keeps_its_workload_through_failures_and_a_preemption(
    space: Space, undisturbed: Reference, kueue: Api
) -> None:
    queued = {**undisturbed.spec, "queue": {"name": QUEUE, "priorityClassName": "low"}}
    jobs, workloads = f"/apis/batch/v1/namespaces/{space.name}/jobs", f"{ROOT}/namespaces/{space.name}/workloads"

    def train_job_and_workload(name: str = "first") -> tuple[Raw, Raw]:
        (job,) = (
            j for j in kueue.get(jobs)["items"] if j["metadata"]["labels"].get("finetune.dev/stage") == "train"
            and j["metadata"]["labels"].get("finetune.dev/job-name") == name
        )  # fmt: skip
        uid = job["metadata"]["uid"]
        (workload,) = (
            w
            for w in kueue.get(workloads)["items"]
            if any(o["uid"] == uid for o in w["metadata"].get("ownerReferences", []))
        )
        return job, workload

    def place() -> tuple[str, ...]:
        """The one training Job of the first, and its place in the queue."""
        return tuple(x["metadata"]["uid"] for x in train_job_and_workload())

    with Lives(space) as lives:
        first = lives.begin("first", queued)
        first.until_step(25)
        kept = place()

        rank = first.strike(Kind.WORKER)
        lost = first.strike(Kind.CONTAINER)
        assert rank.while_training
        assert lost.while_training
        assert place() == kept, "healed in the pod, and in the same Job"

        first.until_step(35)
        kueue.create(jobs, urgent(space.name))
        preempted = first.until(queued_for, 120, "preempted")
        assert not is_true(preempted, "Waiting"), preempted["status"]
        _, workload = train_job_and_workload()
        evicted = next(c for c in workload["status"]["conditions"] if c["type"] == "Evicted")
        assert (evicted["status"], evicted["reason"]) == ("True", "Preempted"), evicted
        kueue.wait(jobs, "urgent", lambda j: j["status"].get("ready") == 1, 120, "the urgent Job runs")
        made = max(x.step for x in first.logs.lines if x.step is not None)
        assert place() == kept

        second = lives.begin("second", queued)
        waiting = second.until(queued_for, 120, "waiting in the full queue")
        assert not is_true(waiting, "Waiting"), waiting["status"]
        job, workload = train_job_and_workload("second")
        assert job["spec"]["suspend"]
        assert condition(workload, "QuotaReserved") != "True", workload["status"]
        assert not [p for p in space.gpu_pods.so_far() if p.startswith("second-")], "nothing of it asked for a GPU"
        # Deleted while it is queued, it leaves its place in the queue, too.
        space.target.kubectl("delete", "ftj", "second", "-n", space.name)
        space.target.kubectl(
            "wait", f"workload/{workload['metadata']['name']}", "-n", space.name, "--for=delete", "--timeout=60s"
        )
        assert not [p for p in space.pods() if p["metadata"]["name"].startswith("second-")]

        kueue.delete(f"{jobs}/urgent", propagationPolicy="Background")
        first.logs.until(
            lambda lines: next((x for x in lines if x.step is not None and x.step > made), None), 200, "a new step"
        )
        assert place() == kept, "the same place in the queue"
        result = ended(space, first.until_finished())
    assert result.files == undisturbed.ended.files
    assert result.result["resumedFromSteps"][-1] == made, "the preemption cost no step"
    reasons = [a.get("reason") for a in result.job["status"]["attempts"] if a["stage"] == "train"]
    assert len(reasons) == 3, result.job["status"]["attempts"]
    assert "RankFailure" in [r["reason"] for r in result.job["status"]["recoveries"]], "the rank that failed"


def test_the_base_is_fetched_while_the_job_waits_in_the_queue(space: Space, kueue: Api, tmp_path: Path) -> None:
    jobs = f"/apis/batch/v1/namespaces/{space.name}/jobs"
    kueue.create(jobs, urgent(space.name))
    kueue.wait(jobs, "urgent", lambda j: j["status"].get("ready") == 1, 120, "the GPU is somebody else's")
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    volume = claim_on(space, "models", cache, "ReadWriteMany")
    try:
        spec = spec_for(space.put(rows(40)), queue={"name": QUEUE})
        spec["model"]["cache"] = {"claimName": "models", "fetch": "WhileQueued"}
        space.apply("waits", spec)
        told = f"Queued in {QUEUE}: waits for 1 × {GPU}. The base model was fetched meanwhile."
        space.until("waits", lambda j: j.get("status", {}).get("message") == told, 300, "fetched while it is queued")

        of_job = [j for j in kueue.get(jobs)["items"] if j["metadata"]["labels"].get(LABEL_NAME) == "waits"]
        by_stage = {j["metadata"]["labels"][LABEL_STAGE]: j for j in of_job}
        fetch, train = by_stage[Stage.FETCH], by_stage[Stage.TRAIN]
        assert condition(fetch, "Complete") == "True", fetch["status"]
        assert train["spec"]["suspend"], "no quota, and the fetch asked for none"
        assert not [p for p in space.gpu_pods.so_far() if p.startswith("waits-")]
        assert len(list(cache.glob("*/model.safetensors"))) == 1

        kueue.delete(f"{jobs}/urgent", propagationPolicy="Background")
        job = space.until("waits", finished, 300, "finished")
        assert is_true(job, "Complete"), job["status"]
        pods = {a["stage"]: a["pod"] for a in job["status"]["attempts"]}
        assert list(pods) == list(PIPELINE), "a fetch is no execution"
        pods[Stage.FETCH] = next(
            p["metadata"]["name"] for p in space.pods() if p["metadata"]["labels"].get(LABEL_STAGE) == Stage.FETCH
        )
        logs = {stage: space.target.kubectl("logs", "-n", space.name, pod) for stage, pod in pods.items()}
        assert [stage for stage, log in logs.items() if "into the model cache" in log] == [Stage.FETCH]
    finally:
        space.target.kubectl("delete", "pv", volume, "--wait=false")
