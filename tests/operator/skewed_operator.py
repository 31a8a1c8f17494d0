"""The operator on a machine whose clock is wrong by CLOCK_SKEW_SECONDS: every wall clock that it reads, its library's too."""

from __future__ import annotations

import importlib
import os
import time
import types
from datetime import datetime, timedelta, tzinfo
from typing import Self

from finetune_operator import __main__ as operator

READERS = ("finetune_operator.clock", "finetune_operator.events")
"""Modules of ours that read a wall clock."""


def skew(seconds: float) -> None:
    """Put the clocks forward."""

    class Skewed(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(seconds=seconds)

    for name in READERS:
        module = importlib.import_module(name)
        if hasattr(module, "datetime"):
            module.datetime = Skewed  # type: ignore[attr-defined]
    election = importlib.import_module("kubernetes.aio.leaderelection.leaderelection")
    election.time = types.SimpleNamespace(time=lambda: time.time() + seconds)  # type: ignore[attr-defined]


def main() -> None:
    """Run it."""
    skew(float(os.environ["CLOCK_SKEW_SECONDS"]))
    operator.main()


if __name__ == "__main__":
    main()
