"""Bringing a cluster up. Every step looks at what is there and does what is missing, so it may be killed and called again at any time."""

import os
import time
from datetime import datetime

from finetune_cluster import network
from finetune_cluster.addons import ensure_addons
from finetune_cluster.api import Api, Object, condition
from finetune_cluster.archive import make_image
from finetune_cluster.binaries import Binaries, ensure_binaries
from finetune_cluster.console import ClusterError, say, step
from finetune_cluster.containerd import has_sandbox_image, image_names, import_archive, wait_containerd
from finetune_cluster.dns import resolves, wait_resolves
from finetune_cluster.down import half_removed, remove
from finetune_cluster.instance import DOMAIN, Instance, Node, load, load_or_create
from finetune_cluster.locks import locked, write_atomically
from finetune_cluster.node import GPU_RESOURCE, addons_file, configure, pause_image, plane_of, start
from finetune_cluster.packages import NODE, ensure_packages
from finetune_cluster.paths import cache_root, clusters_root
from finetune_cluster.processes import node_inits

KUBERNETES_NAME = f"kubernetes.default.svc.{DOMAIN}"
NODES = "/api/v1/nodes"
PRETENDED_MIB = 16 * 1024
"""What nodes tell of the memory of a pretended GPU."""
ACCOUNTS = "/api/v1/namespaces/default/serviceaccounts"


def up(
    name: str,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    memory_mib: int | None = None,
    gpu_product: str | None = None,
) -> Instance:
    """A healthy cluster of that name with at least so many nodes. Repairs what is broken, adds what is missing, and leaves the rest.

    None keeps what the cluster has; a new one gets 2 GPUs a node and all memory. Running nodes keep their memory until they restart.
    """
    if os.geteuid() != 0:
        raise ClusterError(
            "Nodes are namespaces with network devices of their own, which only root can make: run as root."
        )
    with locked(clusters_root() / f".{name}.lock", f"cluster {name}"):
        begin = time.monotonic()
        found = load(name)
        if found and half_removed(found):
            remove(found)
            found = None
        if found and found.with_nodes(nodes, gpus_per_node, memory_mib) == found and healthy(found):
            say(f"Cluster {name} is up: {len(found.nodes)} node(s), {found.server}")
            return found
        ensure_packages(NODE)
        binaries = ensure_binaries()
        instance = load_or_create(name).with_nodes(nodes, gpus_per_node, memory_mib)
        instance.save()
        network.ensure_bridge(instance)
        plane_of(instance).admin_kubeconfig(instance.kubeconfig)
        started = {node.name: time.time() for node in instance.nodes if _ensure_node(instance, node, binaries)}
        with Api(instance.kubeconfig) as api:
            with step("Waiting for the API server"):
                api.wait_ready()
            ensure_addons(api)
            write_atomically(addons_file(instance), "")
            _ensure_pause_image(instance, binaries)
            with step("Waiting for nodes, DNS and the default service account"):
                for node in instance.nodes:
                    _wait_node(api, instance, node, gpu_product, started.get(node.name, 0))
                api.wait(ACCOUNTS, "default", lambda _: True, 60, "service account `default` exists")
        say(
            f"Cluster {name} is up after {time.monotonic() - begin:.0f} s: {len(instance.nodes)} node(s), {instance.server}"
        )
        return instance


def healthy(instance: Instance) -> bool:
    """Whether all of it runs and answers."""
    inits = node_inits(instance)
    if (
        not all(node.name in inits and network.connected(instance, node) for node in instance.nodes)
        or not instance.kubeconfig.exists()
    ):
        return False
    with Api(instance.kubeconfig, timeout=3) as api:
        if not api.ready():
            return False
        live = {item["metadata"]["name"]: item for item in api.get(NODES)["items"]}
        accounts = {item["metadata"]["name"] for item in api.get(ACCOUNTS)["items"]}
    return "default" in accounts and all(
        node.name in live
        and _node_is_as_wanted(live[node.name], node)
        and has_sandbox_image(instance, node, inits[node.name])
        and resolves(instance.address(node), KUBERNETES_NAME)
        for node in instance.nodes
    )


def ensure_running(instance: Instance, node: Node) -> None:
    """Start one node of a cluster if it does not run."""
    _ensure_node(instance, node, ensure_binaries())


def _ensure_node(instance: Instance, node: Node, binaries: Binaries) -> bool:
    """Start a node unless it runs, and say whether that was needed. A running one keeps its configuration, apart from its GPUs: restarting would end its pods."""
    if node.name in node_inits(instance) and network.connected(instance, node):
        network.ensure_routes(instance, node)
        write_atomically(instance.folder(node) / "gpus", f"{node.gpus}\n")
        return False
    with step(f"Starting node {node.name} at {instance.address(node)}"):
        configure(instance, node, binaries)
        start(instance, node, binaries)
    return True


def _ensure_pause_image(instance: Instance, binaries: Binaries) -> None:
    tag = pause_image(binaries)
    archive = cache_root() / "images" / f"podtool-{tag.rpartition(':')[2]}.tar"
    for init in node_inits(instance).values():
        wait_containerd(init)
        if tag not in image_names(init):
            if not archive.exists():
                make_image(archive, tag, {"/pause": binaries.podtool, "/podtool": binaries.podtool}, ["/pause"])
            import_archive(init, archive)


def _wait_node(api: Api, instance: Instance, node: Node, gpu_product: str | None, started: float) -> None:
    # The API server also remembers what the kubelet said before it died; a node that was started since must speak for itself.
    api.wait(
        NODES,
        node.name,
        lambda item: _node_is_as_wanted(item, node) and _heartbeat(item) >= int(started),
        120,
        f"node {node.name} is Ready with {node.gpus} {GPU_RESOURCE}",
    )
    labels = {f"{GPU_RESOURCE}.count": str(node.gpus) if node.gpus else None}
    if gpu_product:
        labels[f"{GPU_RESOURCE}.product"] = gpu_product if node.gpus else None
        labels[f"{GPU_RESOURCE}.memory"] = str(PRETENDED_MIB) if node.gpus else None
    if node.ordinal == 1:
        labels["node-role.kubernetes.io/control-plane"] = ""
    api.merge(f"{NODES}/{node.name}", {"metadata": {"labels": labels}})
    wait_resolves(instance.address(node), KUBERNETES_NAME)


def _node_is_as_wanted(item: Object, node: Node) -> bool:
    return condition(item, "Ready") == "True" and item["status"].get("allocatable", {}).get(GPU_RESOURCE, "0") == str(
        node.gpus
    )


def _heartbeat(item: Object) -> float:
    """When the kubelet last reported Ready, in seconds since the epoch."""
    beats = [c["lastHeartbeatTime"] for c in item["status"]["conditions"] if c["type"] == "Ready"]
    return datetime.fromisoformat(beats[0]).timestamp() if beats else 0
