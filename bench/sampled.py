"""The anonymous memory of a process and all that it starts, sampled from outside: no thread of ours in it slows it down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.process_tree import kib, tree

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.01
LOOK_EVERY = 100
"""Samples, after which new processes are looked for."""
TOLD = "TOLD "


@dataclass(frozen=True)
class Run:
    """What a process told, and its memory."""

    told: dict[str, Any]
    samples: list[tuple[float, int]]
    """Moments of the monotonic clock, which all processes share, and anonymous resident bytes."""

    def peak_mib(self, until: float, since: float = 0.0) -> float:
        """The most it held."""
        return max(size for at, size in self.samples if since <= at <= until) / 2**20

    def mib_at(self, moment: float) -> float:
        """What it held at the last sample before a moment."""
        return [size for at, size in self.samples if at <= moment][-1] / 2**20


def tell(**found: object) -> None:
    """In the process: what whoever started it wants to know."""
    print(TOLD + json.dumps(found), flush=True)


def run(module: str, arguments: list[str], log: Path, environ: Mapping[str, str] | None = None) -> Run:
    """``python -m module`` to its end; what it writes goes to ``log``."""
    own = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "api", "trainer", "cluster")),
        "HF_HUB_OFFLINE": "1",
        **(environ or {}),
    }
    samples: list[tuple[float, int]] = []
    pids: list[int] = []
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=own, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            if len(samples) % LOOK_EVERY == 0:
                pids = list(tree(process.pid))
            samples.append((time.monotonic(), sum(kib(pid, "status", "RssAnon:") for pid in pids) * 1024))
            time.sleep(SAMPLE_SECONDS)
    text = log.read_text()
    assert process.returncode == 0, text
    told = next(line for line in text.splitlines() if line.startswith(TOLD))
    return Run(json.loads(told.removeprefix(TOLD)), samples)
