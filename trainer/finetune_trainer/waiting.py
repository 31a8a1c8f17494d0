"""Waiting for what somebody can mend: a missing Secret, an unreachable store or hub."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential_jitter

from finetune_api.failures import FAILURES
from finetune_trainer.context import PodContext
from finetune_trainer.errors import StageError, waits

log = logging.getLogger(__name__)
T = TypeVar("T")


def pause(seconds: float) -> None:
    """Between two tries; tests replace it."""
    time.sleep(seconds)


def wait_until_available(
    ctx: PodContext,
    fn: Callable[[], T],
    *,
    limit_seconds: float | None = None,
) -> T:
    """The result of ``fn``, called again for as long as it fails with a reason that waits.

    The wait is reported, so that the job's Waiting condition names what is missing. Without ``limit_seconds`` it is endless:
    the operator enforces pendingTimeoutSeconds. A stage that holds a GPU passes a limit, after which the last error is raised.
    The limit is for the time without progress: hours of a download that gets on do not count (see :class:`Patience`).
    """
    ctx.reporter.measure_anew()
    patience = Patience(limit_seconds, lambda: ctx.reporter.advanced)

    def spent(state: RetryCallState) -> bool:
        return patience.spent(time.monotonic(), _failure(state).patience_seconds)

    def report(state: RetryCallState) -> None:
        error = _failure(state)
        log.warning("waiting (%s): %s %s", error.reason, error.message, FAILURES[error.reason].advice)
        ctx.reporter.set_waiting(error.reason, error.message)

    retrying = Retrying(
        retry=retry_if_exception(waits),
        wait=wait_exponential_jitter(initial=1, max=10, jitter=1),
        stop=spent,
        before_sleep=report,
        sleep=lambda seconds: pause(seconds),
        reraise=True,
    )
    result = retrying(fn)
    ctx.reporter.clear_waiting()
    return result


class Patience:
    """How long failures have gone on without any advance between them. ``advanced`` says when the last one was."""

    def __init__(self, limit_seconds: float | None, advanced: Callable[[], float]) -> None:
        self._limit = limit_seconds
        self._advanced = advanced
        self._since: float | None = None
        self._own_since: float | None = None

    def spent(self, now: float, own_seconds: float | None) -> bool:
        """Called after each failure; ``own_seconds`` is how long that failure in itself is worth waiting for, if it says so."""
        if self._since is None or self._advanced() > self._since:
            self._since, self._own_since = now, None
        if own_seconds is None:
            self._own_since = None
            return self._limit is not None and now - self._since >= self._limit
        if self._own_since is None:
            self._own_since = now
        over = now - self._own_since >= own_seconds
        return over or (self._limit is not None and now - self._since >= self._limit)


def _failure(state: RetryCallState) -> StageError:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, StageError)
    return error
