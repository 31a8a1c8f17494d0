"""kopf as one part of the process among others.

kopf (1.45) is written to be the process: it takes SIGTERM for itself, waits 5 s for every task that began after it, cancels them
all, and has the process killed when it does not end in time. Here it watches, and no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

import kopf

from finetune_operator.handlers import WATCH_RETRY_SECONDS, Informer, make_registry, make_settings
from finetune_operator.settings import Settings

logger = logging.getLogger(__name__)


class _Everything(Collection[Any]):
    """What kopf is told to leave alone when it ends: it would also cancel what is ours (a renewal of the Lease, a request)."""

    def __contains__(self, _: object) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0


async def watch(
    informer: Informer, settings: Settings, take_signals: Callable[[], None], look_again: Callable[[], None]
) -> None:
    """Watch until cancelled; when kopf fails, or other kinds are served than it watches, it is begun anew and ``look_again`` is called
    for what was missed meanwhile.

    kopf 1.45 ends as a whole when one list or watch is answered 410 (a page of a long list that came too late) or any other 4xx.
    ``take_signals`` takes back the handlers of SIGTERM and SIGINT.
    """
    while True:
        informer.kinds_changed.clear()
        try:
            tasks = await kopf.spawn_tasks(
                registry=make_registry(informer),
                settings=make_settings(settings.request_timeout_seconds),
                standalone=True,
                clusterwide=not settings.namespaces,
                namespaces=settings.namespaces,
                stop_flag=informer.kinds_changed,
            )
            take_signals()
            await kopf.run_tasks(tasks, ignored=_Everything())
        except Exception as problem:  # noqa: BLE001 - of a library; liveness looks after what does not mend
            logger.warning("The watches failed and begin anew: %r", problem)
        await asyncio.sleep(WATCH_RETRY_SECONDS)
        look_again()
