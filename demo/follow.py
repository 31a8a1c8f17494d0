"""Follows a FineTuneJob through a watch and prints what changes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from demo.target import DemoError, Target

STAGE_OF_PHASE = {"Preparing": "prepare", "Training": "train", "Publishing": "publish"}
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
    phase = status.get("phase", "-")
    # What a stage did last stays in status until the next one reports.
    activity = progress.get("activity") if STAGE_OF_PHASE.get(phase) == progress.get("stage") else None
    return (
        f"{elapsed:5.0f}s  {phase:<11} {activity or '-':<12} "
        f"{progress.get('summary') or '-':>8}  {f'{loss:.3f}' if loss is not None else '-':>7}  "
        f"{progress.get('eta') or '-':>5}  {status.get('message') or ''}"
    )


@dataclass
class Run:
    """A finished job and when, in seconds after `kubectl apply`, it first showed each phase, and its first training step."""

    job: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)

    def note(self, job: dict[str, Any], elapsed: float) -> None:
        """Take in one version of the job."""
        self.job = job
        status = job.get("status", {})
        if "phase" in status:
            self.reached.setdefault(status["phase"], elapsed)
        if (status.get("progress", {}).get("step") or 0) >= 1:
            self.reached.setdefault("first step", elapsed)

    def to_first_step(self) -> str:
        """The time from apply to the first training step, split."""
        order = [name for name in ("Preparing", "Queued", "Training", "first step") if name in self.reached]
        parts = [f"{name} {self.reached[name]:.0f} s" for name in order]
        return " → ".join(parts)


def follow(target: Target, namespace: str, name: str, timeout_seconds: float = 1200) -> Run:
    """Print a line for every change until the job is finished."""
    started = time.monotonic()
    last = ""
    run = Run()
    print(HEADER)
    for job in versions(target, namespace, name, timeout_seconds):
        elapsed = time.monotonic() - started
        run.note(job, elapsed)
        text = line(job, elapsed)
        if text[6:] != last:
            print(text, flush=True)
            last = text[6:]
    return run
