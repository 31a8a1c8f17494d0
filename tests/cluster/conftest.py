"""Clusters of the tests. They have names of their own, so that a cluster that runs already is left alone."""

from collections.abc import Iterator

import pytest

from finetune_cluster.api import Api
from finetune_cluster.binaries import ensure_binaries
from finetune_cluster.down import down
from finetune_cluster.instance import Instance
from finetune_cluster.locks import locked
from finetune_cluster.node import pause_image
from finetune_cluster.paths import clusters_root
from finetune_cluster.up import up

MAIN, SECOND = "finetune-test", "finetune-test-2"
GPUS = 2


@pytest.fixture(scope="session")
def image() -> str:
    """The image with podtool, which every cluster has for its pause containers."""
    return pause_image(ensure_binaries())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Instance]:
    """Of this run alone: another run on this machine, of whatever checkout, waits here."""
    with locked(clusters_root() / f".{MAIN}.tests.lock", "the test clusters"):
        down(MAIN)
        yield up(MAIN, nodes=1, gpus_per_node=GPUS)
        down(MAIN)


@pytest.fixture
def second(cluster: Instance) -> Iterator[str]:
    """Name of a cluster that the test brings up itself, while the first one runs."""
    down(SECOND)
    yield SECOND
    down(SECOND)


@pytest.fixture(scope="session")
def session_api(cluster: Instance) -> Iterator[Api]:
    with Api(cluster.kubeconfig) as client:
        yield client


@pytest.fixture
def api(session_api: Api) -> Iterator[Api]:
    """The cluster's API; what a test leaves in `default` is deleted, and waited for, as it may hold GPUs."""
    yield session_api
    root = "/api/v1/namespaces/default"
    for item in session_api.get("/apis/batch/v1/namespaces/default/jobs")["items"]:
        session_api.delete(
            f"/apis/batch/v1/namespaces/default/jobs/{item['metadata']['name']}", propagationPolicy="Background"
        )
    for item in session_api.get(f"{root}/services")["items"]:
        if item["metadata"]["name"] != "kubernetes":
            session_api.delete(f"{root}/services/{item['metadata']['name']}")
    left = {item["metadata"]["name"] for item in session_api.get(f"{root}/pods")["items"]}
    for name in left:
        session_api.delete(f"{root}/pods/{name}", gracePeriodSeconds="1")
    if left:
        for kind, item in session_api.watch(f"{root}/pods", 30):
            if kind == "DELETED":
                left.discard(item["metadata"]["name"])
            if not left or not session_api.get(f"{root}/pods")["items"]:
                break
