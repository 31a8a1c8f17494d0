"""The periodic list and diff: whatever the watches lost, doubled or never told is made good here.

kopf does not report objects that were deleted while its watch was down (410), so without this they would live for ever.
Nor those that go after our first list and before kopf's own: at the start, lists follow each other more closely.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from finetune_api import COMBINATION_KIND, COMBINATION_PLURAL, KIND, PLURAL
from finetune_api.names import LABEL_UID
from finetune_api.status import ConditionType
from finetune_operator import metrics
from finetune_operator.cache import Cache, Key
from finetune_operator.client import Api, ApiError, Raw, jobs_path, own_path, pods_path
from finetune_operator.handlers import Informer
from finetune_operator.planning.conditions import is_true
from finetune_operator.reconciler import Reconciler

logger = logging.getLogger(__name__)
NOT_SERVED = (403, 404)
RESOURCES = {KIND: PLURAL, COMBINATION_KIND: COMBINATION_PLURAL}
RETRY_SECONDS = 2.0
EARLY_SECONDS, EARLY_FACTOR = 2.0, 3.0
"""Pauses between the first lists: 2, 6, 18, … s, up to the regular one."""


class Resync:
    """Lists all kinds and compares them with the cache."""

    def __init__(
        self,
        api: Api,
        cache: Cache,
        informer: Informer,
        reconciler: Reconciler,
        namespaces: tuple[str, ...],
        seconds: float,
    ) -> None:
        self._api = api
        self._cache = cache
        self._informer = informer
        self._reconciler = reconciler
        self._namespaces: tuple[str | None, ...] = namespaces or (None,)
        self._seconds = seconds
        self._first = True
        self._settled = True
        self._away = False
        self._again = asyncio.Event()
        self._found = 0
        self.silent = 0
        """How many lists in a row found changes while no watch told any."""
        self.last_success = time.monotonic()

    async def run(self) -> None:
        """For ever, the first time at once."""
        early = EARLY_SECONDS
        while True:
            if self._again.is_set():
                self._again.clear()
                early = EARLY_SECONDS
            self._settled = early >= self._seconds
            try:
                await self.once()
                delay = min(early, self._seconds)
                early = delay * EARLY_FACTOR
            except ApiError as problem:
                logger.warning("Listing failed: %s", problem)
                self._away = True
                delay = min(RETRY_SECONDS, self._seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), delay)

    def look_again(self) -> None:
        """The watches begin anew: lists follow each other closely once more."""
        self._again.set()

    async def once(self) -> None:
        """One full list of everything. Once settled, and when the API server is back, every unfinished job is looked at once
        more, changed or not: otherwise jobs would wait for as long as their back-off had grown while it was away."""
        heard = self._informer.last_event > self.last_success
        self._found = 0
        problem = ""
        for namespace in self._namespaces:
            await self._children(jobs_path(namespace), namespace, "jobs")
            await self._children(pods_path(namespace), namespace, "pods")
            await self._own(KIND, namespace)
            problem = await self._combinations(namespace) or problem
        self._informer.serve_combinations(problem)
        for key, cached in list(self._cache.jobs.items()) if self._settled or self._first or self._away else ():
            finished = is_true(cached.status, ConditionType.FINISHED)
            expires = cached.spec is not None and cached.spec.ttl_seconds_after_finished is not None
            # An operator that died right after it wrote "Failed" left a Job behind that must not run on.
            runs_on = any(not job.finished for job in self._cache.family(cached.uid).jobs.values())
            if not finished or expires or runs_on or cached.deleting:
                self._informer.enqueue(key)
        for key, combination in list(self._cache.combinations.items()):
            waits = not is_true(combination.status, ConditionType.FINISHED)
            if waits or (combination.spec is not None and combination.spec.ttl_seconds_after_finished is not None):
                self._informer.enqueue(key)
        self.silent = self.silent + 1 if self._found and not heard and self._counts else 0
        self._first = self._away = False
        self.last_success = time.monotonic()
        metrics.RESYNC_TIMESTAMP.set_to_current_time()

    async def _combinations(self, namespace: str | None) -> str:
        """Why there are none, where their CRD, or the right to list them, is missing: an operator may be newer than both."""
        try:
            await self._own(COMBINATION_KIND, namespace)
        except ApiError as problem:
            if problem.status not in NOT_SERVED:
                raise
            return f"{problem.status} {problem.message or problem.reason}"
        return ""

    async def _own(self, kind: str, namespace: str | None) -> None:
        items, version = await self._api.list_all(own_path(kind, namespace))
        plural = RESOURCES[kind]
        seen = set()
        for raw in items:
            seen.add(raw["metadata"]["uid"])
            key = self._cache.put(kind, raw)
            if key is not None:
                self._missed(plural)
                self._informer.enqueue(key)
        for key, uid, known in self._known(kind):
            here = namespace is None or key.namespace == namespace
            # What is newer than the list cannot have been deleted before it.
            if here and uid not in seen and known <= version:
                self._cache.drop(key, uid)
                self._reconciler.forget(uid)
                self._missed(plural)

    def _known(self, kind: str) -> list[tuple[Key, str, int]]:
        if kind == KIND:
            return [(key, cached.uid, cached.resource_version) for key, cached in self._cache.jobs.items()]
        return [(key, cached.uid, cached.resource_version) for key, cached in self._cache.combinations.items()]

    async def _children(self, path: str, namespace: str | None, kind: str) -> None:
        items, version = await self._api.list_all(path, LABEL_UID)
        put: Callable[[Raw], str | None] = self._cache.put_job if kind == "jobs" else self._cache.put_pod
        seen = set()
        for raw in items:
            seen.add(raw["metadata"]["uid"])
            uid = put(raw)
            if uid is not None:
                self._missed(kind)
                self._enqueue_owner(uid)
        for key in self._cache.drop_children(kind, seen, version, namespace):
            self._missed(kind)
            self._informer.enqueue(key)

    def _enqueue_owner(self, uid: str) -> None:
        key = self._cache.key_of(uid)
        if key is not None:
            self._informer.enqueue(key)

    @property
    def _counts(self) -> bool:
        """While the watches are opened, what only a list finds says nothing about them."""
        return self._settled and not self._first

    def _missed(self, kind: str) -> None:
        self._found += 1
        if self._counts:
            metrics.WATCH_MISSED.labels(resource=kind).inc()
