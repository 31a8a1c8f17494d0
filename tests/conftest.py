"""Settings that must stand before any test module imports torch, and which tests share a worker."""

import os
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# See trainer/finetune_trainer/train/__init__.py; tests share their cores with servers and each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent
os.environ.setdefault("FINETUNE_LM_EVAL", str(ROOT.parent / ".venv" / "lm-eval"))  # `make setup` installs it
ONE_WORKER = {"cluster", "e2e", "api"}
"""Folders whose tests share one cluster, and so one worker; elsewhere every file may have its own."""
LONGEST_FIRST = {"e2e": 0, "cluster": 1, "operator": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest folders first, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: LONGEST_FIRST.get(item.path.relative_to(ROOT).parts[0], len(LONGEST_FIRST)))


class FolderScheduling(LoadScopeScheduling):
    """pytest-xdist's ``loadscope``, with folders and files as scopes.

    Not ``--dist loadgroup``: pytest-xdist 3.8 writes groups to ``Item._nodeid``, which pytest 9.2 does not read any more, so
    that every test goes to any worker.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        folder = Path(file).parts[1]
        return folder if folder in ONE_WORKER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """How tests get to workers."""
    return FolderScheduling(config, log)
