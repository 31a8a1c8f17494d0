"""An instance is one cluster. Everything that could collide with another one derives from its name and index."""

import ipaddress
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from finetune_cluster.console import ClusterError, run
from finetune_cluster.locks import locked, write_atomically
from finetune_cluster.paths import clusters_root

MAX_INSTANCES = 50
MAX_NODES = 16
DNS_ADDRESS = "169.254.20.10"  # link-local, on lo of every node
DOMAIN = "cluster.local"
API_PORT = 6443
DEFAULT_GPUS = 2


@dataclass(frozen=True)
class Node:
    """One node. ``ordinal`` counts from 1; the first also runs the control plane."""

    name: str
    ordinal: int
    gpus: int = 0
    memory_mib: int | None = None  # what pods may request; None: all that the machine has


@dataclass(frozen=True)
class Instance:
    """One cluster."""

    name: str
    index: int
    nodes: tuple[Node, ...] = field(default=())

    @property
    def state(self) -> Path:
        """Folder of everything that this cluster writes."""
        return clusters_root() / self.name

    @property
    def kubeconfig(self) -> Path:
        """Kubeconfig of the cluster's administrator."""
        return self.state / "kubeconfig"

    @property
    def pki(self) -> Path:
        """Folder of certificates."""
        return self.state / "pki"

    @property
    def bridge(self) -> str:
        """The one network device of the cluster on the host, besides a veth a node."""
        return f"ft{self.index}br"

    def veth(self, node: Node) -> str:
        """The host's end of the node's link to the bridge."""
        return f"ft{self.index}n{node.ordinal}"

    def cgroup(self, node: Node) -> str:
        """Folder of the node below every cgroup hierarchy."""
        return f"{self.cgroup_parent}/{node.name}"

    @property
    def cgroup_parent(self) -> str:
        """Folder of the cluster below every cgroup hierarchy."""
        return f"finetune-cluster-{self.name}"

    def folder(self, node: Node) -> Path:
        """Folder of a node."""
        return self.state / "nodes" / node.name

    @property
    def gateway(self) -> str:
        """The host's address on the bridge; pods reach servers of the host here."""
        return f"10.99.{self.index}.1"

    def address(self, node: Node) -> str:
        """A node's address, reachable from the host: NodePorts are served here."""
        return f"10.99.{self.index}.{1 + node.ordinal}"

    @property
    def subnet(self) -> str:
        """Network of the bridge."""
        return f"10.99.{self.index}.0/24"

    @property
    def api_address(self) -> str:
        """Address of the node with the control plane."""
        return f"10.99.{self.index}.2"

    @property
    def server(self) -> str:
        """URL of the API server, the same from the host and from every node."""
        return f"https://{self.api_address}:{API_PORT}"

    @property
    def pods_cidr(self) -> str:
        """Addresses of all pods."""
        return f"10.{100 + self.index}.0.0/16"

    def pod_cidr(self, ordinal: int) -> str:
        """Addresses of the pods of one node."""
        return f"10.{100 + self.index}.{ordinal}.0/24"

    @property
    def service_cidr(self) -> str:
        """Addresses of services."""
        return f"10.98.{self.index}.0/24"

    @property
    def service_address(self) -> str:
        """Address of the service ``kubernetes``."""
        return f"10.98.{self.index}.1"

    def with_nodes(self, count: int, gpus: int | None, memory_mib: int | None) -> "Instance":
        """The same cluster with at least ``count`` nodes, all with these GPUs and this memory; None leaves them as they are."""
        if not 1 <= count <= MAX_NODES:
            raise ClusterError(f"{count} nodes asked for; a cluster has between 1 and {MAX_NODES}.")
        total = max(count, len(self.nodes))
        first = self.nodes[0] if self.nodes else Node(self.name, 1, DEFAULT_GPUS)
        gpus = first.gpus if gpus is None else gpus
        memory_mib = first.memory_mib if memory_mib is None else memory_mib
        nodes = [Node(f"{self.name}-{ordinal}", ordinal, gpus, memory_mib) for ordinal in range(1, total + 1)]
        return replace(self, nodes=tuple(nodes))

    def node(self, name: str) -> Node:
        """The node of that name."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ClusterError(f"Cluster {self.name} has no node {name!r}, only {', '.join(n.name for n in self.nodes)}.")

    def save(self) -> None:
        """Write it where ``load`` finds it."""
        write_atomically(self.state / "instance.json", json.dumps(asdict(self), indent=1))


def load(name: str) -> Instance | None:
    """The cluster of that name, running or not."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?", name):
        raise ClusterError(
            f"{name!r} does not do as a cluster's name: lower case letters, digits and dashes, 30 at most, a letter first."
        )
    file = clusters_root() / name / "instance.json"
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    return Instance(content["name"], content["index"], tuple(Node(**node) for node in content["nodes"]))


def load_or_create(name: str) -> Instance:
    """The cluster of that name; a new one gets the lowest index whose addresses nobody uses."""
    with locked(clusters_root() / ".lock", "the list of clusters"):
        found = load(name)
        if found:
            return found
        used = {json.loads(file.read_text())["index"] for file in clusters_root().glob("*/instance.json")}
        routes = _routed_networks()
        for index in range(MAX_INSTANCES):
            instance = Instance(name, index)
            networks = [ipaddress.ip_network(n) for n in (instance.subnet, instance.pods_cidr, instance.service_cidr)]
            if index not in used and not any(network.overlaps(route) for network in networks for route in routes):
                instance.save()
                return instance
    raise ClusterError(
        f"No free addresses for another cluster: all {MAX_INSTANCES} ranges 10.99.N.0/24, 10.(100+N).0.0/16, 10.98.N.0/24 are in use."
    )


def require(name: str) -> Instance:
    """The cluster of that name, which must exist."""
    found = load(name)
    if not found:
        raise ClusterError(
            f"There is no cluster {name!r}. Start it with `python -m finetune_cluster up --name {name}`."
        )
    return found


def _routed_networks() -> list[ipaddress.IPv4Network]:
    routes = json.loads(run(["ip", "-4", "-json", "route", "show", "table", "all"]) or "[]")
    destinations = [route["dst"] for route in routes if route["dst"] != "default" and route.get("type") != "local"]
    return [ipaddress.IPv4Network(destination, strict=False) for destination in destinations]
