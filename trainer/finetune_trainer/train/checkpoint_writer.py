"""Writes checkpoints while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from finetune_api.failures import GPU_PATIENCE_SECONDS, Consequence, Reason
from finetune_trainer import heartbeat
from finetune_trainer.errors import StageError, full_disk
from finetune_trainer.parallel import Stopped
from finetune_trainer.train.capture import Captured
from finetune_trainer.train.checkpoints import Checkpoints, Saved

log = logging.getLogger(__name__)
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 30.0
"""Between tries, while the store cannot be reached: training goes on meanwhile."""


class CheckpointWriter:
    """One thread, one checkpoint at a time. One that waits gives way to a newer, unless it is the best so far.

    Whatever goes wrong is tried again until a newer checkpoint takes the place, and training goes on; only at its end
    (:meth:`finish`) is there nothing to do but to wait, and that is bounded. An execution that was superseded must not go on:
    :attr:`failure`, which the step loop looks at.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        on_saved: Callable[[Saved], None],
        on_problem: Callable[[StageError], None],
        patience_seconds: float = GPU_PATIENCE_SECONDS,
    ) -> None:
        """``on_problem`` is called when a checkpoint cannot be stored, once for each reason until one can."""
        self._checkpoints = checkpoints
        self._on_saved = on_saved
        self._on_problem = on_problem
        self._patience = patience_seconds
        self._changed = threading.Condition()
        self._waiting: list[Captured] = []
        self._busy = False
        self._closed = False
        self._best: float | None = None
        self._failing_since = 0.0
        self.failure: StageError | None = None
        """Superseded: this execution must not go on."""
        self.problem: StageError | None = None
        """Why the newest try failed; training goes on."""
        self.saved: Saved | None = None
        self.submitted = 0
        """The newest step that is written, or still to be."""
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, captured: Captured) -> None:
        """Have it written. Returns at once."""
        with self._changed:
            self._waiting = [c for c in self._waiting if self._is_best(c)]
            if captured.held_out_loss is not None and (self._best is None or captured.held_out_loss < self._best):
                self._best = captured.held_out_loss
            self._waiting.append(captured)
            self.submitted = captured.step
            self._changed.notify_all()

    def finish(self, seconds: float | None = None) -> Saved | None:
        """Wait until everything is written, at most so long; the newest that is. Bytes that move and tries that fail are signs of life.

        Raises:
            StageError: Superseded; what has kept checkpoints from being stored for as long as a GPU may be held for it.
        """
        end = time.monotonic() + seconds if seconds is not None else None
        with self._changed:
            while self._waiting or self._busy:
                heartbeat.beat()
                if self.failure is not None:
                    raise self.failure
                if self.problem is not None and self._hopeless(self.problem):
                    raise self.problem
                left = end - time.monotonic() if end is not None else None
                if left is not None and left <= 0:
                    log.warning(
                        "the checkpoint of step %d is not written after %.0f s", self._newest_step(), seconds or 0
                    )
                    break
                self._changed.wait(left)
            if self.failure is not None:
                raise self.failure
            return self.saved

    def close(self) -> None:
        """Write nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _hopeless(self, problem: StageError) -> bool:
        """Whether nobody will mend it, or nobody has for too long."""
        for_good = problem.consequence is Consequence.FAIL and problem.patience_seconds is None
        return for_good or time.monotonic() - self._failing_since >= self._patience

    def _is_best(self, captured: Captured) -> bool:
        return captured.held_out_loss is not None and captured.held_out_loss == self._best

    def _newest_step(self) -> int:
        return max((c.step for c in self._waiting), default=0)

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                captured = self._waiting[0]
                self._busy = True
            try:
                saved = self._checkpoints.save(captured, self._moved)
            except Exception as error:  # noqa: BLE001 - a thread that dies leaves a run that is never checkpointed again
                failures += 1
                self._failed(as_stage_error(error), captured, failures)
                continue
            failures = 0
            with self._changed:
                self.saved, self.problem, self._busy = saved, None, False
                self._waiting = [c for c in self._waiting if c is not captured]
                self._changed.notify_all()
            self._on_saved(saved)

    def _moved(self, _count: int) -> None:
        with self._changed:
            if self._closed:
                raise Stopped  # the interpreter would wait for the end of the upload
            self._changed.notify_all()

    def _failed(self, error: StageError, captured: Captured, failures: int) -> None:
        log.warning("the checkpoint of step %d could not be stored (training goes on): %s", captured.step, error)
        news = self.problem is None or self.problem.reason is not error.reason
        with self._changed:
            if error.reason is Reason.SUPERSEDED:
                self.failure, self._closed, self._busy = error, True, False
                self._changed.notify_all()
                return
            if self.problem is None:
                self._failing_since = time.monotonic()
            self.problem = error
            self._changed.notify_all()
        if news:
            self._on_problem(error)
        pause = min(PAUSE_SECONDS * 2 ** (failures - 1), LONGEST_PAUSE_SECONDS)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or captured not in self._waiting, pause)
            self._busy = False


def as_stage_error(error: Exception) -> StageError:
    """Anything that saving may raise, with a reason."""
    if isinstance(error, StageError):
        return error
    no_room = full_disk(error)
    if no_room is not None:
        return StageError(Reason.DISK_FULL, no_room)
    return StageError(Reason.UNKNOWN, f"{type(error).__name__}: {error}")
