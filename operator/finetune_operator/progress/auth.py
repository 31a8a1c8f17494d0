"""Who posts: a projected token, bound to a pod and to our audience, of a pod that works for this very FineTuneJob."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.names import LABEL_STAGE, LABEL_UID, PIPELINE, TOKEN_AUDIENCE, Stage
from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_operator.cache import Cache, Key
from finetune_operator.client import Api, ApiError, Raw, jobs_path, pods_path
from finetune_operator.observe import owner_uid, parse_status
from finetune_operator.planning.clock import parse_time
from finetune_operator.planning.conditions import is_true
from finetune_operator.unknown import unknown_fields

TRUST_SECONDS = 120.0
"""How long a checked token is believed: a deleted pod's token is refused after this at the latest."""
DISTRUST_SECONDS = 10.0
STATUS_SECONDS = 5.0
"""A standby, which watches nothing, reads a job's status at most so often for posts that it only collects."""
CAPACITY = 4096
REVIEWS_AT_ONCE = 4
"""Anybody who reaches the port can make us ask the API server about a token: so many at a time, the others wait their turn."""
REVIEW_PATIENCE_SECONDS = 5.0
_EXTRA = "authentication.kubernetes.io/"


class Refused(Exception):
    """The answer to a post that is not taken."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Identity:
    """A pod, as its token tells."""

    namespace: str
    pod_name: str
    pod_uid: str


@dataclass(frozen=True)
class Caller:
    """A pod that works for a FineTuneJob."""

    key: Key
    job_uid: str
    pod_uid: str
    pod_created: datetime | None
    stage: Stage


class Authenticator:
    """TokenReviews, and lookups of pods, both remembered for a while."""

    def __init__(self, api: Api, cache: Cache) -> None:
        self._api = api
        self._cache = cache
        self._reviews = asyncio.Semaphore(REVIEWS_AT_ONCE)
        self._tokens: OrderedDict[bytes, tuple[float, Identity | None]] = OrderedDict()
        self._statuses: OrderedDict[str, tuple[float, FineTuneJobStatus]] = OrderedDict()
        self._callers: OrderedDict[tuple[Identity, Key], tuple[float, Caller]] = OrderedDict()

    async def identify(self, authorization: str) -> Identity:
        """The pod that a bearer token stands for.

        Raises:
            Refused: 401, or 503 when the API server cannot say.
        """
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refused(401, "Unauthorized", "a bearer token is needed")
        digest = hashlib.sha256(token.encode()).digest()
        known = self._tokens.get(digest)
        if known is not None and known[0] > time.monotonic():
            identity = known[1]
        else:
            identity = await self._review(token.strip())
            trust = TRUST_SECONDS if identity else DISTRUST_SECONDS
            _remember(self._tokens, digest, (time.monotonic() + trust, identity))
        if identity is None:
            raise Refused(401, "Unauthorized", f"not a pod's valid token for the audience {TOKEN_AUDIENCE}")
        return identity

    async def _review(self, token: str) -> Identity | None:
        try:
            await asyncio.wait_for(self._reviews.acquire(), REVIEW_PATIENCE_SECONDS)
        except TimeoutError as problem:
            raise Refused(503, "Busy", "too many tokens wait to be checked; post again") from problem
        try:
            status = await self._api.review_token(token, TOKEN_AUDIENCE)
        except ApiError as problem:
            raise Refused(503, "Unavailable", "the API server could not check the token") from problem
        finally:
            self._reviews.release()
        if not status.get("authenticated") or TOKEN_AUDIENCE not in (status.get("audiences") or []):
            return None
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        name, uid = _one(extra, "pod-name"), _one(extra, "pod-uid")
        parts = str(user.get("username") or "").split(":")
        if len(parts) != 4 or parts[:2] != ["system", "serviceaccount"] or not name or not uid:
            return None
        return Identity(namespace=parts[2], pod_name=name, pod_uid=uid)

    async def authorize(self, identity: Identity, key: Key) -> Caller:
        """The pod's place in a FineTuneJob.

        Raises:
            Refused: 403 for another namespace's or job's pod, 404 for no such job.
        """
        if identity.namespace != key.namespace:
            raise Refused(403, "Forbidden", f"pod {identity.namespace}/{identity.pod_name} does not belong to {key}")
        known = self._callers.get((identity, key))
        if known is not None and known[0] > time.monotonic():
            return known[1]
        try:
            caller = await self._look_up(identity, key)
        except ApiError as problem:
            raise Refused(503, "Unavailable", "the API server could not be asked about the pod") from problem
        _remember(self._callers, (identity, key), (time.monotonic() + TRUST_SECONDS, caller))
        return caller

    async def _look_up(self, identity: Identity, key: Key) -> Caller:
        uid = await self._job_uid(key)
        forbidden = Refused(403, "Forbidden", f"pod {identity.pod_name} is not a pod of FineTuneJob {key}")
        family = self._cache.families.get(uid)
        pod = family.pods.get(identity.pod_name) if family else None
        if family is not None and pod is not None and pod.uid == identity.pod_uid:
            if pod.stage not in PIPELINE or not any(job.uid == pod.owner_uid for job in family.jobs.values()):
                raise forbidden
            return Caller(key, uid, pod.uid, pod.created, pod.stage)
        raw = await self._get(f"{pods_path(key.namespace)}/{identity.pod_name}")
        meta = raw["metadata"] if raw else {}
        labels = meta.get("labels") or {}
        if raw is None or meta["uid"] != identity.pod_uid or labels.get(LABEL_UID) != uid:
            raise forbidden
        owner = next(
            (r for r in meta.get("ownerReferences") or [] if r.get("controller") and r.get("kind") == "Job"), None
        )
        job = await self._get(f"{jobs_path(key.namespace)}/{owner['name']}") if owner else None
        if job is None or owner is None or job["metadata"]["uid"] != owner["uid"] or owner_uid(job["metadata"]) != uid:
            raise forbidden
        stage = labels.get(LABEL_STAGE)
        if stage not in PIPELINE:
            raise forbidden
        return Caller(key, uid, identity.pod_uid, parse_time(meta.get("creationTimestamp")), Stage(stage))

    async def _job_uid(self, key: Key) -> str:
        cached = self._cache.jobs.get(key)
        if cached is not None:
            return cached.uid
        raw = await self._finetunejob(key)
        if raw is None:
            raise Refused(404, "NotFound", f"there is no FineTuneJob {key}")
        return str(raw["metadata"]["uid"])

    async def status_of(self, caller: Caller) -> FineTuneJobStatus:
        """The job's status, at most a few seconds old: from the watch where there is one, else read.

        Raises:
            Refused: 404 when the job is gone, 409 when it has been replaced or has ended, 503 when nobody can say.
        """
        cached = self._cache.jobs.get(caller.key)
        if cached is not None:
            return _unfinished(caller, cached.uid, cached.status)
        known = self._statuses.get(caller.job_uid)
        if known is not None and known[0] > time.monotonic():
            return _unfinished(caller, caller.job_uid, known[1])
        status, _, _ = await self.read_status(caller)
        return status

    async def read_status(self, caller: Caller) -> tuple[FineTuneJobStatus, Raw, str]:
        """The job's status as it is now, what of it only a newer version knows, and the resourceVersion it was read at.

        Raises:
            Refused: as :meth:`status_of`.
        """
        try:
            raw = await self._finetunejob(caller.key)
        except ApiError as problem:
            raise Refused(503, "Unavailable", "the API server could not be asked about the job") from problem
        if raw is None:
            raise Refused(404, "NotFound", f"there is no FineTuneJob {caller.key}")
        meta, told = raw["metadata"], raw.get("status") or {}
        status = parse_status(told)
        _remember(self._statuses, str(meta["uid"]), (time.monotonic() + STATUS_SECONDS, status))
        unknown = unknown_fields(told, status)
        return _unfinished(caller, str(meta["uid"]), status), unknown, str(meta["resourceVersion"])

    async def _finetunejob(self, key: Key) -> Raw | None:
        try:
            return await self._api.get_finetunejob(key.namespace, key.name)
        except ApiError as problem:
            if problem.status == 404:
                return None
            raise

    async def _get(self, path: str) -> Raw | None:
        try:
            return await self._api.get(path)
        except ApiError as problem:
            if problem.status == 404:
                return None
            raise


def _unfinished(caller: Caller, uid: str, status: FineTuneJobStatus) -> FineTuneJobStatus:
    if uid != caller.job_uid:
        raise Refused(409, "Conflict", f"FineTuneJob {caller.key} has been replaced by another")
    if is_true(status, ConditionType.FINISHED):
        raise Refused(409, "Finished", f"FineTuneJob {caller.key} has ended")
    return status


def _one(extra: Any, name: str) -> str:
    values = extra.get(f"{_EXTRA}{name}") or []
    return str(values[0]) if len(values) == 1 else ""


def _remember(store: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    store[key] = value
    store.move_to_end(key)
    while len(store) > CAPACITY:
        store.popitem(last=False)
