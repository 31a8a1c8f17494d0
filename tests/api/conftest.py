"""A real API server with our CRDs, one for this folder's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune_cluster.light import LightCluster
from tests.support.apiserver import ApiServer


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """The light control plane, with the CRDs installed."""
    with LightCluster(tmp_path_factory.mktemp("apiserver"), name="api-tests") as cluster:
        server = ApiServer(cluster.kubeconfig, cluster.kubectl)
        server.install_crds()
        yield server
