"""Liveness fails when work stands still or the watches are dead, and for nothing else."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import httpx
import pytest

from finetune_api import KIND
from finetune_cluster.ports import free_ports
from finetune_operator import resync as resync_module
from finetune_operator.cache import Cache, Key
from finetune_operator.client import Api
from finetune_operator.handlers import Informer
from finetune_operator.health import SILENT_LISTS, Health, start_health
from finetune_operator.reconciler import Reconciler
from finetune_operator.resync import Resync
from finetune_operator.workqueue import WorkQueue

Raw = dict[str, Any]
KEY = Key("ns", "a")


def health(queue: WorkQueue[Key] | None = None) -> Health:
    return Health(Cache(), queue or WorkQueue(), stall_seconds=120, resync_seconds=300, leading=True)


def finetunejob(version: int) -> Raw:
    return {"metadata": {"namespace": "ns", "name": "a", "uid": "u", "resourceVersion": str(version)}}


class Lists:
    """An API server whose one FineTuneJob is another at each list."""

    def __init__(self) -> None:
        self.version = 0

    async def list_all(self, path: str, label_selector: str = "", page: int = 500) -> tuple[list[Raw], int]:
        if not path.endswith("/finetunejobs"):
            return [], self.version
        self.version += 1
        return [finetunejob(self.version)], self.version


def test_a_queue_without_work_is_never_stalled() -> None:
    queue: WorkQueue[Key] = WorkQueue()
    queue.last_progress -= 1000
    assert health(queue).problem() is None


async def test_work_that_nobody_finishes_fails_liveness() -> None:
    queue: WorkQueue[Key] = WorkQueue()
    queue.add(KEY)
    probed = health(queue)
    assert probed.problem() is None
    queue.last_progress -= 121
    assert "stood still" in (probed.problem() or "")
    assert await queue.get() == KEY
    assert "stood still" in (probed.problem() or ""), "begun is not finished"
    queue.done(KEY)
    assert probed.problem() is None


def test_lists_that_no_longer_succeed_fail_the_leader_only() -> None:
    probed = health()
    probed.last_resync = lambda: time.monotonic() - 961
    assert "nothing could be listed" in (probed.problem() or "")
    probed.leading = False
    assert probed.problem() is None, "a standby lists nothing"


async def test_changes_that_only_lists_find_fail_liveness_and_a_watch_that_tells_them_heals_it() -> None:
    cache, queue, lists = Cache(), WorkQueue[Key](), Lists()
    informer = Informer(cache, queue, cast(Reconciler, None))
    resync = Resync(cast(Api, lists), cache, informer, cast(Reconciler, None), (), 300)
    probed = health()
    probed.silent_lists = lambda: resync.silent
    await resync.once()
    for number in range(SILENT_LISTS):
        assert probed.problem() is None, f"after {number} silent lists"
        await resync.once()
    assert probed.problem() == "lists find changes that the watches do not tell"
    informer.own(KIND, {"type": "MODIFIED", "object": finetunejob(lists.version + 1)})
    await resync.once()
    assert probed.problem() is None


async def test_what_goes_between_our_first_list_and_the_watches_is_found_soon_and_is_not_the_watches_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resync_module, "EARLY_SECONDS", 0.001)
    cache, queue, lists = Cache(), WorkQueue[Key](), Lists()
    resync = Resync(
        cast(Api, lists), cache, Informer(cache, queue, cast(Reconciler, None)), cast(Reconciler, None), (), 300
    )
    await resync.once()
    running = asyncio.ensure_future(resync.run())
    while lists.version < 1 + SILENT_LISTS:
        assert await asyncio.wait_for(queue.get(), 10) == KEY
        queue.done(KEY)
    running.cancel()
    assert cache.jobs[KEY].resource_version >= SILENT_LISTS, "within moments, not after 300 s"
    assert resync.silent == 0


@pytest.mark.parametrize(("stalled", "code"), [(0, 200), (121, 503)])
async def test_the_probe_answers_503_and_says_why(stalled: int, code: int) -> None:
    queue: WorkQueue[Key] = WorkQueue()
    queue.add(KEY)
    queue.last_progress -= stalled
    ports = free_ports(2)
    runners = await start_health(health(queue), *ports)
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://127.0.0.1:{ports[0]}/healthz")
        assert answer.status_code == code
        assert ("stood still" in answer.text) == (code == 503)
    finally:
        for runner in runners:
            await runner.cleanup()
