"""Batches assessed in order: by this process at first, and by several where there is much to assess."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import TYPE_CHECKING

from finetune_api.failures import Reason
from finetune_trainer.cpus import memory_limit, usable_cpus
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.assess import Assessed, Assessor, Batch, Recipe

if TYPE_CHECKING:
    # What its module imports would take the start of the worker processes half a CPU second.
    from finetune_trainer.prepare.model import BaseModel

BATCH_ROWS = 64
IMPORT_ROWS = 512
"""So many are assessed before the other processes' imports begin, which take seconds and 200 MB, shared by all of them."""
ALONE_ROWS = 2048
"""So many are assessed before those processes start, and each loads the tokenizer. By then the imports are done."""
PRELOADED = ["finetune_trainer.prepare.workers"]
MOST_WORKERS = 4
WORKER_BYTES = 1 << 30
"""Memory that a container has for each of them, at least: 200 MB, and the longest rows."""
AHEAD = 3
"""Batches per process that are read before the first of them is done: what bounds memory."""


class Assessors:
    """Assessors of one job, this process's and the others'. Whoever assesses, the outcomes are the same and in the same order."""

    def __init__(self, recipe: Recipe, model: BaseModel, workers: int | None = None) -> None:
        """``workers``: how many processes beside this one, which reads and writes; the default is one per CPU, at most 4."""
        self._recipe = recipe
        self._own = recipe.assessor(model)
        self._workers = most_workers(usable_cpus(), memory_limit()) if workers is None else workers
        self._alone = 0
        self._pool: ProcessPoolExecutor | None = None

    def assessed(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Assessed]]:
        """Each batch with its outcomes.

        Raises:
            StageError: what the assessor raises; HostOutOfMemory, if a process was killed.
        """
        waiting: deque[tuple[Batch, Future[Assessed]]] = deque()
        for batch in batches:
            if self._workers < 2 or self._alone < ALONE_ROWS:
                if self._workers >= 2 and self._alone >= IMPORT_ROWS:
                    _server_started()
                self._alone += len(batch.rows)
                yield batch, self._own.assess(batch)
                continue
            try:
                waiting.append((batch, self._started().submit(_assess, batch)))
            except BrokenProcessPool as error:
                raise _killed() from error
            if len(waiting) >= AHEAD * self._workers:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._workers, _server_started(), _set_up, (self._recipe,))
        return self._pool

    def __enter__(self) -> Assessors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # Nobody waits for what they are at. And where one was killed while another was started, Python (3.11) would wait for that one
            # for ever, also at its own end.
            for process in multiprocessing.active_children():
                process.kill()
        self._pool.shutdown(cancel_futures=True)


def _server_started() -> BaseContext:
    """How processes are started: by a server that has imported once what all of them need. It has no threads; forking this process would copy
    locks that threads of it (transfers, progress) may hold."""
    # numpy would start a thread per CPU of the node in each of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return context


def _first(waiting: deque[tuple[Batch, Future[Assessed]]]) -> tuple[Batch, Assessed]:
    batch, future = waiting.popleft()
    try:
        return batch, future.result()
    except BrokenProcessPool as error:
        raise _killed() from error


def _killed() -> StageError:
    return StageError(
        Reason.HOST_OUT_OF_MEMORY, "a process that checks rows was killed, most likely for want of memory"
    )


def most_workers(cpus: int, memory: int | None) -> int:
    """How many processes a container of so many CPUs and bytes of memory (None: no limit) may have beside its first."""
    return min(cpus, MOST_WORKERS, *([memory // WORKER_BYTES] if memory is not None else []))


_recipe: Recipe | None = None
_own: Assessor | None = None
"""Of a worker process."""


def _set_up(recipe: Recipe) -> None:
    """What fails here would only be told of as a process that ended: the assessor is made with the first batch."""
    global _recipe
    _recipe = recipe
    # Python's default looks for cycles after every 700 new objects, a tenth of the time here, and a batch makes hardly any cycle.
    gc.set_threshold(100_000)


def _assess(batch: Batch) -> Assessed:
    global _own
    assert _recipe is not None  # set up before the first batch
    _own = _own or _recipe.assessor()
    return _own.assess(batch)
