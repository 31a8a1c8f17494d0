"""The cluster's programs, built once from Go modules and cached by what they are built from."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from finetune_cluster.console import ClusterError, run, step
from finetune_cluster.locks import locked
from finetune_cluster.paths import cache_root, module_root

KUBERNETES_VERSION = "v1.34.4"
HELM_VERSION = "v3.22.0"
PROGRAMS = (
    "coredns",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "pretend-gpus",
)
NICE = ("nice", "-n", "10")  # the machine stays usable while eight minutes of compiling go on


@dataclass(frozen=True)
class Binaries:
    """Folders of built programs; ``folder`` is good for PATH."""

    folder: Path
    small: Path

    def program(self, name: str) -> Path:
        """Path of one of PROGRAMS."""
        return self.folder / name

    @property
    def podtool(self) -> Path:
        """Static program of the pause and test images."""
        return self.small / "podtool"

    @property
    def nodeinit(self) -> Path:
        """PID 1 of nodes."""
        return self.small / "nodeinit"


def ensure_binaries() -> Binaries:
    """Build what is missing. Cold this takes 8 minutes on 2 cores, warm nothing."""
    root = module_root()
    big_sources = [root / "go.mod", root / "go.sum", *sorted((root / "kube").glob("*.go"))]
    small_sources = [*sorted((root / "podtool").glob("*.go")), *sorted((root / "nodeinit").glob("*.go"))]
    small = _built(_key(small_sources), ["podtool", "nodeinit"], f"Building podtool and nodeinit from {root}")
    big = _built(
        _key(big_sources),
        ["kube"],
        f"Building Kubernetes {KUBERNETES_VERSION} (8 minutes on 2 cores when nothing is cached)",
    )
    return Binaries(folder=big, small=small)


def ensure_helm() -> Path:
    """Path of the ``helm`` program."""
    folder = cache_root() / "bin" / f"helm-{HELM_VERSION}"
    if not (folder / "helm").exists():
        with locked(cache_root() / "bin" / ".lock", "the build of binaries"), _fresh(folder) as temporary:
            if temporary:
                with step(f"Building helm {HELM_VERSION} (2 minutes on 2 cores when nothing is cached)"):
                    env = {"GOBIN": str(temporary), "CGO_ENABLED": "0"}
                    run(
                        [
                            *NICE,
                            _go(),
                            "install",
                            "-trimpath",
                            "-ldflags=-s -w",
                            f"helm.sh/helm/v3/cmd/helm@{HELM_VERSION}",
                        ],
                        env=env,
                    )
    return folder / "helm"


def _built(key: str, packages: list[str], what: str) -> Path:
    folder = cache_root() / "bin" / key
    if not folder.exists():
        with locked(cache_root() / "bin" / ".lock", "the build of binaries"), _fresh(folder) as temporary:
            if temporary:
                with step(what):
                    command = [
                        *NICE,
                        _go(),
                        "build",
                        "-trimpath",
                        "-buildvcs=false",
                        f"-ldflags={_ldflags()}",
                        "-o",
                        f"{temporary}/",
                    ]
                    run(
                        [*command, *(f"./{package}" for package in packages)],
                        cwd=module_root(),
                        env={"CGO_ENABLED": "0"},
                    )
                    if "kube" in packages:
                        for program in PROGRAMS:
                            (temporary / program).symlink_to("kube")
    return folder


class _fresh:
    """A temporary folder that becomes ``folder`` as a whole, or nothing; None if another process was faster."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, Path()

    def __enter__(self) -> Path | None:
        if self.folder.exists():
            return None
        for stale in self.folder.parent.glob(".build-*"):  # of a killed build: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=".build-", dir=self.folder.parent))
        self.temporary.chmod(0o755)
        return self.temporary

    def __exit__(self, failure: object, *_: object) -> None:
        if self.temporary == Path():
            return
        if failure:
            shutil.rmtree(self.temporary, ignore_errors=True)
        else:
            self.temporary.rename(self.folder)


def _key(sources: list[Path]) -> str:
    digest = hashlib.sha256(_ldflags().encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _ldflags() -> str:
    package = "k8s.io/component-base/version"
    major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
    versions = {"gitVersion": KUBERNETES_VERSION, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    return " ".join(["-s -w", *(f"-X {package}.{name}={value}" for name, value in versions.items())])


def _go() -> str:
    go = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin")
    if not go:
        raise ClusterError(
            "The programs of the cluster are built from Go modules, but there is no `go` on PATH. Install Go 1.25 or later."
        )
    return go
