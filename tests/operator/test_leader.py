"""A leader acts no longer than its Lease lasts, whatever happens to the calls that renew it."""

from __future__ import annotations

import asyncio
import json
import time
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from finetune_cluster.ports import free_ports
from finetune_operator.client import Api
from finetune_operator.leader import Election
from finetune_operator.settings import Settings

DURATION = 5


class LeaseServer:
    """Holds one Lease; after some writes it still takes them and never answers again."""

    def __init__(self, writes: int) -> None:
        self.lease: dict[str, Any] | None = None
        self.left = writes
        self.last_answered = 0.0
        self.looked = asyncio.Event()

    async def get(self, _: web.Request) -> web.Response:
        self.looked.set()
        if self.lease is None:
            return web.json_response({"kind": "Status", "code": 404, "reason": "NotFound"}, status=404)
        return web.json_response(self.lease)

    async def write(self, request: web.Request) -> web.Response:
        if not self.left:
            await asyncio.Event().wait()
        began = time.monotonic()
        self.left -= 1
        self.lease = json.loads(await request.read())
        self.last_answered = began
        return web.json_response(self.lease, status=201 if request.method == "POST" else 200)


@asynccontextmanager
async def lease_server(writes: int) -> AsyncIterator[tuple[LeaseServer, Api]]:
    server = LeaseServer(writes)
    app = web.Application()
    app.router.add_get("/apis/coordination.k8s.io/v1/namespaces/default/leases/{name}", server.get)
    app.router.add_put("/apis/coordination.k8s.io/v1/namespaces/default/leases/{name}", server.write)
    app.router.add_post("/apis/coordination.k8s.io/v1/namespaces/default/leases", server.write)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    [port] = free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{port}"
    api = Api(configuration)
    try:
        yield server, api
    finally:
        await api.close()
        await runner.cleanup()


async def test_a_leader_whose_renewals_hang_stops_before_another_may_take_the_lease() -> None:
    settings = Settings(lease_duration_seconds=DURATION, lease_renew_deadline_seconds=3, lease_retry_seconds=1)
    stopped: list[float] = []

    async def lead() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(time.monotonic())

    async with lease_server(2) as (server, api):
        await asyncio.wait_for(Election(api, settings, "me").run(lead), 30)
        await asyncio.sleep(0)
        assert server.left == 0
        assert stopped
        assert stopped[0] < server.last_answered + DURATION


async def test_a_leader_that_sees_another_holder_stops_at_its_next_look() -> None:
    """And not at the renew deadline: the other acts already."""
    settings = Settings(lease_duration_seconds=60, lease_renew_deadline_seconds=50, lease_retry_seconds=1)
    leads = asyncio.Event()

    async def lead() -> None:
        leads.set()
        await asyncio.Event().wait()

    async with lease_server(100) as (server, api):
        election = Election(api, settings, "me")
        assert not election.holds()
        run = asyncio.ensure_future(election.run(lead))
        await asyncio.wait_for(leads.wait(), 10)
        assert election.holds()
        assert server.lease is not None
        server.lease["spec"]["holderIdentity"] = "thief"
        await asyncio.wait_for(run, 10)
        assert not election.holds()


async def test_a_standby_whose_clock_is_set_forward_takes_no_lease_that_is_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(lease_duration_seconds=DURATION, lease_renew_deadline_seconds=3, lease_retry_seconds=1)
    led: list[float] = []

    async def lead() -> None:
        led.append(time.monotonic())
        await asyncio.Event().wait()

    async with lease_server(100) as (server, api):
        times = {"renewTime": "2026-03-01T12:00:00.000000Z", "acquireTime": "2026-03-01T12:00:00.000000Z"}
        spec = {"holderIdentity": "other", "leaseDurationSeconds": DURATION, "leaseTransitions": 0, **times}
        server.lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "x"},
            "spec": spec,
        }
        began = time.monotonic()
        run = asyncio.ensure_future(Election(api, settings, "me").run(lead))
        await asyncio.wait_for(server.looked.wait(), 10)
        jumped = types.SimpleNamespace(time=lambda: time.time() + 300)
        monkeypatch.setattr("kubernetes.aio.leaderelection.leaderelection.time", jumped)
        while not led:
            server.looked.clear()
            await asyncio.wait_for(server.looked.wait(), 10)
        assert led[0] >= began + DURATION
        run.cancel()
