"""Our train stage in this process: ``python -m bench.our_train JOB.json``. Prints what bench/training_speed.py wants to know.

The folders are a pod's as tests/support/train_container.py has them.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench import sampled
from finetune_api.names import Stage
from finetune_api.results import TrainReport
from finetune_trainer.entrypoint import set_up, train
from finetune_trainer.reporter import Reporter
from tests.support.train_container import context


class Clock(Reporter):
    """When each optimizer step was made, and the whole adapter uploaded."""

    def __init__(self) -> None:
        super().__init__(Stage.TRAIN, "bench")
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.uploaded = 0.0

    def report(self, **fields: object) -> None:
        """The stage tells of each step as soon as it is made."""
        if "loss" in fields:
            self.ends.append(time.monotonic())
            self.cpu.append(time.process_time())
        if fields.get("activity") == "Verifying":
            self.uploaded = time.monotonic()
        super().report(**fields)


def main() -> None:
    """All of it."""
    job = json.loads(Path(sys.argv[1]).read_text())
    set_up({"FINETUNE_LOG_LEVEL": "WARNING"})
    clock = Clock()
    result = train(replace(context(Path(job["folder"]), Stage.TRAIN), reporter=clock))
    assert isinstance(result, TrainReport)
    found = {
        "step_ends": clock.ends,
        "step_cpu": clock.cpu,
        "ended": clock.uploaded,
        "held_out_loss": result.metrics.held_out_loss,
        "held_out_loss_base": result.metrics.held_out_loss_base,
    }
    sampled.tell(**found)


if __name__ == "__main__":
    main()
