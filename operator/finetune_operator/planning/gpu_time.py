"""For how long training pods held their GPUs: each from when it was bound to its node until it ended, and each once.

Of several pods that train together every one is counted for itself: one is bound later, another is lost early. What is being counted
stands in status, so that a pod whose end was seen, or that is gone, is neither lost nor counted twice by an operator that starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_api.names import Stage
from finetune_api.status import FineTuneJobStatus, GpuHolder
from finetune_operator.planning.clock import parse_time, rfc3339
from finetune_operator.planning.model import Pod

MAX_HOLDERS = 128
"""Twice as many as there are pods of one execution."""


@dataclass(frozen=True)
class Held:
    """What was counted in this look."""

    seconds: int
    """Of all pods that have ended since the last one."""
    holders: tuple[GpuHolder, ...]


def count_held(
    before: FineTuneJobStatus, pods: Sequence[Pod], gone: Sequence[Pod], now: datetime, finished: bool
) -> Held:
    """Count the pods that have ended; one that is gone, and whose end was not seen, held its GPUs until that was noticed.

    Args:
        finished: the job is over: what still runs is stopped now, and nothing is counted any more.
    """
    seen = {p.uid: p for p in (*gone, *pods) if p.stage is Stage.TRAIN}
    holders = [_looked_at(old, seen.get(old.execution_id), now) for old in before.gpu_holders]
    holders += [_looked_at(new, seen[new.execution_id], now) for new in _new(before, seen)]
    if finished:
        holders = [h if h.until else h.model_copy(update={"until": rfc3339(now)}) for h in holders]
    counted = {h.execution_id for h in before.gpu_holders if h.until}
    seconds = sum(_seconds(h) for h in holders if h.execution_id not in counted)
    left = [] if finished else [h for h in holders if h.execution_id in seen]
    # Those that hold their GPUs now stay in any case.
    left.sort(key=lambda h: (h.until is None, h.since))
    return Held(seconds, tuple(left[-MAX_HOLDERS:]))


def _new(before: FineTuneJobStatus, seen: dict[str, Pod]) -> list[GpuHolder]:
    """Pods that were bound since the last look, but for those that an earlier version counted, by their attempt."""
    known = {h.execution_id for h in before.gpu_holders}
    known |= {a.execution_id for a in before.attempts if a.outcome != "Running"}
    # A full list has lost its oldest: a pod from before them is one of those.
    full = len(before.gpu_holders) >= MAX_HOLDERS
    oldest = min((h.since for h in before.gpu_holders if h.until), default="") if full else ""
    settled = _settled(before)
    found = []
    for pod in seen.values():
        since = pod.bound_at or pod.started_at
        if pod.uid in known or since is None or pod.refused or rfc3339(since) <= oldest:
            continue
        if pod.ended and rfc3339(since) < settled:
            continue
        found.append(GpuHolder(execution_id=pod.uid, since=rfc3339(since)))
    return found


def _settled(before: FineTuneJobStatus) -> str:
    """Until when an earlier version, which named no holders, has counted all pods: those too that are no attempt of their own."""
    if before.gpu_time is None or before.gpu_holders:
        return ""
    ended = (a.finished_at for a in before.attempts if a.stage == Stage.TRAIN and a.outcome != "Running")
    return max((at for at in ended if at), default="")


def _looked_at(holder: GpuHolder, pod: Pod | None, now: datetime) -> GpuHolder:
    if holder.until or (pod is not None and not pod.ended):
        return holder
    if pod is not None and pod.refused:
        return holder.model_copy(update={"until": holder.since})  # its node did not take it
    until = (pod.finished_at if pod is not None else None) or now
    return holder.model_copy(update={"until": rfc3339(until)})


def _seconds(holder: GpuHolder) -> int:
    since, until = parse_time(holder.since), parse_time(holder.until)
    return max(0, int((until - since).total_seconds())) if since and until else 0
