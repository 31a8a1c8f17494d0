"""What checkpoints take from a training that nobody disturbs: the same run with one every few steps and with none between its first
step and its last, side by side on one machine.

The hold of the step loop, which ``train/result.json`` tells, is only a part of it: serialising, hashing and uploading share the
cores with training here, as they share the pod's.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import monotonic

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the trainer sets it


from finetune_api.names import Stage
from finetune_api.results import TRAIN_RESULT, TrainResult
from tests.chaos.parts import Figures
from tests.chaos.run import BATCH, METHOD
from tests.support.prepared import RecordingReporter, prepare_job
from tests.support.tiny_model import build_tiny_model
from tests.trainer.conftest import S3, s3_server

STEPS, EVERY = 100, 5
NEVER = 2 * STEPS


class Clock(RecordingReporter):
    """When each activity began, the last time."""

    def __init__(self) -> None:
        super().__init__(Stage.TRAIN)
        self.began: dict[object, float] = {}

    def report(self, **fields: object) -> None:
        if "activity" in fields:
            self.began[fields["activity"]] = monotonic()
        super().report(**fields)


@dataclass(frozen=True)
class Run:
    """A training and its checkpoints."""

    seconds: float
    """From the beginning of training until its last checkpoint was in the bucket."""
    stored: int
    """Checkpoints in the bucket: one that a newer one overtakes never gets there."""
    blocked_seconds: list[float]
    adapter: bytes


def train(s3: S3, model: Path, interval: int) -> Run:
    """One training in this process."""
    from finetune_trainer.train.run import run  # it imports torch: only whoever trains waits for that

    with tempfile.TemporaryDirectory() as folder:
        job = prepare_job(
            s3,
            Path(folder),
            model,
            method=METHOD,
            train_rows=200,
            training={"length": {"steps": STEPS}, **BATCH},
            recovery={"checkpoint": {"interval": {"steps": interval}}},
        )
        clock = Clock()
        run(replace(job.context(), reporter=clock))
        adapter = job.context().output_store().get_bytes("adapter/adapter_model.safetensors")
        result = job.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)
    stored = sum("checkpoint_step" in post for post in clock.posts)
    return Run(clock.began["Evaluating"] - clock.began["Training"], stored, result.checkpoint_blocked_seconds, adapter)


def measure(figures: Figures, pairs: int, say: Callable[[str], None]) -> bool:
    """So many pairs, each in the other order than the one before; one run before them warms caches and is not counted."""
    figures |= {"steps": STEPS, "every_steps": EVERY, "pairs": []}
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "store") as s3:
        model = build_tiny_model(Path(folder) / "tiny")
        expected = train(s3, model, EVERY).adapter
        for number in range(pairs):
            order = (EVERY, NEVER) if number % 2 == 0 else (NEVER, EVERY)
            runs = {interval: train(s3, model, interval) for interval in order}
            assert all(r.adapter == expected for r in runs.values()), "the adapter depends on its checkpoints"
            figures["pairs"].append(pair(runs[EVERY], runs[NEVER]))
            say(json.dumps(figures["pairs"][-1]))
    figures |= summary(figures["pairs"])
    ratio, lost = figures["ratio"], figures["seconds_lost_per_checkpoint"]
    say(
        f"with a checkpoint every {EVERY} of {STEPS} steps training takes {ratio['median']:.3f} times as long as without "
        f"({ratio['min']:.3f} to {ratio['max']:.3f}): {lost['median']:.2f} s for each ({lost['min']:.2f} to {lost['max']:.2f})"
    )
    return True


def pair(many: Run, few: Run) -> Figures:
    """What two runs say together."""
    more = many.stored - few.stored
    assert more > 0, f"{many.stored} checkpoints were stored, and {few.stored} where there should be fewer"
    return {
        "seconds_with": round(many.seconds, 2),
        "seconds_without": round(few.seconds, 2),
        "checkpoints_with": many.stored,
        "checkpoints_without": few.stored,
        "ratio": round(many.seconds / few.seconds, 4),
        "seconds_lost_per_checkpoint": round((many.seconds - few.seconds) / more, 3),
        "blocked_seconds_per_checkpoint": median(many.blocked_seconds),
    }


def summary(pairs: list[Figures]) -> Figures:
    """Each figure's middle and spread."""
    names = ("ratio", "seconds_lost_per_checkpoint", "blocked_seconds_per_checkpoint")
    found = {name: sorted(p[name] for p in pairs) for name in names}
    return {name: {"median": median(v), "min": v[0], "max": v[-1]} for name, v in found.items()}
