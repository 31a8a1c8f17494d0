"""The one work queue: deduplicated keys in two lanes, delayed requeues and a per-key exponential back-off.

The urgent lane holds jobs that have no Job yet, so that in a burst every job starts before any status is polished. The
other lane is not starved: once a key has waited in it for long, every fourth is taken from there.
A key is never handed to two workers at once.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BASE_DELAY_SECONDS = 0.2
MAX_DELAY_SECONDS = 60.0
PATIENCE_SECONDS = 10.0
"""How long the other lane may stand still in a burst. At 2 s, polishing statuses halved the rate at which 1,000 jobs start."""


class WorkQueue(Generic[K]):
    """Use from one event loop only."""

    def __init__(self) -> None:
        self._urgent: OrderedDict[K, float] = OrderedDict()
        self._normal: OrderedDict[K, float] = OrderedDict()
        self._active: dict[K, float] = {}
        self._again: dict[K, bool] = {}
        self._delayed: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._ready = asyncio.Semaphore(0)
        # One permit per queued key.
        self._count = itertools.count()
        self._wakeup = asyncio.Event()
        self._taken = 0
        self.last_progress = time.monotonic()

    def __len__(self) -> int:
        return len(self._urgent) + len(self._normal)

    @property
    def urgent(self) -> int:
        """Keys in the urgent lane."""
        return len(self._urgent)

    @property
    def active(self) -> int:
        """Keys being worked on."""
        return len(self._active)

    def stalled_seconds(self) -> float:
        """For how long there has been work and none was finished."""
        if not self._urgent and not self._normal and not self._active:
            return 0.0
        return time.monotonic() - self.last_progress

    def add(self, key: K, urgent: bool = False) -> None:
        """Enqueue a key; one that is being worked on is worked on once more afterwards."""
        if key in self._active:
            self._again[key] = self._again.get(key, False) or urgent
            return
        if key in self._urgent:
            return
        if not self._urgent and not self._normal and not self._active:
            self.last_progress = time.monotonic()
        known = key in self._normal
        if urgent:
            self._urgent[key] = self._normal.pop(key, time.monotonic())
        elif not known:
            self._normal[key] = time.monotonic()
        if not known:
            self._ready.release()

    def add_after(self, key: K, seconds: float) -> None:
        """Enqueue a key later; of several times the earliest counts."""
        due = time.monotonic() + seconds
        if due >= self._due.get(key, float("inf")):
            return
        self._due[key] = due
        heapq.heappush(self._delayed, (due, next(self._count), key))
        self._wakeup.set()

    def retry(self, key: K) -> float:
        """Enqueue a key after its back-off; the delay."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = float(min(BASE_DELAY_SECONDS * 2**failures, MAX_DELAY_SECONDS))
        self.add_after(key, delay)
        return delay

    def forget(self, key: K) -> None:
        """The key was worked on without error: its back-off starts anew."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key, now owned by the caller until :meth:`done`."""
        await self._ready.acquire()
        key = self._pick()
        self._active[key] = time.monotonic()
        return key

    def _pick(self) -> K:
        self._taken += 1
        if self._urgent and self._normal:
            oldest = next(iter(self._normal.values()))
            overdue = time.monotonic() - oldest > PATIENCE_SECONDS and self._taken % 4 == 0
            lane = self._normal if overdue else self._urgent
        else:
            lane = self._urgent or self._normal
        key, _ = lane.popitem(last=False)
        return key

    def done(self, key: K) -> None:
        """The caller is finished with a key."""
        self._active.pop(key, None)
        self.last_progress = time.monotonic()
        if key in self._again:
            self.add(key, self._again.pop(key))

    async def run_delays(self) -> None:
        """Move delayed keys into the queue when their time comes. Runs for ever."""
        while True:
            self._wakeup.clear()
            now = time.monotonic()
            while self._delayed and self._delayed[0][0] <= now:
                due, _, key = heapq.heappop(self._delayed)
                if self._due.get(key) == due:
                    del self._due[key]
                    self.add(key)
            timeout = self._delayed[0][0] - now if self._delayed else None
            try:
                await asyncio.wait_for(self._wakeup.wait(), timeout)
            except TimeoutError:
                continue
