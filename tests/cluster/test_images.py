"""Images get from a Dockerfile into the nodes without a registry, and only what is new moves."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_cluster.api import Api
from finetune_cluster.archive import content_tag, full_name, make_image
from finetune_cluster.binaries import ensure_binaries
from finetune_cluster.buildstore import buildah, find_image
from finetune_cluster.console import ClusterError
from finetune_cluster.containerd import blobs
from finetune_cluster.images import build, has_image, layers_to_move, load
from finetune_cluster.instance import Instance
from finetune_cluster.node import stop
from finetune_cluster.processes import node_inits
from finetune_cluster.up import up
from tests.cluster.conftest import GPUS
from tests.cluster.objects import PODS, pod, termination

pytestmark = pytest.mark.cluster
DOCKERFILE = """
ARG BASE_IMAGE
FROM ${BASE_IMAGE} AS app
COPY big /big
COPY code /code
RUN cat /code > "/tmp/a name with spaces and ü" && ln /code /hardlink && ln -s /code /symlink && mkfifo /fifo
USER 65532:65532
ENTRYPOINT ["cat", "/code"]
"""
BIG = 70 << 20


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Builds an image that says what it is given, above a big layer that stays the same."""
    folder = tmp_path_factory.mktemp("context")
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / "big").write_bytes(os.urandom(BIG))
    tags = []

    def make_one(text: str) -> str:
        (folder / "code").write_text(text)
        tags.append(build("app", f"localhost/finetune-test:{text}", context=folder))
        return tags[-1]

    yield make_one
    for tag in tags:
        buildah("rmi", tag)


def said(api: Api, name: str, image: str) -> str:
    """What a pod of the image says."""
    script = 'cat "/tmp/a name with spaces and ü" /hardlink /symlink > /dev/termination-log && test -p /fifo'
    spec = {"name": "main", "image": image, "imagePullPolicy": "Never", "command": ["sh", "-c", script]}
    api.create(PODS, pod(name, spec))
    end = termination(api.wait(PODS, name, lambda p: bool(termination(p)), 40, "pod has ended"))
    assert end["exitCode"] == 0
    return str(end["message"])


def test_a_change_of_code_moves_one_small_layer(api: Api, cluster: Instance, make: Callable[[str], str]) -> None:
    [init] = node_inits(cluster).values()
    first = make("one")
    assert not has_image(cluster, first)
    load(cluster, [first])
    assert has_image(cluster, first)
    assert said(api, "one", first) == "oneoneone"

    second = make("two")
    stored = find_image(second)
    assert stored
    assert sum(layer.size for layer in layers_to_move(init, stored)) < 1 << 20
    load(cluster, [second])
    assert said(api, "two", second) == "twotwotwo"
    assert not {layer.digest for layer in stored.layers if layer.size >= BIG} & blobs(init), "unpacked and dropped"


def test_an_image_outlives_a_restart_of_its_node(api: Api, cluster: Instance, make: Callable[[str], str]) -> None:
    tag = make("kept")
    load(cluster, [tag])
    stop(cluster, cluster.nodes[0])
    up(cluster.name, 1, GPUS)
    assert said(api, "kept", tag) == "keptkeptkept"


def test_variables_of_the_build_are_not_in_the_image(make: Callable[[str], str]) -> None:
    image = find_image(make("clean"))
    assert image
    assert not [variable for variable in json.loads(image.config)["config"]["Env"] if "CERT" in variable]


def test_an_image_made_of_files_runs(api: Api, cluster: Instance, tmp_path: Path) -> None:
    program = ensure_binaries().podtool
    tag = f"localhost/made:{content_tag(program)}"
    files = {"/opt/tool/run": program}
    load(
        cluster,
        [make_image(tmp_path / "made.tar", tag, files, ["/opt/tool/run"], env={"A": "b"}, folders={"/data": 0o777})],
    )
    spec = {"name": "main", "image": tag, "imagePullPolicy": "Never", "args": ["write", "/data/x", "y"]}
    api.create(PODS, pod("made", spec))
    assert termination(api.wait(PODS, "made", lambda p: bool(termination(p)), 40, "pod has ended"))["exitCode"] == 0


def test_an_unknown_image_is_an_error_that_names_those_there_are(cluster: Instance) -> None:
    with pytest.raises(ClusterError, match=r"No image 'localhost/nothing:1' in the store, which has: "):
        load(cluster, ["localhost/nothing:1"])


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("weed:1", "docker.io/library/weed:1"),
        ("me/weed", "docker.io/me/weed:latest"),
        ("localhost/weed:1", "localhost/weed:1"),
        ("registry.example.com:5000/a/b:2", "registry.example.com:5000/a/b:2"),
    ],
)
def test_names_are_completed_as_kubernetes_does(tag: str, name: str) -> None:
    assert full_name(tag) == name
