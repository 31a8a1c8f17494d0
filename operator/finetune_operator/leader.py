"""Leader election on a Lease, as Kubernetes' own controllers do it (15/10/2 seconds).

kopf's peering needs CRDs of its own, notices a dead peer after 60 s and pauses everybody at equal priority.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from kubernetes.aio.client import V1Lease, V1ObjectMeta
from kubernetes.aio.leaderelection import electionconfig, leaderelection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from finetune_operator.client import Api, ApiError
from finetune_operator.settings import Settings

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long a leader that ends waits for its parts."""


class _TimedLock(LeaseLock):  # type: ignore[misc]
    """A lock whose calls end: a hung connection must not carry a leader past its renew deadline."""

    def __init__(self, name: str, namespace: str, identity: str, api: Api, timeout: float, duration: float) -> None:
        super().__init__(name, namespace, identity, api.client)
        self._timeout = timeout
        self.held = asyncio.Event()
        self.held_from = 0.0
        """When (monotonic) the last write of the Lease that succeeded began: others count from its end at the earliest."""
        self.lost = asyncio.Event()
        """Held before, and now another's: the library would try again until its deadline and let us act on meanwhile."""
        self._duration = duration
        self._other: tuple[str, str] = "", ""
        self._other_since = 0.0

    async def get(self, name: str, namespace: str) -> Any:
        try:
            found, record = await asyncio.wait_for(super().get(name, namespace), self._timeout)
        except Exception as problem:  # noqa: BLE001 - whatever it was, the Lease is not known to be held
            return False, _Unknown(problem)
        if found and record is not None:
            self._see(str(record.holder_identity or ""), str(record.renew_time))
        return found, record

    def _see(self, holder: str, renewed: str) -> None:
        if holder == self.identity:
            self._other = "", ""
            return
        if self.held.is_set():
            self.lost.set()
        if (holder, renewed) != self._other:
            self._other, self._other_since = (holder, renewed), time.monotonic()

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        # Not the library's own: kubernetes 37.0.1 passes pretty=True, which its own validation refuses (a string is wanted).
        body = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        return await self._try(self._created(namespace, body))

    async def _created(self, namespace: str, body: V1Lease) -> bool:
        await self.api_instance.create_namespaced_lease(namespace, body)
        return True

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        # The library (kubernetes 37) counts by the wall clock: set forward, it would take a Lease that is being renewed.
        if self.lost.is_set() or (self._other[0] and time.monotonic() - self._other_since < self._duration):
            return False
        return await self._try(super().update(name, namespace, updated_record))

    async def _try(self, call: Awaitable[bool]) -> bool:
        began = time.monotonic()
        try:
            done = bool(await asyncio.wait_for(call, self._timeout))
        except Exception as problem:  # noqa: BLE001 - as above
            logger.warning("Lease: %s", problem or type(problem).__name__)
            return False
        if done:
            self.held_from = began
            self.held.set()
        return done


def _lasts(duration: float) -> float:
    """For how long a holder may act on a Lease of a duration."""
    return duration - min(2.0, duration / 5)


async def _expiry(lock: _TimedLock, duration: float) -> None:
    """Returns before anybody else may take a Lease that is no longer renewed.

    The library (kubernetes 37) gives up 10 s after it began to try, but only between tries: with two calls in a try that
    may hang, an old leader would act on for seconds after the Lease's 15.
    """
    await lock.held.wait()
    while True:
        left = lock.held_from + _lasts(duration) - time.monotonic()
        if left <= 0:
            return
        await asyncio.sleep(left)


class _Unknown(Exception):
    """Neither there nor absent: the election only logs its reason."""

    def __init__(self, problem: Exception) -> None:
        super().__init__(str(problem))
        self.reason = str(problem) or type(problem).__name__


class Election:
    """One candidate."""

    def __init__(self, api: Api, settings: Settings, identity: str) -> None:
        self._api = api
        self._settings = settings
        self.identity = identity
        self._lock: _TimedLock | None = None

    def holds(self) -> bool:
        """Whether the Lease is ours at this moment. A process that was paused asks before its timers can have told it."""
        lock = self._lock
        if lock is None or not lock.held.is_set() or lock.lost.is_set():
            return False
        return time.monotonic() < lock.held_from + _lasts(self._settings.lease_duration_seconds)

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Wait for the Lease, lead, and return when it is lost (the caller must exit) or ``lead`` ends."""
        settings = self._settings
        timeout, duration = settings.lease_retry_seconds * 2, settings.lease_duration_seconds
        lock = _TimedLock(settings.lease_name, settings.lease_namespace, self.identity, self._api, timeout, duration)
        self._lock = lock
        work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        leading: list[asyncio.Task[Any]] = []

        async def started() -> None:
            leading.extend(t for t in (asyncio.current_task(),) if t is not None)
            try:
                await lead()
            except BaseException as problem:
                if not work.done():
                    work.set_exception(problem)
                raise
            if not work.done():
                work.set_result(None)

        config = electionconfig.Config(
            lock,
            lease_duration=settings.lease_duration_seconds,
            renew_deadline=settings.lease_renew_deadline_seconds,
            retry_period=settings.lease_retry_seconds,
            onstarted_leading=started,
            onstopped_leading=None,
        )
        election = asyncio.ensure_future(leaderelection.LeaderElection(config).run())
        expiry = asyncio.ensure_future(_expiry(lock, settings.lease_duration_seconds))
        lost = asyncio.ensure_future(lock.lost.wait())
        try:
            await asyncio.wait({election, work, expiry, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = work.done()
            for task in (work, election, expiry, lost, *leading):
                task.cancel()
            if leading:  # what it does must not outlast the Lease, which is released next
                await asyncio.wait(leading, timeout=STOP_SECONDS)
        if ended:
            await work
        else:
            logger.error("The Lease was lost.")

    async def release(self) -> None:
        """Give the Lease up, so that another replica leads at once instead of after its expiry."""
        settings = self._settings
        path = f"/apis/coordination.k8s.io/v1/namespaces/{settings.lease_namespace}/leases/{settings.lease_name}"
        try:
            lease = await self._api.get(path)
            if (lease.get("spec") or {}).get("holderIdentity") == self.identity:
                lease["spec"]["holderIdentity"] = ""
                await self._api.request("PUT", path, lease)
        except ApiError as problem:
            logger.info("The Lease was not released: %s", problem)
