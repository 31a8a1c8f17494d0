"""/healthz, /readyz and /metrics.

Liveness fails when work stands still, not only when the process does: kopf's own probe stays green while streams are dead.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_api.combination import CombinationPhase
from finetune_api.status import Phase
from finetune_operator import metrics
from finetune_operator.cache import Cache, Key
from finetune_operator.workqueue import WorkQueue

SILENT_LISTS = 3


@dataclass
class Health:
    """What the probes look at."""

    cache: Cache
    queue: WorkQueue[Key]
    stall_seconds: float
    resync_seconds: float
    leading: bool = False
    ready: bool = False
    """The endpoint answers; a standby is ready too."""
    last_resync: Callable[[], float] = field(default=time.monotonic)
    silent_lists: Callable[[], int] = field(default=lambda: 0)

    def problem(self) -> str | None:
        """Why this process should be restarted, or None."""
        stalled = self.queue.stalled_seconds()
        if stalled > self.stall_seconds:
            return f"the work queue has stood still for {stalled:.0f} s with {len(self.queue)} keys waiting"
        age = time.monotonic() - self.last_resync()
        if self.leading and age > 3 * self.resync_seconds + 60:
            return f"nothing could be listed for {age:.0f} s"
        if self.leading and self.silent_lists() >= SILENT_LISTS:
            return "lists find changes that the watches do not tell"
        return None


async def start_health(health: Health, health_port: int, metrics_port: int) -> list[web.AppRunner]:
    """Serve probes and metrics; the runners are to be cleaned up."""

    async def healthz(_: web.Request) -> web.Response:
        problem = health.problem()
        return web.Response(text=problem or "ok", status=503 if problem else 200)

    async def readyz(_: web.Request) -> web.Response:
        role = "leader" if health.leading else "standby"
        return web.Response(text=role if health.ready else "starting", status=200 if health.ready else 503)

    async def scrape(_: web.Request) -> web.Response:
        metrics.QUEUE_DEPTH.set(len(health.queue))
        metrics.LEADER.set(1 if health.leading else 0)
        phases = Counter(str(c.status.phase or Phase.PENDING) for c in health.cache.jobs.values())
        for phase in Phase:
            metrics.JOBS.labels(phase=phase.value).set(phases.get(phase.value, 0))
        ways = Counter(str(c.status.phase or CombinationPhase.PENDING) for c in health.cache.combinations.values())
        for way in CombinationPhase:
            metrics.COMBINATIONS.labels(phase=way.value).set(ways.get(way.value, 0))
        return web.Response(body=generate_latest(metrics.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    probes, scraped = web.Application(), web.Application()
    probes.router.add_get("/healthz", healthz)
    probes.router.add_get("/readyz", readyz)
    scraped.router.add_get("/metrics", scrape)
    runners = []
    for app, port in ((probes, health_port), (scraped, metrics_port)):
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, None, port).start()
        runners.append(runner)
    return runners
