"""Times that nodes tell, put right by those of the API server: a node's clock may be minutes off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from finetune_operator.planning.model import Pod


def in_server_time(pods: Sequence[Pod], now: datetime) -> tuple[Pod, ...]:
    """Pods whose containers began after the pod was bound and ended before now, or before the pod was created that replaced them.

    How long a container ran its node knows right, whatever its clock shows.
    """
    return tuple(_in_server_time(pod, _latest(pod, pods, now)) for pod in pods)


def _latest(pod: Pod, pods: Sequence[Pod], now: datetime) -> datetime:
    """A Job's next pod is created only once this one has ended; of several that train together, the next one of the same index."""
    mine = [p for p in pods if (p.owner_uid, p.index) == (pod.owner_uid, pod.index)]
    later = [p.created for p in mine if p.created > pod.created]
    return min([now, *later]) if pod.ended else now


def _in_server_time(pod: Pod, latest: datetime) -> Pod:
    earliest = pod.bound_at or pod.created
    started, finished = _within(earliest, pod.started_at, latest), pod.finished_at
    if finished is not None and started is not None and pod.started_at is not None:
        finished = started + (finished - pod.started_at)
    finished = _within(started or earliest, finished, latest)
    missing = _within(earliest, pod.sandbox_missing_since, latest)
    if (started, finished, missing) == (pod.started_at, pod.finished_at, pod.sandbox_missing_since):
        return pod
    return replace(pod, started_at=started, finished_at=finished, sandbox_missing_since=missing)


def _within(earliest: datetime, moment: datetime | None, latest: datetime) -> datetime | None:
    return None if moment is None else max(earliest, min(moment, latest))
