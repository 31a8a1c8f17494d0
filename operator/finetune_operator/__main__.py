"""The operator process: serve the endpoint, wait for the Lease, then watch and reconcile until it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from finetune_operator.apply import Applier
from finetune_operator.cache import Cache, Key
from finetune_operator.client import Api, ApiError, load_configuration
from finetune_operator.combinations.reconciler import CombinationReconciler
from finetune_operator.events import EventRecorder, JobEvents
from finetune_operator.free_gpus import FreeGpus
from finetune_operator.fresh_pods import FreshPods
from finetune_operator.handlers import Informer
from finetune_operator.health import Health, start_health
from finetune_operator.leader import STOP_SECONDS, Election
from finetune_operator.pace import Pace
from finetune_operator.progress.server import ProgressServer
from finetune_operator.reconciler import Reconciler
from finetune_operator.resync import Resync
from finetune_operator.settings import Settings
from finetune_operator.snapshots import Snapshots
from finetune_operator.watches import watch
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger("finetune_operator")


class Operator:
    """All parts, wired once."""

    def __init__(self, settings: Settings, api: Api) -> None:
        self.settings = settings
        self.api = api
        self.cache = Cache()
        self.queue: WorkQueue[Key] = WorkQueue()
        self.pace = Pace(settings.progress_interval_seconds)
        self.identity = settings.identity
        snapshots = Snapshots(api, settings)
        self.events = EventRecorder(api, self.queue, self.identity)
        self.applier = Applier(api, self.cache, snapshots, settings)
        job_events, fresh_pods = JobEvents(api), FreshPods(api, self.cache)
        self.reconciler = Reconciler(
            self.cache,
            self.queue,
            self.applier,
            snapshots,
            self.events,
            job_events,
            fresh_pods,
            FreeGpus(api, snapshots.gpus, settings.count_free_gpus),
            self.pace,
            CombinationReconciler(self.cache, self.queue, self.applier, self.events, job_events, fresh_pods, settings),
        )
        self.informer = Informer(self.cache, self.queue, self.reconciler)
        self.resync = Resync(
            api, self.cache, self.informer, self.reconciler, settings.namespaces, settings.resync_seconds
        )
        self.health = Health(self.cache, self.queue, settings.stall_seconds, settings.resync_seconds)
        self.health.last_resync = lambda: self.resync.last_success
        self.health.silent_lists = lambda: self.resync.silent
        self.progress = ProgressServer(api, self.cache, self.informer, self.pace, settings, lambda: self.health.leading)

    async def run(self, stop: asyncio.Event) -> bool:
        """Until stopped (True) or until leadership or a part was lost (False)."""
        runners = await start_health(self.health, self.settings.health_port, self.settings.metrics_port)
        await self.progress.start()
        self.health.ready = True
        election = Election(self.api, self.settings, self.identity)
        if self.settings.leader_election:
            self.applier.may_act = election.holds
        leading: Coroutine[Any, Any, None] = (
            election.run(lambda: self.lead(stop)) if self.settings.leader_election else self.lead(stop)
        )
        work = asyncio.ensure_future(leading)
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not work.cancelled() and (problem := work.exception()) is not None:
                logger.error("Stopped by %r", problem, exc_info=problem)
            return stop.is_set()
        finally:
            for task in (work, stopped):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.wait_for(asyncio.gather(work, stopped, return_exceptions=True), STOP_SECONDS)
            await self.progress.stop()
            if self.settings.leader_election and self.health.leading:
                await election.release()
            for runner in runners:
                await runner.cleanup()
            await self.api.close()

    async def lead(self, stop: asyncio.Event) -> None:
        """Watch and reconcile. Ends only by being cancelled or by failing."""
        logger.info("Leading as %s", self.identity)
        self.health.leading = True
        # Everything is listed before anything is decided: a job whose Jobs are not known yet is not a new job.
        await self._first_list()
        parts: list[Coroutine[Any, Any, None]] = [
            watch(self.informer, self.settings, lambda: handle_signals(stop), self.resync.look_again),
            self.resync.run(),
            self.queue.run_delays(),
            self.events.run(),
            *(self.reconciler.work() for _ in range(self.settings.workers)),
        ]
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=STOP_SECONDS)  # kopf waits for ever for a part of it that does not end

    async def _first_list(self) -> None:
        while True:
            try:
                await self.resync.once()
            except ApiError as problem:
                logger.warning("Cannot list yet: %s", problem)
                await asyncio.sleep(1)
            else:
                return


def handle_signals(stop: asyncio.Event) -> None:
    """Be told to stop by SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def serve(settings: Settings) -> bool:
    """Run with signals handled."""
    api = Api(await load_configuration(), settings.connections, settings.request_timeout_seconds)
    stop = asyncio.Event()
    handle_signals(stop)
    return await Operator(settings, api).run(stop)


def main() -> None:
    """Entry point; exits 1 when leadership was lost, so that the container starts anew with nothing left over."""
    settings = Settings()
    # What is imported stays; and in a burst, JSON makes many dicts that die young without cycles.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    sys.exit(0 if asyncio.run(serve(settings)) else 1)


if __name__ == "__main__":
    main()
