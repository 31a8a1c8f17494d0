"""A few files at a time, that stop soon when one of them fails or the container is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 4


class Stopped(Exception):
    """Raised in workers whose result nobody waits for any more."""


def in_parallel(work: Callable[[T, Callable[[], None]], R], items: list[T]) -> list[R]:
    """``work(item, check)`` for every item, results in their order. Work calls ``check`` every few megabytes; it raises Stopped.

    Without it, SIGTERM during the upload of a merged 70B would wait for four files to end, until the grace period is over and the
    kubelet's SIGKILL takes the report along. After a failure, workers are waited for, so that no retry writes beside them;
    on SIGTERM they are not, because the report comes first.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="files")
    futures = [pool.submit(work, item, check) for item in items]
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BaseException as error:
        stop.set()
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    pool.shutdown()
    return [future.result() for future in futures]
