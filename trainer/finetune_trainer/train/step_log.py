"""The numbers of each optimizer step, also of those that an earlier execution made."""
# ruff: noqa: ARG002 - signatures are transformers'

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from transformers import TrainerCallback

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.train.rows import Rows
from finetune_trainer.train.schedule import Schedule

WINDOW = 20
"""Steps whose median loss is compared."""


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Calls ``on_step`` with the numbers of each optimizer step and keeps them."""

    def __init__(
        self,
        schedule: Schedule,
        rows: Rows,
        on_step: Callable[[dict[str, float]], None],
        stop_on_divergence: bool = False,
    ) -> None:
        self._schedule = schedule
        self._rows = rows
        self._on_step = on_step
        self._stop_on_divergence = stop_on_divergence
        self._started: float | None = None
        self._seconds_before = 0.0
        self._first_step = 0
        self.steps: list[dict[str, float]] = []
        self.tokens = 0
        """Tokens trained on, prompts included, padding not. Steps that were computed twice count once."""

    @property
    def seconds(self) -> float:
        """Time in which steps were made, earlier executions' included as far as their steps count."""
        running = time.monotonic() - self._started if self._started is not None else 0.0
        return self._seconds_before + running

    def as_progress(self) -> dict[str, Any]:
        """For a checkpoint, which is written while further steps are made."""
        return {"steps": list(self.steps), "tokens": self.tokens, "seconds": self.seconds}

    def restore(self, progress: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.steps = list(progress["steps"])
        self.tokens = int(progress["tokens"])
        self._seconds_before = float(progress["seconds"])
        self._first_step = len(self.steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self._seconds_before, self._started = self.seconds, None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Trainer logs once a step, and once more, without a loss, at the end.

        Raises:
            StageError: Diverged.
        """
        if "loss" not in logs:
            return
        step = state.global_step
        self.tokens += sum(self._rows.length(i) for i in self._schedule.step_rows(step - 1))
        seconds = self.seconds
        here = seconds - (self.steps[self._first_step - 1]["seconds"] if self._first_step else 0.0)
        entry = {
            "step": step,
            "total_steps": self._schedule.steps,
            "epoch": round(self._schedule.epoch_after(step - 1), 4),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs.get("grad_norm", math.nan)),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / seconds, 1),
            "seconds": round(seconds, 3),
            "eta_seconds": round(here / (step - self._first_step) * (self._schedule.steps - step), 1),
        }
        self.steps.append(entry)
        self._on_step(entry)
        if self._stop_on_divergence:
            refuse_divergence([s["loss"] for s in self.steps])


def refuse_divergence(losses: list[float]) -> None:
    """Whether training has gone wrong for good: the median loss of the last 20 steps is both twice that of the first 20 and more than
    1 above it. Noise and a bad batch do not do that; a learning rate that is too high does, and no adapter comes of it.

    Raises:
        StageError: Diverged.
    """
    if len(losses) < 2 * WINDOW:
        return
    first, last = median(losses[:WINDOW]), median(losses[-WINDOW:])
    if last > max(2 * first, first + 1):
        raise StageError(
            Reason.DIVERGED,
            f"the training loss was {first:.3f} at the beginning and is {last:.3f} now (medians of {WINDOW} steps), at step {len(losses)}.",
        )
