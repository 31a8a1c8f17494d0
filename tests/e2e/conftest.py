"""The whole product on the real cluster: brought up once, left up for the next run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from demo import images, install, store
from demo.target import Target, current_target, existing_target
from finetune_cluster.instance import require
from finetune_cluster.locks import locked
from finetune_cluster.paths import clusters_root
from tests.e2e.stack import BUCKET, Space, clear_leftovers, new_space, tiny_model
from tests.support.hub_server import HubServer
from tests.support.tiny_model import build_tiny_model

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class Stack:
    """Cluster and store."""

    target: Target
    bucket: S3Client


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Cluster, images, store and operator, as `make demo` sets them up. Of this run alone: another run on this machine waits here."""
    with locked(clusters_root() / ".e2e.tests.lock", "the whole-cluster tests"):
        if existing_target() is None:
            install.cluster_up()
        target = current_target()
        clear_leftovers(target)
        references = images.ensure(target)
        install.install_store(target, references)
        install.install_operator(target, references)
        with store.access(target) as access:
            client = access.client()
            store.ensure_buckets(client)
            store.ensure_bucket(client, BUCKET)
            tiny_model(client, tmp_path_factory.mktemp("model") / "tiny")
            yield Stack(target, client)


@pytest.fixture
def space(stack: Stack) -> Iterator[Space]:
    """A namespace of the test's own."""
    with new_space(stack.target, stack.bucket) as space:
        yield space


@pytest.fixture(scope="session")
def hub_url(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that answers as the Hugging Face Hub does, reachable from pods, with the models acme/tiny and acme/gated."""
    if stack.target.cluster_name is None:
        pytest.skip("pods of a remote cluster cannot reach a server on this machine")
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    build_tiny_model(folder)
    with HubServer(host=require(stack.target.cluster_name).gateway) as hub:
        hub.add_model("acme/tiny", folder)
        hub.add_model("acme/gated", folder, gated=True)
        yield hub.endpoint
