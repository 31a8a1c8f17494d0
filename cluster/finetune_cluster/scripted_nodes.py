"""Nodes without machines, as the scripted kubelet keeps them."""

import asyncio
import datetime
from collections.abc import Iterable, Mapping

from finetune_cluster.async_api import APPLY_PATCH, AsyncApi

ADDRESS = "127.0.0.1"
LEASE_SECONDS = 10
EMPTY_INFO = (
    "machineID",
    "systemUUID",
    "bootID",
    "kernelVersion",
    "osImage",
    "containerRuntimeVersion",
    "kubeProxyVersion",
)


async def create_node(api: AsyncApi, name: str, labels: Mapping[str, str], resources: Mapping[str, str]) -> None:
    """Create a node that is Ready and has ``resources`` and plenty of the others. One that exists is left as it is."""
    time = now()
    capacity = {"cpu": "256", "memory": "2Ti", "pods": "10000", "ephemeral-storage": "10Ti", **resources}
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Scripted",
        "lastHeartbeatTime": time,
        "lastTransitionTime": time,
    }
    info = {"kubeletVersion": "v1.34.4", "operatingSystem": "linux", "architecture": "amd64"}
    status = {
        "capacity": capacity,
        "allocatable": capacity,
        "conditions": [ready],
        "addresses": [{"type": "InternalIP", "address": ADDRESS}, {"type": "Hostname", "address": name}],
        "nodeInfo": info | dict.fromkeys(EMPTY_INFO, ""),
    }
    metadata = {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": status}
    await api.request("POST", "/api/v1/nodes", body=node, may_fail=(409,))
    await _renew_lease(api, name)


async def renew_leases(api: AsyncApi, nodes: Iterable[str]) -> None:
    """Show for ever that the nodes live, or the node controller takes them for lost and deletes their pods."""
    names = list(nodes)
    while True:
        await asyncio.sleep(LEASE_SECONDS)
        await asyncio.gather(*(_renew_lease(api, name) for name in names))


def now(*, micro: bool = False) -> str:
    """The time as Kubernetes writes it."""
    time = datetime.datetime.now(datetime.UTC)
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


async def _renew_lease(api: AsyncApi, node: str) -> None:
    spec = {"holderIdentity": node, "leaseDurationSeconds": 4 * LEASE_SECONDS, "renewTime": now(micro=True)}
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": node}, "spec": spec}
    path = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{node}"
    query = {"fieldManager": "scripted-kubelet", "force": "true"}
    await api.request("PATCH", path, body=lease, params=query, content_type=APPLY_PATCH)
