"""The light cluster: etcd, API server and controller-manager on loopback. No root, no nodes, up in seconds, several side by side."""

import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from finetune_cluster import control_plane
from finetune_cluster.api import Api
from finetune_cluster.binaries import ensure_binaries
from finetune_cluster.console import ClusterError
from finetune_cluster.control_plane import ControlPlane
from finetune_cluster.ports import LOOPBACK, free_ports
from finetune_cluster.users import service_account_kubeconfig

Component = Literal["etcd", "kube-apiserver", "kube-controller-manager"]
COMPONENTS: tuple[Component, ...] = ("etcd", "kube-apiserver", "kube-controller-manager")
# The defaults (20 and 30 requests a second) would make the job controller the bottleneck of every burst.
FAST_CONTROLLERS = (
    "--kube-api-qps=1000",
    "--kube-api-burst=2000",
    "--concurrent-job-syncs=20",
    "--concurrent-gc-syncs=40",
)


class LightCluster:
    """A control plane that lives as long as the ``with`` block, and dies with this process.

    Start it from the main thread: the kernel ends the components when the thread that started them ends.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "light",
        *,
        api_server_arguments: Sequence[str] = (),
        controller_manager_arguments: Sequence[str] = FAST_CONTROLLERS,
    ) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self._binaries = ensure_binaries()
        port, etcd, peer, manager = free_ports(4)
        self._plane = ControlPlane(
            name=name,
            pki=folder / "pki",
            data=folder,
            address=LOOPBACK,
            port=port,
            etcd_port=etcd,
            etcd_peer_port=peer,
            controller_manager_port=manager,
            service_cidr="10.97.0.0/16",
            service_address="10.97.0.1",
        )
        self._extra: dict[str, Sequence[str]] = {
            # A loopback address is refused as an endpoint of the service `kubernetes`, again and again.
            "kube-apiserver": ["--endpoint-reconciler-type=none", *api_server_arguments],
            "kube-controller-manager": controller_manager_arguments,
        }
        self._processes: dict[Component, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._plane.admin_kubeconfig(self.kubeconfig)
            for component in COMPONENTS:
                self.start(component)
            self.wait_ready()
        except BaseException:  # __exit__ is not called now: whatever it was, no component may stay behind
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def server(self) -> str:
        """URL of the API server."""
        return self._plane.server

    @property
    def kubectl(self) -> Path:
        """A kubectl of the server's version."""
        return self._binaries.program("kubectl")

    def admin(self) -> Api:
        """A client with all rights; close it, or use it in a ``with`` block."""
        return Api(self.kubeconfig)

    def service_account(self, namespace: str, name: str) -> Path:
        """A kubeconfig with the rights of an existing service account alone."""
        return service_account_kubeconfig(
            self.kubeconfig, namespace, name, self.folder / f"{namespace}-{name}.kubeconfig"
        )

    def certificate(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of a server on loopback that this cluster's clients trust, for example a proxy."""
        return self._plane.authority.issue(name, name, sans=["127.0.0.1", "localhost"])

    def start(self, component: Component) -> None:
        """Start a component that does not run. ``wait_ready`` waits for it."""
        if self.running(component):
            return
        with (self.folder / f"{component}.log").open("ab") as log:
            argv = ["setpriv", "--pdeathsig", "KILL", *self._argv(component)]
            self._processes[component] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self, component: Component, seconds: float = 30) -> None:
        """End a component in order (SIGTERM) and wait for that. The API server lets running requests end, but not watches."""
        self._signal(component, signal.SIGTERM, seconds)

    def kill(self, component: Component) -> None:
        """End a component at once (SIGKILL)."""
        self._signal(component, signal.SIGKILL, 30)

    def freeze(self, component: Component) -> None:
        """Stop a component's execution, so that its connections stay open and nothing answers."""
        self._processes[component].send_signal(signal.SIGSTOP)

    def thaw(self, component: Component) -> None:
        """Undo ``freeze``."""
        self._processes[component].send_signal(signal.SIGCONT)

    def running(self, component: Component) -> bool:
        """Whether the component runs."""
        process = self._processes.get(component)
        return process is not None and process.poll() is None

    def wait_ready(self, seconds: float = 60) -> None:
        """Wait until the API server answers and the controllers made the default service account."""
        with self.admin() as api:
            try:
                api.wait_ready(seconds)
                if self.running("kube-controller-manager"):
                    path = "/api/v1/namespaces/default/serviceaccounts"
                    api.wait(path, "default", lambda _: True, seconds, "service account `default` exists")
            except ClusterError as error:
                raise ClusterError(f"{error}\n{self._last_words()}") from None

    def _argv(self, component: Component) -> list[str]:
        program = self._binaries.program(component)
        if component == "etcd":
            argv = control_plane.etcd(self._plane, program)
        elif component == "kube-apiserver":
            argv = control_plane.api_server(self._plane, program, LOOPBACK)
        else:
            argv = control_plane.controller_manager(self._plane, program)
        return [*argv, *self._extra.get(component, ())]

    def _signal(self, component: Component, number: signal.Signals, seconds: float) -> None:
        process = self._processes.pop(component, None)
        if process:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            process.wait(seconds)

    def _end(self) -> None:
        for component in reversed(COMPONENTS):
            self.kill(component)
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def _last_words(self) -> str:
        logs = [self.folder / f"{component}.log" for component in COMPONENTS]
        return "\n".join(f"{log}: {' | '.join(log.read_text().splitlines()[-2:])}" for log in logs if log.exists())
