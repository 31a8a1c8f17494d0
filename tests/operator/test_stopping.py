"""SIGTERM at any moment of an operator's start: it ends in order, and its exit code says so."""

from __future__ import annotations

import asyncio
import signal
import threading
from types import SimpleNamespace
from typing import Any, cast

import kopf
import pytest

from finetune_operator import __main__ as operator
from finetune_operator.settings import Settings
from tests.operator.harness import Bench


@pytest.mark.light
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.1])
def test_an_operator_that_is_stopped_while_it_starts_ends_in_order(bench: Bench, delay: float) -> None:
    started = bench.start_operator(wait=False, FINETUNE_LEADER_ELECTION="true")
    while "Leading as" not in started.log.read_text():
        assert started.process.poll() is None, started.log.read_text()
    threading.Event().wait(delay)
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(30) == 0, started.log.read_text()


async def test_kopf_that_ends_as_if_cancelled_was_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends(**_: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(kopf, "operator", ends)
    monkeypatch.setattr(operator, "make_registry", lambda _: None)
    part = cast(operator.Operator, SimpleNamespace(settings=Settings(), informer=None))
    await operator.Operator._watch(part, asyncio.Event())


async def test_watches_that_are_cancelled_end_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = asyncio.Event()

    async def goes_on(**_: Any) -> None:
        runs.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(kopf, "operator", goes_on)
    monkeypatch.setattr(operator, "make_registry", lambda _: None)
    part = cast(operator.Operator, SimpleNamespace(settings=Settings(), informer=None))
    task = asyncio.ensure_future(operator.Operator._watch(part, asyncio.Event()))
    await runs.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
