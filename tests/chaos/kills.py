"""How each thing is killed, and how it is seen to be back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from demo import store
from demo.target import NAMESPACE, SYSTEM_NAMESPACE
from finetune_api.names import LABEL_NAME, LABEL_STAGE
from finetune_cluster.api import Api
from finetune_cluster.instance import Instance
from finetune_cluster.processes import Process, node_inits, of_container, programs
from tests.chaos.schedule import Kind

Raw = dict[str, Any]
BACK_SECONDS = 180.0


class Killer:
    """Kills on one cluster."""

    def __init__(self, instance: Instance, api: Api, namespace: str, job: str) -> None:
        self.instance, self.api, self.namespace, self.job = instance, api, namespace, job

    def stage_pod(self, stage: str) -> Raw:
        """The pod of a stage that runs now."""
        query = f"labelSelector={LABEL_NAME}={self.job},{LABEL_STAGE}={stage}"
        items = self.api.get(f"/api/v1/namespaces/{self.namespace}/pods?{query}")["items"]
        alive = [p for p in items if p["status"].get("phase") in ("Pending", "Running") and not deleted(p)]
        assert len(alive) == 1, [p["metadata"]["name"] for p in items]
        pod: Raw = alive[0]
        return pod

    def kill(self, kind: Kind, stage: str) -> Callable[[], None] | None:
        """Do it. What is returned waits until the thing that died answers again; None where the job's logs tell."""
        match kind:
            case Kind.DELETE:
                self._delete(self.stage_pod(stage))
            case Kind.EVICT:
                self._evict(self.stage_pod(stage))
            case Kind.FORCE:
                self._delete(self.stage_pod(stage), gracePeriodSeconds="0")
            case Kind.CONTAINER:
                end(self._processes(self.stage_pod(stage))[0])
            case Kind.WORKER:
                end(worker(self._processes(self.stage_pod(stage))))
            case Kind.OPERATOR:
                return self._service(SYSTEM_NAMESPACE, "app.kubernetes.io/name=finetune-operator", self._force)
            case Kind.STORE:
                # The process: its disk lives as long as its pod.
                return self._service(NAMESPACE, f"app.kubernetes.io/name={store.SERVICE}", self._first_process)
            case Kind.API_SERVER:
                init = node_inits(self.instance)[self.instance.nodes[0].name]
                end(next(p for p in programs(init) if p.program == "kube-apiserver"))
                return self.api.wait_ready
        return None

    def _service(self, namespace: str, selector: str, kill: Callable[[Raw], None]) -> Callable[[], None]:
        path = f"/api/v1/namespaces/{namespace}/pods"
        items = self.api.get(f"{path}?labelSelector={selector}")["items"]
        pod = next(p for p in items if not deleted(p))
        before = container_of(pod)
        kill(pod)

        def back() -> None:
            def ready(now: Raw) -> bool:
                conditions = {c["type"]: c["status"] for c in now["status"].get("conditions", [])}
                started = (now["status"].get("containerStatuses") or [{}])[0].get("containerID", before)
                return conditions.get("Ready") == "True" and started != before and not deleted(now)

            self.api.wait(path, None, ready, BACK_SECONDS, f"{selector} is ready again", {"labelSelector": selector})

        return back

    def _delete(self, pod: Raw, **query: str) -> None:
        self.api.delete(f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}", **query)

    def _evict(self, pod: Raw) -> None:
        meta = {"name": pod["metadata"]["name"], "namespace": pod["metadata"]["namespace"]}
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/eviction"
        self.api.create(path, {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta})

    def _force(self, pod: Raw) -> None:
        self._delete(pod, gracePeriodSeconds="0")

    def _first_process(self, pod: Raw) -> None:
        end(self._processes(pod)[0])

    @staticmethod
    def _processes(pod: Raw) -> list[Process]:
        processes = of_container(container_of(pod))
        assert processes, f"no process of {pod['metadata']['name']} on this machine"
        return processes


def container_of(pod: Raw) -> str:
    """Id of its only container."""
    return str(pod["status"]["containerStatuses"][0]["containerID"])


def deleted(pod: Raw) -> bool:
    """Whether its deletion has begun."""
    return "deletionTimestamp" in pod["metadata"]


def worker(processes: list[Process]) -> Process:
    """The process that trains."""
    return next(p for p in processes if "worker" in p.argv)


def end(process: Process) -> float:
    """SIGKILL; when it was."""
    os.kill(process.pid, signal.SIGKILL)
    return time.time()
