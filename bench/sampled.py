"""A process's anonymous memory, sampled from outside: it has no thread of ours in it that would slow it down."""

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

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.01
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
    samples = []
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=own, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    samples.append((time.monotonic(), int(line.split()[1]) * 1024))
            time.sleep(SAMPLE_SECONDS)
    text = log.read_text()
    assert process.returncode == 0, text
    told = next(line for line in text.splitlines() if line.startswith(TOLD))
    return Run(json.loads(told.removeprefix(TOLD)), samples)
