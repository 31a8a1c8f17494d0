"""Writes checkpoints while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from finetune_api.failures import Reason
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.train.capture import Captured
from finetune_trainer.train.checkpoints import Checkpoints, Saved

log = logging.getLogger(__name__)
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 30.0
"""Between tries, while the store cannot be reached: training goes on meanwhile."""


class CheckpointWriter:
    """One thread, one checkpoint at a time. One that waits gives way to a newer, unless it is the best so far.

    A store that cannot be reached is tried again until a newer checkpoint takes the place; an error that is for good is kept for
    :meth:`finish` and :attr:`failure`, which the step loop looks at.
    """

    def __init__(self, checkpoints: Checkpoints, on_saved: Callable[[Saved], None]) -> None:
        self._checkpoints = checkpoints
        self._on_saved = on_saved
        self._changed = threading.Condition()
        self._waiting: list[Captured] = []
        self._busy = False
        self._closed = False
        self._best: float | None = None
        self.failure: StageError | None = None
        """Superseded: this execution must not go on."""
        self.problem: StageError | OSError | None = None
        """Why the newest try failed; training goes on."""
        self.saved: Saved | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, captured: Captured) -> None:
        """Have it written. Returns at once."""
        with self._changed:
            self._waiting = [c for c in self._waiting if self._is_best(c)]
            if captured.held_out_loss is not None and (self._best is None or captured.held_out_loss < self._best):
                self._best = captured.held_out_loss
            self._waiting.append(captured)
            self._changed.notify_all()

    def finish(self, seconds: float | None = None) -> Saved | None:
        """Wait until everything is written, at most so long; the newest that is.

        Raises:
            StageError: Superseded.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self.failure is not None or not (self._waiting or self._busy), seconds
            )
            if self.failure is not None:
                raise self.failure
            if not done:
                log.warning("the checkpoint of step %d is not written after %.0f s", self._newest_step(), seconds or 0)
            return self.saved

    def close(self) -> None:
        """Write nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

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
                saved = self._checkpoints.save(captured)
            except (StageError, NotFound, OSError) as error:
                failures += 1
                self._failed(error, captured, failures)
                continue
            failures = 0
            with self._changed:
                self.saved, self.problem, self._busy = saved, None, False
                self._waiting = [c for c in self._waiting if c is not captured]
                self._changed.notify_all()
            self._on_saved(saved)

    def _failed(self, error: StageError | NotFound | OSError, captured: Captured, failures: int) -> None:
        log.warning("the checkpoint of step %d could not be stored (training goes on): %s", captured.step, error)
        with self._changed:
            self._busy = False
            if isinstance(error, StageError) and error.reason is Reason.SUPERSEDED:
                self.failure, self._closed = error, True
                self._changed.notify_all()
                return
            self.problem = error if isinstance(error, StageError | OSError) else StageError(Reason.UNKNOWN, str(error))
            pause = min(PAUSE_SECONDS * 2 ** (failures - 1), LONGEST_PAUSE_SECONDS)
            end = time.monotonic() + pause
            self._busy = True  # it is still to be written
            self._changed.wait_for(lambda: self._closed or captured not in self._waiting, end - time.monotonic())
            self._busy = False
