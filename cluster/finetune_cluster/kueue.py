"""Kueue on a local cluster, from a folder with its static program (`manager`) and Helm chart (`chart.tgz`): no registry has to serve it."""

import time
from pathlib import Path

from finetune_cluster.api import Api, ApiError, condition
from finetune_cluster.archive import content_tag, make_image
from finetune_cluster.binaries import ensure_binaries, ensure_helm
from finetune_cluster.buildstore import images_root
from finetune_cluster.console import run, step
from finetune_cluster.images import has_image, load
from finetune_cluster.instance import Instance

NAMESPACE = "kueue-system"
REPOSITORY = "localhost/kueue"
DEPLOYMENTS = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
API_SERVICES = "/apis/apiregistration.k8s.io/v1/apiservices"


def install_kueue(instance: Instance, folder: Path, seconds: float = 120) -> None:
    """Install it and wait until its webhooks and its visibility API answer. Calling it again does no harm."""
    tag = content_tag(folder / "manager")
    image = f"{REPOSITORY}:{tag}"
    if not has_image(instance, image):
        archive = images_root() / f"kueue-{tag}.tar"
        load(instance, [make_image(archive, image, {"/manager": folder / "manager"}, ["/manager"])])
        archive.unlink()
    manifests = _manifests(folder, tag)
    kubectl = [*_kubectl(instance), "apply", "--server-side"]
    with step("Installing Kueue"), Api(instance.kubeconfig) as api:
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        api.apply(f"/api/v1/namespaces/{NAMESPACE}", namespace)
        run([*kubectl, "--force-conflicts", "-f", "-"], stdin=manifests)
        deployment = "kueue-controller-manager"
        api.wait(DEPLOYMENTS, deployment, lambda d: condition(d, "Available") == "True", seconds, "Kueue is Available")
        service = "v1beta2.visibility.kueue.x-k8s.io"
        api.wait(API_SERVICES, service, lambda s: condition(s, "Available") == "True", seconds, "Kueue's API answers")
        _wait_for_webhooks(api, seconds)


def uninstall_kueue(instance: Instance, folder: Path) -> None:
    """Remove it, its objects first: their finalizers are Kueue's, and without it nobody would take them off."""
    kubectl = _kubectl(instance)
    with step("Removing Kueue"):
        for kind in ("localqueues", "clusterqueues", "resourceflavors", "workloadpriorityclasses"):
            everywhere = ["--all-namespaces"] if kind == "localqueues" else []
            run([*kubectl, "delete", f"{kind}.kueue.x-k8s.io", "--all", *everywhere, "--timeout=60s"])
        run(
            [*kubectl, "delete", "--ignore-not-found", "-f", "-"],
            stdin=_manifests(folder, content_tag(folder / "manager")),
        )
        run([*kubectl, "delete", "namespace", NAMESPACE, "--ignore-not-found"])


def _kubectl(instance: Instance) -> list[str | Path]:
    return [ensure_binaries().program("kubectl"), f"--kubeconfig={instance.kubeconfig}"]


def _manifests(folder: Path, tag: str) -> str:
    manager = "controllerManager.manager.image"
    values = f"{manager}.repository={REPOSITORY},{manager}.tag={tag},{manager}.pullPolicy=IfNotPresent"
    chart: list[str | Path] = [
        ensure_helm(),
        "template",
        "kueue",
        folder / "chart.tgz",
        f"--namespace={NAMESPACE}",
        "--include-crds",
    ]
    return run([*chart, f"--set={values}"])


def _wait_for_webhooks(api: Api, seconds: float) -> None:
    """Kueue 0.19 is Available before its webhooks serve, and no condition tells: what it would refuse is tried without effect."""
    flavor = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": "probe"}}
    end = time.monotonic() + seconds
    while True:
        try:
            api.create("/apis/kueue.x-k8s.io/v1beta2/resourceflavors?dryRun=All", flavor)
        except ApiError as error:
            if "failed calling webhook" not in error.message or time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return
