"""A node: the configuration of its programs, and starting and stopping its namespaces."""

import json
import os
import shutil
import tomllib
from pathlib import Path

import yaml

from finetune_cluster import control_plane, network
from finetune_cluster.archive import content_tag
from finetune_cluster.binaries import Binaries
from finetune_cluster.console import ClusterError, run
from finetune_cluster.control_plane import ControlPlane
from finetune_cluster.instance import API_PORT, DNS_ADDRESS, DOMAIN, Instance, Node
from finetune_cluster.locks import write_atomically
from finetune_cluster.processes import kill_and_wait, node_inits, spec_file

CONTAINERD_SOCKET = "/run/containerd/containerd.sock"  # in the node's mount namespace
GPU_RESOURCE = "nvidia.com/gpu"
FIRST = 1  # ordinal of the node with the control plane
MIB = 1 << 20


def plane_of(instance: Instance) -> ControlPlane:
    """The control plane of a full cluster: on the first node, in its namespaces, so ports need not be free on the host."""
    first = instance.nodes[0]
    return ControlPlane(
        name=instance.name,
        pki=instance.pki,
        data=instance.folder(first),
        address=instance.api_address,
        port=API_PORT,
        etcd_port=2379,
        etcd_peer_port=2380,
        controller_manager_port=10257,
        service_cidr=instance.service_cidr,
        service_address=instance.service_address,
        cluster_cidr=instance.pods_cidr,
    )


def configure(instance: Instance, node: Node, binaries: Binaries) -> None:
    """Write everything that the node's programs read."""
    folder, plane = instance.folder(node), plane_of(instance)
    for name in ("lib", "log", "cni"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("containerd", "kubelet", "cni"):
        (folder / "lib" / name).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "resolv.conf", "")
    write_atomically(folder / "containerd.toml", _containerd(folder, pause_image(binaries)))
    write_atomically(folder / "cni" / "10-finetune.conflist", json.dumps(_cni(instance, node), indent=1))
    write_atomically(folder / "kubelet.yaml", yaml.safe_dump(_kubelet(instance, node, plane), sort_keys=False))
    write_atomically(folder / "kube-proxy.yaml", yaml.safe_dump(_kube_proxy(instance, plane, node), sort_keys=False))
    write_atomically(folder / "Corefile", _corefile(instance, node, plane))
    write_atomically(folder / "gpus", f"{node.gpus}\n")
    write_atomically(spec_file(instance, node), json.dumps(_spec(instance, node, binaries), indent=1))


def addons_file(instance: Instance) -> Path:
    """Exists once the addons are applied: CoreDNS without its rights would back off for many seconds."""
    return instance.state / "addons-applied"


def pause_image(binaries: Binaries) -> str:
    """Name of the image of every pod's first container; it changes with the program in it."""
    return f"finetune.dev/podtool:{content_tag(binaries.podtool)}"


def sandbox_image(instance: Instance, node: Node) -> str:
    """Name of the image without which the node's containerd starts no pod."""
    config = tomllib.loads((instance.folder(node) / "containerd.toml").read_text())
    return str(config["plugins"]["io.containerd.grpc.v1.cri"]["sandbox_image"])


def start(instance: Instance, node: Node, binaries: Binaries) -> int:
    """Start the node's namespaces, from whatever an earlier start left. Returns the host's pid of its PID 1."""
    stop(instance, node)
    log = instance.folder(node) / "log" / "nodeinit.log"
    pid = int(run([binaries.nodeinit, "launch", spec_file(instance, node)]))
    try:
        network.connect(instance, node, pid)
    except ClusterError as error:
        last = log.read_text().splitlines()[-1:] if log.exists() else []
        raise ClusterError(f"Node {node.name} did not start: {error}\n{' '.join(last)} (see {log})") from None
    network.ensure_routes(instance, node)
    return pid


def stop(instance: Instance, node: Node) -> bool:
    """Kill everything of the node at once, as when a machine loses power; says whether there was anything."""
    pid = node_inits(instance).get(node.name)
    if pid:
        kill_and_wait(pid)
    return pid is not None


def containerd_address(init: int) -> str:
    """The node's containerd socket, as the host reaches it."""
    return f"/proc/{init}/root{CONTAINERD_SOCKET}"


def _spec(instance: Instance, node: Node, binaries: Binaries) -> dict[str, object]:
    folder, plane = instance.folder(node), plane_of(instance)
    kubelet_config = plane.kubeconfig(f"kubelet-{node.name}", f"system:node:{node.name}", ("system:nodes",))
    api = ["tcp", f"{instance.api_address}:{API_PORT}"]
    programs: list[dict[str, object]] = []

    def program(name: str, argv: list[str], *wait_for: list[str]) -> None:
        programs.append({"name": name, "argv": argv, "waitFor": list(wait_for)})

    if node.ordinal == FIRST:
        etcd = ["tcp", f"127.0.0.1:{plane.etcd_port}"]
        program("etcd", control_plane.etcd(plane, binaries.program("etcd")))
        program("kube-apiserver", control_plane.api_server(plane, binaries.program("kube-apiserver"), "0.0.0.0"), etcd)
        manager = control_plane.controller_manager(plane, binaries.program("kube-controller-manager"))
        program("kube-controller-manager", manager, api)
        program("kube-scheduler", control_plane.scheduler(plane, binaries.program("kube-scheduler")), api)
    program(
        "containerd", [shutil.which("containerd") or "/usr/bin/containerd", f"--config={folder / 'containerd.toml'}"]
    )
    kubelet = [
        str(binaries.program("kubelet")),
        f"--config={folder / 'kubelet.yaml'}",
        f"--kubeconfig={kubelet_config}",
        f"--hostname-override={node.name}",
        f"--node-ip={instance.address(node)}",
        "--root-dir=/var/lib/kubelet",
    ]
    program("kubelet", kubelet, ["unix", CONTAINERD_SOCKET], api)
    program("kube-proxy", [str(binaries.program("kube-proxy")), f"--config={folder / 'kube-proxy.yaml'}"], api)
    program(
        "coredns",
        [str(binaries.program("coredns")), "-conf", str(folder / "Corefile")],
        api,
        ["file", str(addons_file(instance))],
    )
    gpus = [str(binaries.program("pretend-gpus")), "--resource", GPU_RESOURCE, "--count-file", str(folder / "gpus")]
    program("pretend-gpus", gpus, ["unix", "/var/lib/kubelet/device-plugins/kubelet.sock"])
    return {
        "hostname": node.name,
        "cgroup": instance.cgroup(node),
        "device": network.NODE_DEVICE,
        # All of /var/lib and /var/log, as kubelet, containerd and CNI write to several folders there, and no mount points may
        # have to be made on the host.
        "binds": [
            {"source": str(folder / "lib"), "target": "/var/lib"},
            {"source": str(folder / "log"), "target": "/var/log"},
        ],
        "tmpfs": ["/run"],
        "network": network.node_commands(instance, node),
        "sysctls": [{"path": "net/ipv4/ip_forward", "value": "1"}],
        "logFolder": str(folder / "log"),
        "programs": programs,
    }


def _containerd(folder: Path, sandbox_image: str) -> str:
    # restrict_oom_score_adj: without CAP_SYS_RESOURCE no score can be lowered, and every sandbox would die with "can't get final child's PID".
    return f"""version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "{CONTAINERD_SOCKET}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder / "cni"}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""


def _cni(instance: Instance, node: Node) -> dict[str, object]:
    # ptp, not bridge: every packet between pods is routed and so passes the rules of kube-proxy. Behind a bridge answers of a service's pod
    # on the same node would go past them, unless the host's br_netfilter is on.
    ranges = [[{"subnet": instance.pod_cidr(node.ordinal)}]]
    ipam = {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    return {"cniVersion": "0.4.0", "name": "finetune", "plugins": [{"type": "ptp", "ipMasq": False, "ipam": ipam}]}


def _kubelet(instance: Instance, node: Node, plane: ControlPlane) -> dict[str, object]:
    certificate, key = plane.authority.issue(
        f"kubelet-server-{node.name}", node.name, sans=[node.name, instance.address(node)]
    )
    config: dict[str, object] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(plane.authority.certificate_file)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(certificate),
        "tlsPrivateKeyFile": str(key),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{instance.cgroup(node)}",
        "failCgroupV1": False,
        # Default: 1m. A Secret that appears late, mounted as optional, is in the pod after at most about that time.
        "syncFrequency": "10s",
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "oomScoreAdj": 0,
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": DOMAIN,
        "resolvConf": str(instance.folder(node) / "resolv.conf"),
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        # Absolute: the defaults are shares of the disk, and one image of 6 GB would bring DiskPressure to a big, mostly full one.
        "evictionHard": {
            "memory.available": "200Mi",
            "nodefs.available": "1Gi",
            "imagefs.available": "1Gi",
            "nodefs.inodesFree": "10000",
        },
        # Images are imported and cannot be pulled again, so none may be collected.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "serializeImagePulls": False,
        "registerWithTaints": [],
    }
    if node.memory_mib:
        hidden = max(
            0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB - node.memory_mib - 200
        )  # 200: evictionHard
        config["systemReserved"] = {"memory": f"{hidden}Mi"}
    return config


def _kube_proxy(instance: Instance, plane: ControlPlane, node: Node) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(plane.kubeconfig("kube-proxy", "system:kube-proxy"))},
        "mode": "nftables",
        "clusterCIDR": instance.pods_cidr,
        "hostnameOverride": node.name,
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },  # sysctls of the host
        "oomScoreAdj": 0,
    }


def _corefile(instance: Instance, node: Node, plane: ControlPlane) -> str:
    # Names outside the cluster do not exist: NXDOMAIN at once, instead of time-outs. That is a block of its own, as CoreDNS runs `template`
    # before `kubernetes`, in whatever order they stand. `host.finetune.internal` is the host.
    config = plane.kubeconfig("coredns", "system:coredns")
    bind = f"bind {DNS_ADDRESS} {instance.address(node)}"
    return f"""{DOMAIN}:53 in-addr.arpa:53 ip6.arpa:53 {{
    {bind}
    errors
    health 127.0.0.1:8080
    ready 127.0.0.1:8181
    kubernetes {DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {config}
        pods insecure
        ttl 5
    }}
    cache 5
}}

finetune.internal:53 {{
    {bind}
    hosts {{
        {instance.gateway} host.finetune.internal
    }}
}}

.:53 {{
    {bind}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""
