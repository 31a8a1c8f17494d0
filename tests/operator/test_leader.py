"""A leader acts no longer than its Lease lasts, whatever happens to the calls that renew it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

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

    async def get(self, _: web.Request) -> web.Response:
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


async def test_a_leader_whose_renewals_hang_stops_before_another_may_take_the_lease() -> None:
    server = LeaseServer(2)
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
    settings = Settings(lease_duration_seconds=DURATION, lease_renew_deadline_seconds=3, lease_retry_seconds=1)
    stopped: list[float] = []

    async def lead() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(time.monotonic())

    try:
        await asyncio.wait_for(Election(api, settings, "me").run(lead), 30)
        await asyncio.sleep(0)
        assert server.left == 0
        assert stopped
        assert stopped[0] < server.last_answered + DURATION
    finally:
        await api.close()
        await runner.cleanup()
