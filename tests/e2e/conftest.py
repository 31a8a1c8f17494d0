"""The whole product on the real cluster: brought up once, left up for the next run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from finetune_cluster.instance import require
from tests.chaos.run import Ended, data, live, training_spec
from tests.e2e.stack import Space, Stack, new_space, whole_stack
from tests.support.hub_server import HubServer
from tests.support.tiny_model import build_tiny_model

STEPS = 120
"""Of the jobs that are killed, suspended and preempted."""


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed."""

    spec: dict[str, Any]
    ended: Ended


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole product."""
    with whole_stack(tmp_path_factory.mktemp("model")) as stack:
        yield stack


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


@pytest.fixture(scope="session")
def undisturbed(stack: Stack) -> Iterator[Reference]:
    """What a run that nobody disturbs leaves; jobs of the same spec must leave the same bytes."""
    with new_space(stack.target, stack.bucket) as space:
        spec = training_spec(data(space), STEPS)
        yield Reference(spec, live(space, "undisturbed", spec))
