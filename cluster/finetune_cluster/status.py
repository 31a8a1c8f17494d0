"""What a cluster is made of and how it does."""

from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from finetune_cluster import network
from finetune_cluster.api import Api, Object, condition
from finetune_cluster.console import ClusterError
from finetune_cluster.containerd import has_sandbox_image
from finetune_cluster.dns import resolves
from finetune_cluster.instance import Instance, Node
from finetune_cluster.node import GPU_RESOURCE
from finetune_cluster.processes import node_inits, programs, resident_mib
from finetune_cluster.up import KUBERNETES_NAME, NODES


@dataclass
class ProgramStatus:
    """A running program."""

    name: str
    pid: int
    memory_mib: int


@dataclass
class NodeStatus:
    """A node."""

    name: str
    address: str
    running: bool
    ready: str
    gpus: str
    dns: bool
    sandbox_image: bool
    version: str = ""
    programs: list[ProgramStatus] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)


@dataclass
class ClusterStatus:
    """A cluster."""

    name: str
    server: str
    kubeconfig: str
    state: str
    pods: str
    services: str
    api_ready: bool
    nodes: list[NodeStatus]

    @property
    def healthy(self) -> bool:
        """Whether all of it runs and answers."""
        return self.api_ready and all(
            node.running and node.ready == "True" and node.dns and node.sandbox_image for node in self.nodes
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "healthy": self.healthy}


def cluster_status(instance: Instance) -> ClusterStatus:
    """Ask processes, the API server and DNS."""
    live: dict[str, Object] = {}
    ready = False
    if instance.kubeconfig.exists():
        with Api(instance.kubeconfig, timeout=3) as api:
            ready = api.ready()
            try:
                live = {item["metadata"]["name"]: item for item in api.get(NODES)["items"]} if ready else {}
            except ClusterError:
                ready = False
    inits = node_inits(instance)
    nodes = [_node_status(instance, node, inits.get(node.name), live.get(node.name, {})) for node in instance.nodes]
    return ClusterStatus(
        name=instance.name,
        server=instance.server,
        kubeconfig=str(instance.kubeconfig),
        state=str(instance.state),
        pods=instance.pods_cidr,
        services=instance.service_cidr,
        api_ready=ready,
        nodes=nodes,
    )


def _node_status(instance: Instance, node: Node, init: int | None, item: Object) -> NodeStatus:
    status: Object = item.get("status", {})
    images = {_image_name(image): image["sizeBytes"] for image in status.get("images", []) if image.get("names")}
    return NodeStatus(
        name=node.name,
        address=instance.address(node),
        running=init is not None and network.connected(instance, node),
        ready=condition(item, "Ready") or "Unknown",
        gpus=status.get("allocatable", {}).get(GPU_RESOURCE, "0"),
        dns=init is not None and resolves(instance.address(node), KUBERNETES_NAME),
        sandbox_image=init is not None and has_sandbox_image(instance, node, init),
        version=status.get("nodeInfo", {}).get("kubeletVersion", ""),
        programs=[ProgramStatus(p.program, p.pid, resident_mib(p.pid)) for p in (programs(init) if init else [])],
        images=images,
    )


def _image_name(image: Object) -> str:
    """Its tag, or its digest if it has none. (An image whose tag was taken away has no names at all, and is not shown.)"""
    names: list[str] = image["names"]
    return next((name for name in names if "@" not in name), names[0])


def show(status: ClusterStatus) -> None:
    """Print it for people."""
    console = Console(soft_wrap=True)
    console.print(
        f"Cluster [bold]{status.name}[/]: {'healthy' if status.healthy else '[bold red]not healthy[/]'}",
        highlight=False,
    )
    for label, value in (
        ("API server", f"{status.server} ({'ready' if status.api_ready else 'not ready'})"),
        ("Kubeconfig", status.kubeconfig),
        ("State, logs", status.state),
        ("Pods", status.pods),
        ("Services", status.services),
    ):
        console.print(f"  {label:<12} {value}", highlight=False)
    table = Table(
        "Node", "Address", "Runs", "Ready", "DNS", "Sandbox image", "GPUs", "Version", box=None, pad_edge=False
    )
    for node in status.nodes:
        table.add_row(
            node.name,
            node.address,
            _yes(node.running),
            node.ready,
            _yes(node.dns),
            _yes(node.sandbox_image),
            node.gpus,
            node.version,
        )
    console.print(table)
    programs_table = Table("Program", "Node", "Pid", "Memory", box=None, pad_edge=False)
    for node in status.nodes:
        for program in node.programs:
            programs_table.add_row(program.name, node.name, str(program.pid), f"{program.memory_mib} MiB")
    console.print(programs_table)
    images = {name: size for node in status.nodes for name, size in node.images.items()}
    images_table = Table("Image", "Size", box=None, pad_edge=False)
    for name, size in sorted(images.items()):
        images_table.add_row(name, f"{size / 1e6:.1f} MB")
    console.print(images_table)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
