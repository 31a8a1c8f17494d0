"""Batches judged in order: by this process at first, and by several where there is much to judge."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from finetune_api.failures import Reason
from finetune_trainer.cpus import usable_cpus
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.judge import Batch, Judge, Judged, Recipe
from finetune_trainer.prepare.model import BaseModel

BATCH_ROWS = 64
ALONE_ROWS = 2048
"""So many are judged before other processes start: each takes two seconds and 200 MB."""
MOST_WORKERS = 4
AHEAD = 3
"""Batches per process that are read before the first of them is done: what bounds memory."""


class Judges:
    """Judges of one job, this process's and the others'. Whoever judges, the outcomes are the same and in the same order."""

    def __init__(self, recipe: Recipe, model: BaseModel, workers: int | None = None) -> None:
        """``workers``: how many processes beside this one, which reads and writes; the default is one per CPU, at most 4."""
        self._recipe = recipe
        self._own = recipe.judge(model)
        self._workers = min(usable_cpus(), MOST_WORKERS) if workers is None else workers
        self._alone = 0
        self._pool: ProcessPoolExecutor | None = None

    def judged(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Judged]]:
        """Each batch with its outcomes.

        Raises:
            StageError: what the judge raises; HostOutOfMemory, if a process was killed.
        """
        waiting: deque[tuple[Batch, Future[Judged]]] = deque()
        for batch in batches:
            if self._workers < 2 or self._alone < ALONE_ROWS:
                self._alone += len(batch.rows)
                yield batch, self._own.judge(batch)
                continue
            waiting.append((batch, self._started().submit(_judge, batch)))
            if len(waiting) >= AHEAD * self._workers:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Forking would copy locks that threads of this process (transfers, progress) may hold.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _set_up, (self._recipe,))
        return self._pool

    def __enter__(self) -> Judges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _first(waiting: deque[tuple[Batch, Future[Judged]]]) -> tuple[Batch, Judged]:
    batch, future = waiting.popleft()
    try:
        return batch, future.result()
    except BrokenProcessPool as error:
        raise StageError(
            Reason.HOST_OUT_OF_MEMORY, "a process that checks rows was killed, most likely for want of memory"
        ) from error


_own: Judge | None = None
"""Of a worker process."""


def _set_up(recipe: Recipe) -> None:
    global _own
    _own = recipe.judge()


def _judge(batch: Batch) -> Judged:
    assert _own is not None  # set up before the first batch
    return _own.judge(batch)
