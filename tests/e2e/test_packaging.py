"""What is in the images."""

from __future__ import annotations

import json

import pytest

from demo import images
from finetune_cluster.buildstore import StoredImage, find_image, images_root
from tests.e2e.stack import Stack

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
TORCH = "app/.venv/lib/python3.11/site-packages/torch"


@pytest.fixture(params=sorted(images.SOURCES))
def built(request: pytest.FixtureRequest, stack: Stack) -> tuple[str, StoredImage]:
    """Name and image, as loaded into the nodes."""
    if stack.target.cluster_name is None:
        pytest.skip("images of a remote cluster are docker's")
    image = find_image(images.reference(request.param, None))
    assert image is not None
    return request.param, image


def test_no_image_runs_as_root(built: tuple[str, StoredImage]) -> None:
    _, image = built
    assert json.loads(image.config)["config"]["User"] == "65532:65532"


def test_only_the_trainer_has_torch_and_the_others_are_small(built: tuple[str, StoredImage]) -> None:
    name, image = built
    folders = [images_root() / "store" / "overlay" / layer.identity / "diff" for layer in image.layers]
    assert any((folder / TORCH).exists() for folder in folders) == (name == "trainer")
    if name != "trainer":
        assert sum(layer.size for layer in image.layers) < 700e6


def test_our_code_is_a_small_layer_above_the_packages(built: tuple[str, StoredImage]) -> None:
    """So that a change of our code moves kilobytes."""
    _, image = built
    biggest = max(range(len(image.layers)), key=lambda i: image.layers[i].size)
    assert all(layer.size < 5e6 for layer in image.layers[biggest + 1 :])
    assert biggest < len(image.layers) - 1
