"""Reads a finished Job's pods from the API server before they are taken for gone: a watch may lag behind the Job's by any time."""

from __future__ import annotations

from finetune_api.names import LABEL_UID
from finetune_operator.cache import Cache
from finetune_operator.client import Api, pods_path
from finetune_operator.planning.model import JobView, StageJob


class FreshPods:
    """Each Job's once: after its end, what a list does not hold will never be there."""

    def __init__(self, api: Api, cache: Cache) -> None:
        self._api = api
        self._cache = cache
        self._read: dict[str, set[str]] = {}
        """UIDs of Jobs by the FineTuneJob's."""

    def forget(self, uid: str) -> None:
        """The FineTuneJob is gone."""
        self._read.pop(uid, None)

    async def read(self, owner: JobView, job: StageJob) -> None:
        """Into the cache.

        Raises:
            ApiError: the list failed.
        """
        read = self._read.setdefault(owner.uid, set())
        if job.uid in read:
            return
        pods, _ = await self._api.list_all(pods_path(owner.namespace), f"{LABEL_UID}={owner.uid}")
        for pod in pods:
            self._cache.put_pod(pod)
        read.add(job.uid)
