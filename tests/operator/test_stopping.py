"""An operator ends in order at any moment, and its exit code says so; what fails in it and can begin anew does not end it."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any, cast

import kopf
import pytest

from finetune_operator import watches
from finetune_operator.cache import Cache
from finetune_operator.handlers import Informer
from finetune_operator.reconciler import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue
from tests.operator.harness import Bench, Raw, is_true, proxied
from tests.operator.manifests import finetunejob
from tests.support.api_proxy import Plan


@pytest.mark.light
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.1])
def test_an_operator_that_is_stopped_while_it_starts_ends_in_order(bench: Bench, delay: float) -> None:
    started = bench.start_operator(wait=False, FINETUNE_LEADER_ELECTION="true")
    started.until_logged("Leading as")
    threading.Event().wait(delay)
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(30) == 0, started.log.read_text()


@pytest.mark.light
def test_a_leader_that_renewed_its_lease_ends_in_order(bench: Bench) -> None:
    """kopf once took the signal and waited 5 s for the renewals of the Lease, which it then cancelled: exit code 1."""
    leader = bench.start_operator(FINETUNE_LEADER_ELECTION="true", FINETUNE_LEASE_RETRY_SECONDS="1")
    path = f"/apis/coordination.k8s.io/v1/namespaces/{bench.namespace}/leases/finetune-operator"
    bench.api.wait(path.rpartition("/")[0], "finetune-operator", renewed_after_it_was_taken, 30, "a renewal")
    assert leader.stop() == 0, leader.log.read_text()
    assert not bench.api.get(path)["spec"].get("holderIdentity")


def renewed_after_it_was_taken(lease: Raw) -> bool:
    return bool(lease["spec"]["renewTime"] != lease["spec"]["acquireTime"])


@pytest.mark.light
def test_a_leader_whose_watches_fail_goes_on_with_its_lease(bench: Bench) -> None:
    allowed = threading.Event()
    plan = Plan(refuse_watches=lambda _: not allowed.is_set(), refusal=(400, "BadRequest"))
    with proxied(bench, plan) as proxy, bench.script():
        leader = bench.start_operator(
            KUBECONFIG=str(proxy.kubeconfig), FINETUNE_LEADER_ELECTION="true", FINETUNE_LEASE_RETRY_SECONDS="1"
        )
        leader.until_logged("begin anew")
        allowed.set()
        bench.apply(finetunejob("after").build())
        assert is_true(bench.until_finished("after"), "Complete")
        assert leader.process.poll() is None
        assert leader.log.read_text().count("Leading as") == 1


async def test_watches_are_begun_anew_and_tasks_of_others_live_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two failures of kopf, then the end by being cancelled; the signals are taken back each time."""
    spawned: list[dict[str, Any]] = []
    taken: list[int] = []
    others: list[asyncio.Task[Any]] = []
    third_runs = asyncio.Event()

    async def spawn(**options: Any) -> list[asyncio.Task[Any]]:
        spawned.append(options)
        return [asyncio.ensure_future(fail_or_go_on(len(spawned)))]

    async def fail_or_go_on(number: int) -> None:
        others.append(asyncio.ensure_future(asyncio.Event().wait()))
        if number < 3:
            raise RuntimeError("410 Gone")
        third_runs.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(kopf, "spawn_tasks", spawn)
    monkeypatch.setattr(watches, "WATCH_RETRY_SECONDS", 0)
    looked: list[int] = []

    informer = Informer(Cache(), WorkQueue(), cast(Reconciler, None))
    task = asyncio.ensure_future(
        watches.watch(informer, Settings(), lambda: taken.append(len(spawned)), lambda: looked.append(len(spawned)))
    )
    await asyncio.wait_for(third_runs.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert looked == [1, 2]
    assert taken == [1, 2, 3]
    assert not any(other.done() for other in others)
    assert all(o["settings"].process.ultimate_exiting_timeout is None for o in spawned), (
        "it would kill the whole process"
    )
    for other in others:
        other.cancel()
