"""Our train stage as its container runs it: ``python -m bench.our_train JOB.json``. Prints what bench/training_speed.py wants to know.

The supervisor is this process, and starts the one that trains (with ``worker`` as a second argument), which prints. The folders are a pod's
as tests/support/train_container.py has them.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import sampled
from finetune_api.names import Stage
from finetune_trainer.context import StageContext
from finetune_trainer.entrypoint import WORKER, main
from finetune_trainer.reporter import Reporter
from finetune_trainer.supervisor import run as supervisor
from tests.support.train_container import context


class Clock(Reporter):
    """When each optimizer step was made, and the whole adapter uploaded; and the newest held-out loss."""

    def __init__(self) -> None:
        super().__init__(Stage.TRAIN, "bench")
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.uploaded = 0.0
        self.held_out_loss: object = None

    def report(self, **fields: object) -> None:
        """The stage tells of each step as soon as it is made."""
        if "loss" in fields:
            self.ends.append(time.monotonic())
            self.cpu.append(time.process_time())
        if fields.get("activity") == "Verifying":
            self.uploaded = time.monotonic()
        self.held_out_loss = fields.get("held_out_loss", self.held_out_loss)
        super().report(**fields)


def supervise(folder: Path) -> int:
    """What the image's entry point does."""
    command = [sys.executable, "-m", "bench.our_train", sys.argv[1], WORKER]
    return main(
        [Stage.TRAIN],
        termination_log=folder / "termination-log",
        context=partial(context, folder),
        stage_function=lambda _: partial(supervisor.run, command=command),
    )


def train(folder: Path) -> int:
    """What the supervisor's process does."""
    clock = Clock()

    def watched(stage: Stage) -> StageContext:
        return replace(context(folder, stage), reporter=clock)

    code = main([WORKER], context=watched)
    sampled.tell(step_ends=clock.ends, step_cpu=clock.cpu, ended=clock.uploaded, held_out_loss=clock.held_out_loss)
    return code


if __name__ == "__main__":
    place = Path(json.loads(Path(sys.argv[1]).read_text())["folder"])
    sys.exit(train(place) if sys.argv[2:] == [WORKER] else supervise(place))
