"""What is watched follows what is served: an operator may be newer than its CRDs."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from finetune_operator import watches
from finetune_operator.cache import Cache, Key
from finetune_operator.handlers import Informer
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue


class Nobody:
    """A reconciler that is never asked."""

    def forget(self, uid: str) -> None:
        raise AssertionError(uid)


async def test_the_watches_begin_anew_with_the_kind_that_is_served_now(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    queue: WorkQueue[Key] = WorkQueue()
    informer = Informer(Cache(), queue, Nobody())  # type: ignore[arg-type]
    begun: asyncio.Queue[bool | None] = asyncio.Queue()

    async def spawn(*, stop_flag: asyncio.Event, **_: Any) -> asyncio.Event:
        begun.put_nowait(informer.combinations_served)
        return stop_flag

    async def run(stop_flag: asyncio.Event, **_: Any) -> None:
        await stop_flag.wait()

    monkeypatch.setattr(watches.kopf, "spawn_tasks", spawn)
    monkeypatch.setattr(watches.kopf, "run_tasks", run)
    monkeypatch.setattr(watches, "WATCH_RETRY_SECONDS", 0)
    again: list[str] = []
    informer.serve_combinations("404 the server could not find the requested resource")
    watching = asyncio.ensure_future(
        watches.watch(informer, Settings(), lambda: None, lambda: again.append("look again"))
    )
    try:
        assert await asyncio.wait_for(begun.get(), 5) is False
        informer.serve_combinations("404 the server could not find the requested resource")
        informer.serve_combinations("")
        assert await asyncio.wait_for(begun.get(), 5) is True
        informer.serve_combinations("")
        informer.serve_combinations("403 forbidden")
        assert await asyncio.wait_for(begun.get(), 5) is False
    finally:
        watching.cancel()
    assert again == ["look again"] * 2
    told = [record.getMessage() for record in caplog.records]
    assert [words.split(":")[0].split(" (")[0] for words in told] == [
        "AdapterCombinations are not served",
        "AdapterCombinations are served from now on.",
        "AdapterCombinations are not served",
    ]
