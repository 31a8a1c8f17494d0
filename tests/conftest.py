"""Settings that must stand before any test module imports torch, and which tests share a worker."""

import os
from pathlib import Path

import pytest

# See trainer/finetune_trainer/train/__init__.py; tests share their cores with servers and each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent
ONE_WORKER = {"cluster", "e2e", "api"}
"""Folders whose tests share one cluster, and so one worker; elsewhere every file may have its own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for pytest-xdist, and the longest folders first, so that no worker is left alone with them at the end."""
    order = {"e2e": 0, "cluster": 1, "operator": 2}
    items.sort(key=lambda item: order.get(folder_of(item), 3))
    for item in items:
        folder = folder_of(item)
        item.add_marker(pytest.mark.xdist_group(folder if folder in ONE_WORKER else str(item.path)))


def folder_of(item: pytest.Item) -> str:
    """The folder below tests/."""
    return item.path.relative_to(ROOT).parts[0]
