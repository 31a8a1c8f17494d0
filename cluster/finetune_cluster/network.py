"""The host's part of a cluster's network: one bridge, and a veth and a route a node. Nothing leads out of the machine."""

import json
from pathlib import Path

from finetune_cluster.console import run
from finetune_cluster.instance import DNS_ADDRESS, MAX_NODES, Instance, Node

NODE_DEVICE = "eth0"


def ensure_bridge(instance: Instance) -> None:
    """The bridge with the host's address on it."""
    if not _exists(instance.bridge):
        run(["ip", "link", "add", instance.bridge, "type", "bridge"])
    run(["ip", "address", "replace", f"{instance.gateway}/24", "dev", instance.bridge])
    run(["ip", "link", "set", instance.bridge, "up"])


def connect(instance: Instance, node: Node, init: int) -> None:
    """Link a new node's network namespace to the bridge. Its PID 1 waits for the device."""
    veth = instance.veth(node)
    if _exists(veth):  # of a node that is just being torn down by the kernel
        run(["ip", "link", "delete", veth])
    run(["ip", "link", "add", veth, "type", "veth", "peer", "name", NODE_DEVICE, "netns", str(init)])
    run(["ip", "link", "set", veth, "master", instance.bridge, "up"])


def ensure_routes(instance: Instance, node: Node) -> None:
    """The host's way to pods and services, so that answers to pods stay on the machine, and tests can reach pods."""
    run(
        [
            "ip",
            "route",
            "replace",
            instance.pod_cidr(node.ordinal),
            "via",
            instance.address(node),
            "dev",
            instance.bridge,
        ]
    )
    if node.ordinal == 1:
        run(["ip", "route", "replace", instance.service_cidr, "via", instance.address(node), "dev", instance.bridge])


def connected(instance: Instance, node: Node) -> bool:
    """Whether the node's link hangs on the bridge."""
    return Path(f"/sys/class/net/{instance.bridge}/brif/{instance.veth(node)}").exists()


def node_commands(instance: Instance, node: Node) -> list[list[str]]:
    """What a node's PID 1 runs in its own network namespace: its addresses, and a route to the pods of every other node there may
    ever be. There is no default route and no masquerading: a pod cannot reach any other network."""
    others = [ordinal for ordinal in range(1, MAX_NODES + 1) if ordinal != node.ordinal]
    address = instance.address(node)
    return [
        ["ip", "link", "set", "lo", "up"],
        ["ip", "address", "add", f"{DNS_ADDRESS}/32", "dev", "lo"],
        ["ip", "address", "add", f"{address}/24", "dev", NODE_DEVICE],
        ["ip", "link", "set", NODE_DEVICE, "up"],
        # Never taken as it stands: kube-proxy sends what goes to a service elsewhere. But without any route the API server,
        # which is a process of the node, could not even begin to call webhooks and aggregated APIs.
        ["ip", "route", "add", instance.service_cidr, "dev", NODE_DEVICE, "src", address],
        *(
            ["ip", "route", "add", instance.pod_cidr(o), "via", f"10.99.{instance.index}.{1 + o}", "src", address]
            for o in others
        ),
    ]


def remove(instance: Instance) -> None:
    """Delete the cluster's devices; addresses and routes go with them."""
    links = json.loads(run(["ip", "-json", "link", "show"]))
    names = {link["ifname"] for link in links}
    for name in sorted(name for name in names if name == instance.bridge or name.startswith(f"ft{instance.index}n")):
        if _exists(name):
            run(["ip", "link", "delete", name])


def _exists(device: str) -> bool:
    return Path(f"/sys/class/net/{device}").exists()
