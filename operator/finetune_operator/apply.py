"""Carries plans out. No decisions here, only what the API server answered."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api import KIND
from finetune_api.combination import AdapterCombinationStatus
from finetune_api.names import FINALIZER_DELETE_OUTPUT, Stage
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cache import Cache, Key
from finetune_operator.client import STATUS_MANAGER, Api, ApiError, Raw, jobs_path, own_path, services_path
from finetune_operator.manifests import Owner, cleanup_job, stage_job, train_service
from finetune_operator.observe import owner_uid, trim_job
from finetune_operator.planning.model import AS_ASKED, Allotment, DeleteJob, JobView, Refusal, SnapshotRecord
from finetune_operator.settings import Settings
from finetune_operator.snapshots import Conflict, Snapshots
from finetune_operator.unknown import with_unknown

logger = logging.getLogger(__name__)
REFUSED = (400, 403, 422)
"""Quota, policy, webhook, validation: somebody else must mend it."""
PATIENCE = 3
"""Creates that fail in another way (a webhook that is down answers 500) before that counts as refused, too."""
MAX_RETRY_SECONDS, MAX_OUTAGE_RETRY_SECONDS = 60.0, 10.0
"""What people mend takes a while; an API server or a webhook that is back should not be waited for that long."""


@dataclass
class Answers:
    """What the API server said to earlier creates of one job. Lost with the process, and then asked again."""

    refusal: Refusal | None = None
    refusals: int = 0
    failures: int = 0
    conflict: str | None = None
    fetch: Refusal | None = None
    fetch_refusals: int = 0


class Applier:
    """Writes, and remembers their answers in the cache, so that the next look sees them."""

    def __init__(self, api: Api, cache: Cache, snapshots: Snapshots, settings: Settings) -> None:
        self._api = api
        self.may_act: Callable[[], bool] = lambda: True
        """Whether this process still leads. Asked right before each write: a process that was paused wakes up in the middle
        of something."""
        self._cache = cache
        self._snapshots = snapshots
        self._settings = settings
        self._answers: dict[str, Answers] = {}

    def now(self) -> datetime:
        """The API server's time."""
        return self._api.clock.now()

    def answers(self, uid: str) -> Answers:
        """Earlier answers for a job."""
        return self._answers.get(uid) or Answers()

    def forget(self, uid: str) -> None:
        """The job is gone."""
        self._answers.pop(uid, None)

    async def hold_output(self, job: JobView, hold: bool) -> None:
        """Put our finalizer on, or take it off. One that was written since is looked at again (409)."""
        self._check_leading(job)
        cached = self._cache.jobs.get(key_of(job))
        if cached is None or cached.uid != job.uid:
            return
        others = [f for f in cached.finalizers if f != FINALIZER_DELETE_OUTPUT]
        finalizers = [*others, FINALIZER_DELETE_OUTPUT] if hold else others
        try:
            answer = await self._api.set_finalizers(
                job.namespace, job.name, job.uid, cached.resource_version, finalizers
            )
        except ApiError as problem:
            if problem.status != 404:
                raise
            self._cache.drop(key_of(job), job.uid)
            return
        self._cache.put(KIND, answer)

    async def create_cleanup(self, job: JobView) -> None:
        """Create the Job that deletes the artifacts; a refusal is remembered. The stored snapshot may be gone with its owner."""
        self._check_leading(job)
        known = self._snapshots.known(job.uid)
        snapshot = known.snapshot if known is not None else self._snapshots.make(job)
        body = cleanup_job(Owner.of(job), snapshot, self._settings)
        path = jobs_path(job.namespace)
        try:
            self._cache.put_job(await self._api.create(path, body))
        except ApiError as problem:
            if problem.status == 409:
                there = await self._api.get(f"{path}/{body['metadata']['name']}")
                if self._cache.put_job(there) is None and trim_job(there) is None:
                    words = f"Job {body['metadata']['name']} exists and is not this FineTuneJob's."
                    self._answers.setdefault(job.uid, Answers()).conflict = words
                return
            self._refused(job, problem)

    async def create(
        self,
        job: JobView,
        snapshot: bool,
        stage: Stage | None,
        allotment: Allotment = AS_ASKED,
    ) -> bool:
        """Create the snapshot, then the stage's Job. False if the API server refused; the reason is remembered."""
        self._check_leading(job)
        try:
            record = self._snapshots.known(job.uid)
            if snapshot or record is None:
                node_gpus = await self._snapshots.node_gpus(job)
                self._check_leading(job)
                record = await self._snapshots.create(job, node_gpus)
            if stage is not None:
                await self._create_job(job, record, stage, allotment)
        except (Conflict, ApiError) as problem:
            if stage is Stage.FETCH:
                return self._not_fetched(job, problem)
            return self._not_created(job, problem)
        return self._created(job)

    async def create_job(self, job: JobView, body: Raw) -> bool:
        """Create a Job as it stands. False if the API server refused; the reason is remembered."""
        self._check_leading(job)
        try:
            self._cache.put_job(await self._create_or_take(job, jobs_path(job.namespace), body))
        except (Conflict, ApiError) as problem:
            return self._not_created(job, problem)
        return self._created(job)

    def _not_created(self, job: JobView, problem: Conflict | ApiError) -> bool:
        if isinstance(problem, Conflict):
            self._answers.setdefault(job.uid, Answers()).conflict = str(problem)
        else:
            self._refused(job, problem)
        return False

    def _not_fetched(self, job: JobView, problem: Conflict | ApiError) -> bool:
        """Whatever stands in the way, training can fetch for itself: not even an outage is worth an error."""
        answers = self._answers.setdefault(job.uid, Answers())
        retry_at = self.now() + timedelta(seconds=min(1.0 * 2**answers.fetch_refusals, MAX_RETRY_SECONDS))
        answers.fetch_refusals += 1
        answers.fetch = refusal(problem, retry_at) if isinstance(problem, ApiError) else Refusal(str(problem), retry_at)
        logger.info("%s/%s: nothing is fetched: %s", job.namespace, job.name, answers.fetch.message)
        return False

    def _created(self, job: JobView) -> bool:
        answers_now = self._answers.get(job.uid)
        if answers_now is not None and answers_now.conflict is None:
            del self._answers[job.uid]
        return True

    def _refused(self, job: JobView, problem: ApiError) -> None:
        """Remember a refusal; an outage counts as one only when it lasts, and is raised before."""
        answers = self._answers.setdefault(job.uid, Answers())
        longest = MAX_RETRY_SECONDS
        if problem.status not in REFUSED:
            longest = MAX_OUTAGE_RETRY_SECONDS
            answers.failures += 1
            if answers.failures < PATIENCE:
                raise problem
        delay = min(1.0 * 2**answers.refusals, longest)
        answers.refusals += 1
        answers.refusal = refusal(problem, self.now() + timedelta(seconds=delay))
        logger.info("%s/%s: refused: %s", job.namespace, job.name, answers.refusal.message)

    async def _create_job(self, job: JobView, record: SnapshotRecord, stage: Stage, allotment: Allotment) -> None:
        """POST once; on 409 the Job that is there must be ours, and is taken as it is."""
        self._check_leading(job)
        if stage is Stage.TRAIN and record.snapshot.spec.compute.nodes > 1:
            await self._create_service(job)
            self._check_leading(job)
        body = stage_job(Owner.of(job), record, stage, self._settings, allotment)
        self._cache.put_job(await self._create_or_take(job, jobs_path(job.namespace), body))

    async def _create_service(self, job: JobView) -> None:
        """Once: it stays as long as the FineTuneJob does, and whoever deletes it gets it back with the next training Job."""
        await self._create_or_take(job, services_path(job.namespace), train_service(Owner.of(job)))

    async def _create_or_take(self, job: JobView, path: str, body: Raw) -> Raw:
        """What is there now: created, or on 409 what a POST before this one has left.

        Raises:
            Conflict: it belongs to something else.
        """
        try:
            return await self._api.create(path, body)
        except ApiError as problem:
            if problem.status != 409:
                raise
            there = await self._api.get(f"{path}/{body['metadata']['name']}")
            if owner_uid(there["metadata"]) != job.uid:
                raise Conflict(
                    f"{body['kind']} {body['metadata']['name']} exists and is not controlled by this {job.kind}."
                ) from None
            return there

    async def delete_job(self, job: JobView, delete: DeleteJob) -> None:
        """Delete a Job; gone or replaced since is as good."""
        self._check_leading(job)
        try:
            answer = await self._api.delete_job(job.namespace, delete)
            if answer.get("kind") == "Job":
                self._cache.put_job(answer)
        except ApiError as problem:
            if problem.status not in (404, 409):
                raise
            self._cache.forget_job(job.uid, delete.name, delete.uid)

    async def write_status(
        self, job: JobView, status: FineTuneJobStatus | AdapterCombinationStatus, resource_version: int
    ) -> None:
        """Server-side apply of the whole status but progress, on top of the version that it was decided on.

        Without that, an operator that was paused and wakes up, or two at a time, would put an old status over a newer one: over
        a finished job's, too.

        Raises:
            ApiError: 409 when anything was written since.
        """
        self._check_leading(job)
        body = {k: v for k, v in status.to_json_dict().items() if v not in ([], {}) and k != "progress"}
        cached = self._cache.of(key_of(job))
        if cached is not None and cached.uid == job.uid:
            body = with_unknown(body, cached.unknown, type(status))
        seen = str(resource_version) if resource_version else ""
        answer = await self._api.apply_status(job.kind, job.namespace, job.name, job.uid, body, STATUS_MANAGER, seen)
        self._cache.put(job.kind, answer)

    async def delete_own(self, job: JobView) -> None:
        """Delete the FineTuneJob, or the AdapterCombination, as it was seen; edited or gone since is looked at again."""
        self._check_leading(job)
        key = key_of(job)
        cached = self._cache.of(key)
        if cached is None or cached.uid != job.uid:
            return
        try:
            await self._api.delete_own(job.kind, job.namespace, job.name, job.uid, cached.resource_version)
        except ApiError as problem:
            if problem.status == 404:
                self._cache.drop(key, job.uid)
                return
            if problem.status == 409:
                await self.fetch(key)
            raise

    def _check_leading(self, job: JobView) -> None:
        if not self.may_act():
            raise ApiError(0, "LeaseLost", "this process no longer leads", "-", f"{job.namespace}/{job.name}")

    async def fetch(self, key: Key) -> Raw | None:
        """The resource as it is now, also into the cache; None if it is gone."""
        try:
            raw = await self._api.get(own_path(key.kind, key.namespace, key.name))
        except ApiError as problem:
            if problem.status == 404:
                return None
            raise
        self._cache.put(key.kind, raw)
        return raw


def key_of(job: JobView) -> Key:
    """Where the cache has it."""
    return Key(job.namespace, job.name, job.kind)


def refusal(problem: ApiError, retry_at: datetime) -> Refusal:
    """What stands in the way of a create.

    422 with named fields is the API server's own validation, which will never say anything else; a policy or a webhook may
    answer 422 too, but names no field of ours, and somebody can change it.
    """
    words = problem.message or problem.reason
    if problem.status not in REFUSED:
        words = f"the API server answered {problem.status or 'nothing'} ({problem.reason}): {words}"
    for_good = problem.status == 422 and bool(problem.fields)
    return Refusal(words, retry_at, for_good, terminating="NamespaceTerminating" in problem.causes)
