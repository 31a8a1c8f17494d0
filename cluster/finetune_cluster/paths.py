"""Where things lie. All of it is per user and machine, not per checkout: a second checkout finds the running cluster."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Root of everything that the driver keeps; binaries and the image store survive ``down``, clusters do not."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "finetune-operator"


def module_root() -> Path:
    """The Go module that the binaries are built from."""
    return Path(__file__).resolve().parent.parent


def checkout_root() -> Path:
    """The checkout that this driver belongs to; the Dockerfile lies there."""
    return module_root().parent


def clusters_root() -> Path:
    """State of all full clusters."""
    return cache_root() / "clusters"
