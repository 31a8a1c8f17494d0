"""Command lines of the control plane, as data. The full cluster and the light one share them."""

from dataclasses import dataclass
from pathlib import Path

from finetune_cluster.pki import Authority, certificate_user, service_account_key, write_kubeconfig


@dataclass(frozen=True)
class ControlPlane:
    """Where a control plane listens and keeps its things."""

    name: str
    pki: Path
    data: Path
    address: str  # of the API server, as others see it
    port: int
    etcd_port: int
    etcd_peer_port: int
    controller_manager_port: int
    service_cidr: str
    service_address: str
    cluster_cidr: str | None = None

    @property
    def server(self) -> str:
        """URL of the API server."""
        return f"https://{self.address}:{self.port}"

    @property
    def authority(self) -> Authority:
        """The certificate authority of servers and clients."""
        return Authority(self.pki, "ca")

    @property
    def front_proxy(self) -> Authority:
        """The one of the API aggregation's proxy, apart, or every client certificate could pose as any user."""
        return Authority(self.pki, "front-proxy-ca")

    def kubeconfig(self, file: str, user: str, groups: tuple[str, ...] = (), context: str | None = None) -> Path:
        """Issue a client certificate and write a kubeconfig with it."""
        pair = self.authority.issue(file, user, groups)
        return write_kubeconfig(
            self.pki / f"{file}.kubeconfig",
            context or self.name,
            self.server,
            self.authority.certificate_file,
            certificate_user(pair),
        )

    def admin_kubeconfig(self, file: Path) -> Path:
        """The administrator's kubeconfig."""
        pair = self.authority.issue("admin", "admin", ("system:masters",))
        return write_kubeconfig(file, self.name, self.server, self.authority.certificate_file, certificate_user(pair))


def etcd(plane: ControlPlane, program: Path) -> list[str]:
    """etcd for a cluster that is rebuilt rather than repaired: no fsync, which makes it fast on any disk."""
    client, peer = f"http://127.0.0.1:{plane.etcd_port}", f"http://127.0.0.1:{plane.etcd_peer_port}"
    return [
        str(program),
        "--name=etcd",
        f"--data-dir={plane.data / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=etcd={peer}",
        "--unsafe-no-fsync",
        "--auto-compaction-retention=1h",
        "--quota-backend-bytes=4294967296",
        "--log-level=warn",
    ]


def api_server(plane: ControlPlane, program: Path, bind_address: str) -> list[str]:
    """The API server with what production has: Node and RBAC authorization, signed tokens, aggregation, and pod security admission, which
    is on by default."""
    sans = [
        plane.address,
        plane.service_address,
        "127.0.0.1",
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
    ]
    certificate, key = plane.authority.issue(
        "apiserver", "kube-apiserver", sans=[*dict.fromkeys(sans), "kubernetes.default.svc.cluster.local"]
    )
    kubelet_certificate, kubelet_key = plane.authority.issue(
        "apiserver-kubelet", "kube-apiserver-kubelet-client", ("system:masters",)
    )
    proxy_certificate, proxy_key = plane.front_proxy.issue("front-proxy", "front-proxy-client")
    signing_key = service_account_key(plane.pki)
    return [
        str(program),
        f"--etcd-servers=http://127.0.0.1:{plane.etcd_port}",
        f"--bind-address={bind_address}",
        f"--advertise-address={plane.address}",
        f"--secure-port={plane.port}",
        f"--service-cluster-ip-range={plane.service_cidr}",
        f"--client-ca-file={plane.authority.certificate_file}",
        f"--tls-cert-file={certificate}",
        f"--tls-private-key-file={key}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--anonymous-auth=true",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={signing_key}",
        f"--service-account-signing-key-file={signing_key}",
        f"--kubelet-client-certificate={kubelet_certificate}",
        f"--kubelet-client-key={kubelet_key}",
        f"--kubelet-certificate-authority={plane.authority.certificate_file}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--requestheader-client-ca-file={plane.front_proxy.certificate_file}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={proxy_certificate}",
        f"--proxy-client-key-file={proxy_key}",
    ]


def controller_manager(plane: ControlPlane, program: Path) -> list[str]:
    """The controllers. One of them alone runs, so it elects no leader."""
    config = str(plane.kubeconfig("controller-manager", "system:kube-controller-manager"))
    return [
        str(program),
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1",
        f"--secure-port={plane.controller_manager_port}",
        f"--cluster-name={plane.name}",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        f"--root-ca-file={plane.authority.certificate_file}",
        f"--service-account-private-key-file={service_account_key(plane.pki)}",
        f"--client-ca-file={plane.authority.certificate_file}",
        f"--requestheader-client-ca-file={plane.front_proxy.certificate_file}",
        f"--cluster-signing-cert-file={plane.authority.certificate_file}",
        f"--cluster-signing-key-file={plane.authority.key_file}",
        *([f"--cluster-cidr={plane.cluster_cidr}"] if plane.cluster_cidr else []),
    ]


def scheduler(plane: ControlPlane, program: Path) -> list[str]:
    """The scheduler."""
    config = str(plane.kubeconfig("scheduler", "system:kube-scheduler"))
    return [
        str(program),
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
    ]
