"""Kubernetes objects of the tests, as plain dicts."""

from typing import Any

NAMESPACE = "default"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"
Object = dict[str, Any]


def container(image: str, *arguments: str, **more: Any) -> Object:
    """A container that runs podtool with these arguments."""
    return {
        "name": "main",
        "image": image,
        "command": ["/podtool", *arguments],
        "imagePullPolicy": "IfNotPresent",
        **more,
    }


def limits(**resources: str) -> Object:
    """Resources of a container; ``gpus`` stands for the extended resource."""
    named = {"nvidia.com/gpu" if key == "gpus" else key: value for key, value in resources.items()}
    return {"resources": {"limits": named}}


def pod_spec(*containers: Object, **more: Any) -> Object:
    """A pod that ends at once when told to."""
    return {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": list(containers), **more}


def pod(name: str, *containers: Object, labels: dict[str, str] | None = None, **more: Any) -> Object:
    """A pod."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": pod_spec(*containers, **more),
    }


def job(name: str, *containers: Object, backoff_limit: int = 0, **more: Any) -> Object:
    """A Job of one pod."""
    template = {"spec": pod_spec(*containers, **more)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": backoff_limit, "template": template},
    }


def termination(item: Object) -> Object:
    """How a pod's container ended; empty if it has not."""
    statuses = item.get("status", {}).get("containerStatuses") or [{}]
    ended: Object = statuses[0].get("state", {}).get("terminated", {})
    return ended


def waiting(item: Object) -> str:
    """Why a pod's container waits; empty if it does not."""
    statuses = item.get("status", {}).get("containerStatuses") or [{}]
    return str(statuses[0].get("state", {}).get("waiting", {}).get("reason", ""))


def unschedulable(item: Object) -> str:
    """What the scheduler said; empty if it found a place."""
    conditions = item.get("status", {}).get("conditions", [])
    return next(
        (c.get("message", "") for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False"), ""
    )
