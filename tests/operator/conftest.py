"""One light cluster for this folder; a namespace and operators of its own for every test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_cluster.light import LightCluster
from tests.operator.certificates import make_tls
from tests.operator.harness import Bench, Tls
from tests.support.apiserver import ApiServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightCluster]:
    with LightCluster(tmp_path_factory.mktemp("cluster"), name="operator-tests") as light:
        ApiServer(light.kubeconfig, light.kubectl).install_crds()
        yield light


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def bench(cluster: LightCluster, tls: Tls, tmp_path: Path) -> Iterator[Bench]:
    namespace = f"t{next(_numbers)}"
    with cluster.admin() as api:
        api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        api.wait(f"/api/v1/namespaces/{namespace}/serviceaccounts", "default", lambda _: True, 20, "default account")
    bench = Bench(cluster, tmp_path, tls, namespace)
    yield bench
    bench.close()
