"""One reconcile: look, plan, carry out. Everything else in this package exists to call it at the right time."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from finetune_api import KIND
from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_operator import metrics
from finetune_operator.apply import Applier
from finetune_operator.cache import Cache, Key
from finetune_operator.client import ApiError
from finetune_operator.combinations.reconciler import CombinationReconciler
from finetune_operator.events import EventRecorder, JobEvents
from finetune_operator.free_gpus import FreeGpus
from finetune_operator.fresh_pods import FreshPods
from finetune_operator.observe import CachedJob
from finetune_operator.pace import Pace
from finetune_operator.planning import Observation, Plan, PlannerConfig, plan
from finetune_operator.planning.clock import parse_time
from finetune_operator.planning.conditions import find, is_true
from finetune_operator.planning.model import EventType, Urgency
from finetune_operator.planning.nodetime import in_server_time
from finetune_operator.planning.outcome import untold_end
from finetune_operator.planning.stock import stock_wanted
from finetune_operator.planning.waiting import podless
from finetune_operator.snapshots import Conflict, Snapshots
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)
SETTLE_SECONDS = 2.0
"""A phase that changes again within this time costs one write."""


class Reconciler:
    """Turns what the cache knows about a job into writes."""

    def __init__(
        self,
        cache: Cache,
        queue: WorkQueue[Key],
        applier: Applier,
        snapshots: Snapshots,
        events: EventRecorder,
        job_events: JobEvents,
        fresh_pods: FreshPods,
        free_gpus: FreeGpus,
        pace: Pace,
        combinations: CombinationReconciler,
        config: PlannerConfig | None = None,
    ) -> None:
        self._cache = cache
        self._queue = queue
        self._applier = applier
        self._snapshots = snapshots
        self._events = events
        self._job_events = job_events
        self._fresh_pods = fresh_pods
        self._free_gpus = free_gpus
        self._pace = pace
        self._combinations = combinations
        self._config = config or PlannerConfig()
        self._dirty: dict[str, float] = {}

    def forget(self, uid: str) -> None:
        """A FineTuneJob or an AdapterCombination is gone."""
        self._applier.forget(uid)
        self._snapshots.forget(uid)
        self._fresh_pods.forget(uid)
        self._pace.forget(uid)
        self._dirty.pop(uid, None)

    async def work(self) -> None:
        """Reconcile keys for ever; an error is logged and repeated with back-off."""
        while True:
            key = await self._queue.get()
            started = time.perf_counter()
            try:
                await self.reconcile(key)
                self._queue.forget(key)
            except ApiError as problem:
                metrics.RECONCILE_ERRORS.inc()
                delay = self._queue.retry(key)
                logger.warning("%s: %s; again in %.1f s", key, problem, delay)
                await self._refresh_after(key, problem)
            except asyncio.CancelledError:
                raise
            except Exception:  # an error of ours over one job: the worker must go on with the others
                metrics.RECONCILE_ERRORS.inc()
                logger.exception("%s: reconcile failed; again in %.1f s", key, self._queue.retry(key))
            finally:
                self._queue.done(key)
                metrics.RECONCILE_SECONDS.observe(time.perf_counter() - started)

    async def reconcile(self, key: Key) -> None:
        """Bring one job one step further."""
        if key.kind != KIND:
            await self._combinations.reconcile(key)
            return
        cached = self._cache.jobs.get(key)
        if cached is None:
            return
        decided = plan(await self._look(cached), self._config)
        if decided.hold_output is not None or decided.create_cleanup:
            await self._hold(key, cached, decided)
            return
        if decided.create_snapshot or decided.create_job:
            created = await self._applier.create(
                cached.view(), decided.create_snapshot, decided.create_job, decided.allotment
            )
            if created and self._queue.urgent:
                # A burst: other jobs have no Job yet. This one's status comes after theirs.
                self._queue.add(key)
                return
            cached = self._cache.jobs.get(key)
            if cached is None:
                return
            decided = plan(await self._look(cached), self._config)
            if decided.create_snapshot or decided.create_job:
                self._queue.add(key)
        await self._carry_out(key, cached, decided)

    async def _hold(self, key: Key, cached: CachedJob, decided: Plan) -> None:
        """The steps of output.deletionPolicy: Delete; each is followed by a new look."""
        view = cached.view()
        if decided.create_cleanup:
            await self._applier.create_cleanup(view)
        if decided.hold_output is not None:
            await self._applier.hold_output(view, decided.hold_output)
            for note in decided.events:
                # In a namespace that is being deleted no Event can be created either.
                level = logging.WARNING if note.type is EventType.WARNING else logging.INFO
                logger.log(level, "%s: %s: %s", key, note.reason, note.message)
            self._events.record(view, decided.events)
        self._queue.add(key)

    async def _look(self, cached: CachedJob) -> Observation:
        view = cached.view()
        family = self._cache.family(cached.uid)
        now = self._applier.now().replace(microsecond=0)
        record = self._snapshots.known(cached.uid)
        answers = self._applier.answers(cached.uid)
        conflict = answers.conflict
        started = view.status.snapshot is not None or bool(family.jobs)
        if record is None and started and not view.deleting and not is_true(view.status, ConditionType.FINISHED):
            try:
                record = await self._snapshots.find(view)
            except Conflict as problem:
                conflict = str(problem)
        seen = Observation(
            job=view,
            now=now,
            jobs=tuple(family.jobs.values()),
            pods=in_server_time(tuple(family.pods.values()), now),
            gone=in_server_time(tuple(family.gone.values()), now),
            snapshot=record,
            refusal=answers.refusal,
            fetch_refusal=answers.fetch,
            conflict=conflict,
        )
        if (finished := untold_end(seen, self._config)) is not None:
            await self._fresh_pods.read(view, finished)
            seen = replace(seen, pods=in_server_time(tuple(self._cache.family(cached.uid).pods.values()), now))
        if stock_wanted(seen):
            assert view.spec is not None
            seen = replace(seen, stock=await self._free_gpus.for_job(view.spec))
        job = podless(seen, self._config)
        return seen if job is None else replace(seen, pod_refusal=await self._job_events.pod_refusal(view, job))

    async def _carry_out(self, key: Key, cached: CachedJob, decided: Plan) -> None:
        view = cached.view()
        for delete in decided.deletes:
            await self._applier.delete_job(view, delete)
        if decided.delete_self:
            await self._applier.delete_own(view)
            return
        wait = decided.requeue_after
        if decided.deletes and decided.status is None:
            self._queue.add(key)  # look at what is left
        if decided.status is None:
            self._dirty.pop(cached.uid, None)
        else:
            due = self._due(cached.uid, decided.urgency)
            if due <= time.monotonic():
                await self._write(cached, decided.status, decided)
                self._queue.add(key)  # what was written may call for more: a deletion, a timer
                return
            left = due - time.monotonic()
            wait = left if wait is None else min(wait, left)
        if wait is not None:
            self._queue.add_after(key, wait)

    def _due(self, uid: str, urgency: Urgency) -> float:
        """When (monotonic) a changed status is to be written."""
        dirty = self._dirty.setdefault(uid, time.monotonic())
        if urgency is Urgency.NOW:
            return dirty
        if urgency is Urgency.SOON:
            return dirty + SETTLE_SECONDS
        return self._pace.due(uid, dirty)

    async def _write(self, cached: CachedJob, status: FineTuneJobStatus, decided: Plan) -> None:
        await self._applier.write_status(cached.view(), status, cached.resource_version)
        self._pace.wrote(cached.uid)
        self._dirty.pop(cached.uid, None)
        self._events.record(cached.view(), decided.events)
        _count(cached.status, status)

    async def _refresh_after(self, key: Key, problem: ApiError) -> None:
        """The cache may be behind: what is gone or was replaced is forgotten."""
        if problem.status not in (404, 409):
            return
        cached = self._cache.of(key)
        try:
            raw = await self._applier.fetch(key)
        except ApiError:
            return
        if raw is None and cached is not None:
            self._cache.drop(key, cached.uid)
            self.forget(cached.uid)


def _count(before: FineTuneJobStatus, after: FineTuneJobStatus) -> None:
    """Metrics of a transition."""
    ended = {s.stage for s in before.stages if s.finished_at}
    for stage in after.stages:
        start, end = parse_time(stage.started_at), parse_time(stage.finished_at)
        if stage.stage not in ended and start and end:
            succeeded = not is_true(after, ConditionType.FAILED)
            outcome = "succeeded" if succeeded else "failed"
            metrics.STAGE_SECONDS.labels(stage=stage.stage, outcome=outcome).observe((end - start).total_seconds())
    finished = find(after, ConditionType.FINISHED)
    if finished is not None and finished.status == "True" and not is_true(before, ConditionType.FINISHED):
        outcome = "succeeded" if is_true(after, ConditionType.COMPLETE) else "failed"
        metrics.JOBS_FINISHED.labels(outcome=outcome, reason=finished.reason).inc()
