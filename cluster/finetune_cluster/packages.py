"""Debian packages that the cluster needs on the host."""

import os
import shutil
from pathlib import Path

from finetune_cluster.console import ClusterError, run, step
from finetune_cluster.locks import locked
from finetune_cluster.paths import cache_root

# What a package is needed for, by a file that it brings.
NODE = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/ptp",
    "conntrack": "conntrack",
    "nftables": "nft",
    "iproute2": "ip",
    "ethtool": "ethtool",
    "socat": "socat",
    "mount": "mount",
    "util-linux": "setpriv",
}
IMAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}


def ensure_packages(wanted: dict[str, str]) -> None:
    """Install with apt-get what is missing."""
    if not _missing(wanted):
        return
    with locked(cache_root() / ".packages.lock", "the installation of packages"):
        _install(_missing(wanted))


def _missing(wanted: dict[str, str]) -> list[str]:
    return [package for package, file in wanted.items() if not _present(file)]


def _install(missing: list[str]) -> None:
    if not missing:  # another process did it meanwhile
        return
    if os.geteuid() != 0:
        raise ClusterError(f"Missing packages: {' '.join(missing)}. Run as root, or install them.")
    if not shutil.which("apt-get"):
        raise ClusterError(
            f"Missing programs of the packages {' '.join(missing)}, and there is no apt-get to install them with."
        )
    env = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
    with step(f"Installing {' '.join(missing)}"), _services_stay_off():
        run(["dpkg", "--configure", "-a"], env=env)  # an installation may have been killed
        run(["apt-get", "update", "-qq"], env=env)
        run(install, env=env)


def _present(file: str) -> bool:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return Path(file).exists() if file.startswith("/") else shutil.which(file, path=path) is not None


class _services_stay_off:
    """Keeps Debian's containerd from being started as a service of the host by its package."""

    policy = Path("/usr/sbin/policy-rc.d")
    content = "#!/bin/sh\n# finetune_cluster, while it installs packages\nexit 101\n"

    def __enter__(self) -> None:
        # The same content is what a killed installation left.
        self.ours = not self.policy.exists() or self.policy.read_text() == self.content
        if self.ours:
            self.policy.write_text(self.content)
            self.policy.chmod(0o755)

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.policy.unlink(missing_ok=True)
