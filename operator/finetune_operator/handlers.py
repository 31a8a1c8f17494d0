"""kopf as the informer: every event only updates the cache and enqueues a key.

kopf's handlers never retry and see stale objects, so nothing may be decided here (facts/kopf.md).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import Any

import kopf

from finetune_api import COMBINATION_KIND, COMBINATION_PLURAL, GROUP, KIND, PLURAL, VERSION
from finetune_api.names import LABEL_UID
from finetune_operator.cache import Cache, Key
from finetune_operator.observe import Raw
from finetune_operator.reconciler import Reconciler
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)
WATCH_RETRY_SECONDS = 1.0


class _NoDiffBase(kopf.DiffBaseStorage):
    """Nothing is diffed: kopf's copy of every event's object would be half of its cost."""

    def fetch(self, *, body: Any) -> None:
        """There is never a base."""

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        """Nothing is stored."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:  # noqa: ARG002 - kopf passes them by name
        """No essence, so no copy."""
        return {}


class _NoProgress(kopf.ProgressStorage):
    """on.event handlers have no progress, and nothing of ours is annotated."""

    def fetch(self, *, key: Any, body: Any) -> None:
        """There is never any."""

    def store(self, *, key: Any, record: Any, body: Any, patch: Any) -> None:
        """Nothing is stored."""

    def purge(self, *, key: Any, body: Any, patch: Any) -> None:
        """Nothing is there."""

    def touch(self, *, body: Any, patch: Any, value: Any) -> None:
        """Nothing is touched."""

    def clear(self, *, essence: Any) -> Any:
        """Nothing to remove."""
        return essence


class Informer:
    """The handlers, and when they were last called."""

    def __init__(self, cache: Cache, queue: WorkQueue[Key], reconciler: Reconciler) -> None:
        self._cache = cache
        self._queue = queue
        self._reconciler = reconciler
        self.combinations_served: bool | None = None
        """Whether the API server has AdapterCombinations; unknown before the first list."""
        self.kinds_changed = asyncio.Event()
        """What is watched is no longer what is served: the watches are to begin anew."""
        self.last_event = time.monotonic()

    def own(self, kind: str, event: Raw) -> None:
        """A FineTuneJob, or an AdapterCombination, appeared, changed or went."""
        raw = event["object"]
        meta = raw["metadata"]
        self.last_event = time.monotonic()
        if event["type"] == "DELETED":
            if self._cache.drop(Key(meta["namespace"], meta["name"], kind), meta["uid"]):
                self._reconciler.forget(meta["uid"])
        elif (key := self._cache.put(kind, raw)) is not None:
            self.enqueue(key)

    def serve_combinations(self, problem: str) -> None:
        """Told after each list of AdapterCombinations; ``problem`` says why there was none."""
        served = not problem
        if served == self.combinations_served:
            return
        if problem:
            logger.warning(
                "AdapterCombinations are not served (%s): FineTuneJobs are, and these once they can be.", problem
            )
        elif self.combinations_served is not None:
            logger.info("AdapterCombinations are served from now on.")
        self.combinations_served = served
        self.kinds_changed.set()

    def job(self, event: Raw) -> None:
        """A Job of ours."""
        gone = event["type"] == "DELETED"
        self._child(self._cache.drop_job(event["object"]) if gone else self._cache.put_job(event["object"]))

    def pod(self, event: Raw) -> None:
        """A pod of ours."""
        gone = event["type"] == "DELETED"
        self._child(self._cache.drop_pod(event["object"]) if gone else self._cache.put_pod(event["object"]))

    def _child(self, uid: str | None) -> None:
        self.last_event = time.monotonic()
        key = self._cache.key_of(uid) if uid else None
        if key is not None:
            self.enqueue(key)

    def enqueue(self, key: Key) -> None:
        """A job that has nothing yet goes before those that only need their status polished."""
        if key in self._cache.combinations:
            self._queue.add(key)
            return
        cached = self._cache.jobs.get(key)
        if cached is None:
            return
        fresh = cached.status.phase is None and cached.uid not in self._cache.families
        self._queue.add(key, urgent=fresh)


def make_registry(informer: Informer) -> kopf.OperatorRegistry:
    """kopf's registry with our handlers and nothing else."""
    registry = kopf.OperatorRegistry()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def on_finetunejob(event: Any, **_: Any) -> None:
        informer.own(KIND, event)

    if informer.combinations_served:

        @kopf.on.event(GROUP, VERSION, COMBINATION_PLURAL, registry=registry)
        async def on_combination(event: Any, **_: Any) -> None:
            informer.own(COMBINATION_KIND, event)

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def on_job(event: Any, **_: Any) -> None:
        informer.job(event)

    @kopf.on.event("", "v1", "pods", registry=registry)
    async def on_pod(event: Any, **_: Any) -> None:
        informer.pod(event)

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> Any:
        return kopf.login_via_client(**kwargs)

    return registry


def make_settings(request_timeout: float) -> kopf.OperatorSettings:
    """kopf without what we do ourselves: no Events, no finalizers, no annotations, no scanning of CRDs."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.persistence.progress_storage = _NoProgress()
    settings.networking.request_timeout = request_timeout
    settings.networking.connect_timeout = request_timeout
    # kopf's own pauses grow to 21 s and end after 54 s: so much later it would hear of an API server that is back, or, when that
    # answered 503 meanwhile, it would end.
    settings.networking.error_backoffs = itertools.repeat(WATCH_RETRY_SECONDS)
    settings.watching.label_selectors["batch", "v1", "jobs"] = LABEL_UID
    settings.watching.label_selectors["", "v1", "pods"] = LABEL_UID
    settings.watching.chunk_size = 500
    settings.watching.server_timeout = 600
    # Else kopf has the whole process killed so long after it failed, begun anew or not.
    settings.process.ultimate_exiting_timeout = None
    settings.queueing.exit_timeout = 0.5
    settings.queueing.idle_timeout = 1.0
    return settings
