"""One reconcile of an AdapterCombination: look, plan, carry out."""

from __future__ import annotations

from dataclasses import replace

from finetune_api.status import ConditionType
from finetune_operator import metrics
from finetune_operator.apply import Applier
from finetune_operator.cache import Cache, Key
from finetune_operator.combinations.job import combine_job
from finetune_operator.combinations.observe import CachedCombination
from finetune_operator.events import EventRecorder, JobEvents
from finetune_operator.fresh_pods import FreshPods
from finetune_operator.planning.combination import CombinationPlan, outcome_of, plan_combination
from finetune_operator.planning.conditions import is_true
from finetune_operator.planning.model import Observation, PlannerConfig
from finetune_operator.planning.nodetime import in_server_time
from finetune_operator.planning.outcome import untold_end
from finetune_operator.planning.waiting import podless
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue


class CombinationReconciler:
    """Turns what the cache knows about a combination into writes. Its worker, queue and back-off are those of FineTuneJobs."""

    def __init__(
        self,
        cache: Cache,
        queue: WorkQueue[Key],
        applier: Applier,
        events: EventRecorder,
        job_events: JobEvents,
        fresh_pods: FreshPods,
        settings: Settings,
        config: PlannerConfig | None = None,
    ) -> None:
        self._cache = cache
        self._queue = queue
        self._applier = applier
        self._events = events
        self._job_events = job_events
        self._fresh_pods = fresh_pods
        self._settings = settings
        self._config = config or PlannerConfig()

    async def reconcile(self, key: Key) -> None:
        """Bring one combination one step further.

        Raises:
            ApiError: what the API server answered, for the worker to try again.
        """
        cached = self._cache.combinations.get(key)
        if cached is None:
            return
        decided = await self._decide(cached)
        if decided.create_job and cached.spec is not None:
            await self._applier.create_job(cached.job, combine_job(cached.job, cached.spec, self._settings))
            decided = await self._decide(cached)
            if decided.create_job:
                self._queue.add(key)
        for delete in decided.deletes:
            await self._applier.delete_job(cached.job, delete)
        if decided.delete_self:
            await self._applier.delete_own(cached.job)
        elif decided.status is not None:
            await self._applier.write_status(cached.job, decided.status, cached.resource_version)
            self._events.record(cached.job, decided.events)
            if (ended := outcome_of(cached.status, decided.status)) is not None:
                metrics.COMBINATIONS_FINISHED.labels(outcome=ended[0], reason=ended[1]).inc()
            self._queue.add(key)  # what was written may call for more: a timer
        elif decided.requeue_after is not None:
            self._queue.add_after(key, decided.requeue_after)

    async def _decide(self, cached: CachedCombination) -> CombinationPlan:
        return plan_combination(cached.view(), await self._look(cached), self._config)

    async def _look(self, cached: CachedCombination) -> Observation:
        job = cached.job
        family = self._cache.family(job.uid)
        now = self._applier.now().replace(microsecond=0)
        answers = self._applier.answers(job.uid)
        seen = Observation(
            job=job,
            now=now,
            jobs=tuple(family.jobs.values()),
            pods=in_server_time(tuple(family.pods.values()), now),
            refusal=answers.refusal,
            conflict=answers.conflict,
        )
        if job.deleting or is_true(cached.status, ConditionType.FINISHED):
            return seen
        if (finished := untold_end(seen, self._config)) is not None:
            await self._fresh_pods.read(job, finished)
            seen = replace(seen, pods=in_server_time(tuple(self._cache.family(job.uid).pods.values()), now))
        stuck = podless(seen, self._config)
        return seen if stuck is None else replace(seen, pod_refusal=await self._job_events.pod_refusal(job, stuck))
