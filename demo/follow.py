"""Follows a FineTuneJob through a watch and prints what changes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from demo.target import DemoError, Target

HEADER = f"{'TIME':>6}  {'PHASE':<11} {'ACTIVITY':<12} {'PROGRESS':>8}  {'LOSS':>7}  {'ETA':>5}  MESSAGE"


def versions(target: Target, namespace: str, name: str, timeout_seconds: float) -> Iterator[dict[str, Any]]:
    """Every version of the job that the API server sends, until it is finished or time is up."""
    command = target.kubectl_command(
        "get", "ftj", name, "-n", namespace, "--watch", "-o", "json", f"--request-timeout={timeout_seconds:.0f}s"
    )
    decoder, buffer = json.JSONDecoder(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        try:
            for line in watch.stdout:
                buffer += line
                if not line.startswith("}"):
                    continue
                job, _ = decoder.raw_decode(buffer)
                buffer = ""
                yield job
                if is_true(job, "Finished"):
                    return
        finally:
            watch.terminate()
    raise DemoError(
        f"the watch on FineTuneJob {name} ended before the job was finished ({timeout_seconds:.0f} s allowed)"
    )


def is_true(job: dict[str, Any], condition: str) -> bool:
    """Whether a condition is true."""
    conditions = job.get("status", {}).get("conditions", [])
    return any(c["type"] == condition and c["status"] == "True" for c in conditions)


def line(job: dict[str, Any], elapsed: float) -> str:
    """One line about a job."""
    status = job.get("status", {})
    progress = status.get("progress", {})
    loss = progress.get("loss")
    return (
        f"{elapsed:5.0f}s  {status.get('phase', '-'):<11} {progress.get('activity') or '-':<12} "
        f"{progress.get('summary') or '-':>8}  {f'{loss:.3f}' if loss is not None else '-':>7}  "
        f"{progress.get('eta') or '-':>5}  {status.get('message') or ''}"
    )


def follow(target: Target, namespace: str, name: str, timeout_seconds: float = 1200) -> dict[str, Any]:
    """Print a line for every change and return the finished job."""
    started = time.monotonic()
    last = ""
    job: dict[str, Any] = {}
    print(HEADER)
    for job in versions(target, namespace, name, timeout_seconds):
        text = line(job, time.monotonic() - started)
        if text[6:] != last:
            print(text, flush=True)
            last = text[6:]
    return job
