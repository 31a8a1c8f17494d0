"""The data schedule: which rows an optimizer step sees. It knows neither devices nor micro-batches, so they cannot change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from finetune_api.spec import Length


@dataclass(frozen=True)
class Schedule:
    """Steps over a stream of rows: one seeded permutation of all rows per epoch, end to end.

    A step takes the next ``global_batch`` rows of the stream, across the border of two epochs if need be. The last step
    takes what is left, so that every row is seen as often as the length asks for, and none a time more.
    """

    rows: int
    global_batch: int
    seed: int
    total_rows: int
    """Length of the stream."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.total_rows / self.global_batch)

    def step_rows(self, step: int) -> list[int]:
        """Row ids of step ``step`` (from 0)."""
        start = step * self.global_batch
        stop = min(start + self.global_batch, self.total_rows)
        ids: list[int] = []
        while start < stop:
            epoch, offset = divmod(start, self.rows)
            part = self._permutation(epoch)[offset : offset + stop - start]
            ids += part.tolist()
            start += len(part)
        return ids

    def micro_batches(self, step: int, size: int, length: Callable[[int], int]) -> list[list[int]]:
        """The rows of a step, ``size`` at a time, the longest first: rows of like length waste little padding, and what does not fit
        shows at once. A step's gradient is a sum over its rows, so their order within it changes rounding only.

        Rows of chats (log-normal lengths), 32 a step in micro-batches of 4: 1.11 computed tokens per token instead of 1.57.
        """
        ids = sorted(
            self.step_rows(step), key=length, reverse=True
        )  # stable: equal lengths stay in the schedule's order
        return [ids[i : i + size] for i in range(0, len(ids), size)]

    def epoch_after(self, step: int) -> float:
        """Passes over the data that are complete once step ``step`` (from 0) is."""
        return min((step + 1) * self.global_batch, self.total_rows) / self.rows

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)


def make_schedule(rows: int, length: Length, global_batch: int, seed: int, steps: int | None = None) -> Schedule:
    """The schedule that ``length`` asks for.

    Args:
        steps: how many there must be, as announced by the prepare stage; a share of an epoch may be rounded either way.

    Raises:
        ValueError: there are no rows.
    """
    if rows < 1:
        raise ValueError("there are no rows to train on")
    if length.steps is not None:
        return Schedule(rows, global_batch, seed, length.steps * global_batch)
    assert length.epochs is not None  # Length has exactly one of the two
    total = max(1, round(length.epochs * rows))
    if steps is not None:
        total = min(max(total, (steps - 1) * global_batch + 1), steps * global_batch)
    return Schedule(rows, global_batch, seed, total)
