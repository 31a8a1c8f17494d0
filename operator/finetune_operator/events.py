"""Events: ours for people, posted when nothing more important waits, and the Job controller's, read when a Job gets no pod.

Best effort in both directions: status is the truth.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api import API_VERSION
from finetune_operator import metrics
from finetune_operator.client import Api, ApiError, events_path
from finetune_operator.planning.clock import rfc3339
from finetune_operator.planning.model import EventNote, JobView, StageJob
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)
COMPONENT = "finetune-operator"
CAPACITY = 10_000
COURTESY_SECONDS = 0.05
_EVERY_TIME_ANOTHER = re.compile(r'^Error creating: |pods "[^"]*" is forbidden: ')
"""Of the Job controller's words, what says nothing, or names a pod that was never there and is named otherwise next time."""


@dataclass(frozen=True)
class _Pending:
    job: JobView
    note: EventNote
    at: datetime


class EventRecorder:
    """A bounded queue and one poster."""

    def __init__(self, api: Api, work: WorkQueue[Any], instance: str) -> None:
        self._api = api
        self._work = work
        self._instance = instance
        self._queue: asyncio.Queue[_Pending] = asyncio.Queue(CAPACITY)

    def record(self, job: JobView, notes: tuple[EventNote, ...]) -> None:
        """Queue Events; in a flood the newest are dropped."""
        for note in notes:
            try:
                self._queue.put_nowait(_Pending(job, note, self._api.clock.now()))
            except asyncio.QueueFull:
                metrics.EVENTS_DROPPED.inc()

    async def run(self) -> None:
        """Post for ever, after the Jobs of a burst."""
        while True:
            pending = await self._queue.get()
            while self._work.urgent:  # noqa: ASYNC110 - a look now and then is all this needs
                await asyncio.sleep(COURTESY_SECONDS)
            try:
                await self._api.create(events_path(pending.job.namespace), self._body(pending), read_answer=False)
            except ApiError as problem:
                metrics.EVENTS_DROPPED.inc()
                logger.info("Event %s of %s was not recorded: %s", pending.note.reason, pending.job.name, problem)

    def _body(self, pending: _Pending) -> dict[str, object]:
        job, moment = pending.job, rfc3339(pending.at)
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{job.name}.{uuid.uuid4().hex[:16]}", "namespace": job.namespace},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": job.kind,
                "namespace": job.namespace,
                "name": job.name,
                "uid": job.uid,
            },
            "type": pending.note.type.value,
            "reason": pending.note.reason,
            "message": pending.note.message,
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._instance,
            "firstTimestamp": moment,
            "lastTimestamp": moment,
            "count": 1,
        }


class JobEvents:
    """What the Job controller says about a Job."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def pod_refusal(self, owner: JobView, job: StageJob) -> str:
        """Why a Job's pods cannot be created, in the API server's words; nothing if no Event tells."""
        query = {"fieldSelector": f"involvedObject.uid={job.uid},reason=FailedCreate", "limit": "50"}
        try:
            found = (await self._api.request("GET", events_path(owner.namespace), query=query)).get("items") or []
        except ApiError as problem:
            logger.info("The Events of Job %s cannot be read: %s", job.name, problem)
            return ""
        newest: dict[str, Any] = max(
            found, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""), default={}
        )
        return plain_refusal(str(newest.get("message") or ""))


def plain_refusal(message: str) -> str:
    """A FailedCreate Event's words, the same each time that the same thing stands in the way."""
    return _EVERY_TIME_ANOTHER.sub("", message).strip()[:1024]
