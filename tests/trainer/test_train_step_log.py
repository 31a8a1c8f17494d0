"""What counts as time of training, of which status.gpuTime tells the share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_api.spec import Length
from finetune_trainer.train import step_log
from finetune_trainer.train.schedule import make_schedule
from finetune_trainer.train.step_log import StepLog
from tests.trainer.test_train_trainer import rows_of

STEPS, STEP_SECONDS = 4, 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_log, "time", clock)
    return clock


def make_steps(log: StepLog, clock: Clock, first: int, last: int, evaluation: float = 0.0) -> None:
    """As Trainer does; an evaluation comes after each step but the last."""
    log.on_train_begin(None, None, None)
    for step in range(first, last + 1):
        clock.passes(STEP_SECONDS)
        log.on_log(None, SimpleNamespace(global_step=step), None, {"loss": 1.0, "learning_rate": 1e-4})
        clock.passes(evaluation if step < last else 0.0)
    log.on_train_end(None, None, None)


def test_steps_and_the_evaluations_between_them_are_training_and_nothing_before_or_after(
    tiny_model: Path, clock: Clock
) -> None:
    rows = rows_of(tiny_model, 8)
    schedule = make_schedule(len(rows), Length(steps=STEPS), 8, 0)
    log = StepLog(schedule, rows, lambda _: None)
    clock.passes(300)  # loading, and the base's held-out loss
    make_steps(log, clock, 1, 2, evaluation=5.0)
    clock.passes(700)  # saving
    assert log.seconds == 2 * STEP_SECONDS + 5.0
    assert [step["seconds"] for step in log.steps] == [10.0, 25.0]
    checkpoint = log.as_progress()

    resumed = StepLog(schedule, rows, lambda _: None)
    resumed.restore(checkpoint)
    clock.passes(400)  # the other execution's queue, and loading again
    make_steps(resumed, clock, 3, STEPS)
    clock.passes(700)
    assert resumed.seconds == STEPS * STEP_SECONDS + 5.0
    assert resumed.steps[2]["eta_seconds"] == STEP_SECONDS, "by the steps of this execution"
    assert resumed.tokens == STEPS * sum(rows.length(i) for i in range(8))
