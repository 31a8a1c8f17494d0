"""Events: what changed between two statuses, told once."""

from __future__ import annotations

from finetune_api.names import Stage
from finetune_api.status import AttemptStatus, ConditionType, FineTuneJobStatus
from finetune_operator.planning.clock import exact_duration, parse_time
from finetune_operator.planning.conditions import Conditioned, find, is_true
from finetune_operator.planning.endings import replaced
from finetune_operator.planning.model import EventNote, EventType

EVENT_LIMIT = 1000
RESUMED = "Resumed"
CHECKPOINTS_FAIL = "CheckpointsFail"
"""Reason of the condition CheckpointAtRisk while none can be stored."""


def notes(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[EventNote, ...]:
    """Events for a status transition, in the order in which they happened."""
    found = [
        *_resumed(before, after),
        *_became(before, after, ConditionType.PREPARED, "Prepared"),
        *_started(before, after),
        *_retried(before, after),
        *_recovered(before, after),
        *_at_risk(before, after),
        *_became(before, after, ConditionType.TRAINED, "Trained"),
        *_waiting(before, after),
        *_became(before, after, ConditionType.SUSPENDED, "Suspended"),
        *_became(before, after, ConditionType.COMPLETE),
        *_failed(before, after),
    ]
    return tuple(EventNote(n.type, n.reason, n.message[:EVENT_LIMIT]) for n in found)


def common_notes(before: Conditioned, after: Conditioned) -> tuple[EventNote, ...]:
    """Events that every kind of resource has: it waits, is complete, or failed."""
    found = [*_waiting(before, after), *_became(before, after, ConditionType.COMPLETE), *_failed(before, after)]
    return tuple(EventNote(n.type, n.reason, n.message[:EVENT_LIMIT]) for n in found)


def _became(before: Conditioned, after: Conditioned, kind: ConditionType, reason: str = "") -> list[EventNote]:
    """A condition became true. The Event's reason is the condition's, unless there is one for all of them."""
    if is_true(before, kind) or not is_true(after, kind):
        return []
    condition = find(after, kind)
    assert condition is not None
    return [EventNote(EventType.NORMAL, reason or condition.reason, condition.message)]


def _resumed(before: FineTuneJobStatus, after: FineTuneJobStatus) -> list[EventNote]:
    condition = find(after, ConditionType.SUSPENDED)
    if not is_true(before, ConditionType.SUSPENDED) or condition is None or condition.status == "True":
        return []
    return [EventNote(EventType.NORMAL, "Resumed", condition.message)]


def _train_attempts(status: FineTuneJobStatus) -> list[AttemptStatus]:
    return [a for a in status.attempts if a.stage == Stage.TRAIN and a.pod]


def _started(before: FineTuneJobStatus, after: FineTuneJobStatus) -> list[EventNote]:
    known = {a.execution_id for a in before.attempts}
    out = []
    for number, attempt in enumerate(_train_attempts(after), start=1):
        if attempt.execution_id not in known and attempt.started_at:
            where = f" on node {attempt.node}" if attempt.node else ""
            out.append(EventNote(EventType.NORMAL, "Started", f"attempt {number}{where}"))
    return out


def _retried(before: FineTuneJobStatus, after: FineTuneJobStatus) -> list[EventNote]:
    """An execution failed and the job goes on: told, since otherwise only a growing attempt number would show it."""
    if is_true(after, ConditionType.FINISHED) or is_true(after, ConditionType.SUSPENDED):
        return []
    told = {(r.execution_id, r.reason) for r in after.recoveries}
    settled = {a.execution_id for a in before.attempts if a.outcome != "Running"}
    out = []
    for attempt in after.attempts:
        if attempt.outcome != "Failed" or attempt.execution_id in settled:
            continue
        if (attempt.execution_id, attempt.reason) in told:
            continue
        started, finished = parse_time(attempt.started_at), parse_time(attempt.finished_at)
        after_time = f" after {exact_duration((finished - started).total_seconds())}" if started and finished else ""
        words = f"{attempt.stage} pod {attempt.pod} ended{after_time}: {attempt.reason}: {attempt.message or ''}"
        out.append(EventNote(EventType.WARNING, attempt.reason or "Unknown", words))
    return out


def _recovered(before: FineTuneJobStatus, after: FineTuneJobStatus) -> list[EventNote]:
    """What was mended, under its own reason. A place that was lost and found again is no warning."""
    known = {(r.execution_id, r.at, r.reason) for r in before.recoveries}
    out = []
    for entry in after.recoveries:
        if (entry.execution_id, entry.at, entry.reason) in known:
            continue
        harmless = entry.reason == RESUMED or replaced(entry.reason)
        out.append(EventNote(EventType.NORMAL if harmless else EventType.WARNING, entry.reason, entry.message))
    return out


def _at_risk(before: FineTuneJobStatus, after: FineTuneJobStatus) -> list[EventNote]:
    """Each time that checkpoints cannot be stored; else once for a job, however often the measurements cross the line."""
    condition, old = find(after, ConditionType.CHECKPOINT_AT_RISK), find(before, ConditionType.CHECKPOINT_AT_RISK)
    if condition is None or condition.status != "True":
        return []
    if old is not None and (old.status, old.reason) == (condition.status, condition.reason):
        return []
    if old is not None and condition.reason != CHECKPOINTS_FAIL:
        return []
    return [EventNote(EventType.WARNING, condition.reason, condition.message)]


def _waiting(before: Conditioned, after: Conditioned) -> list[EventNote]:
    old, new = find(before, ConditionType.WAITING), find(after, ConditionType.WAITING)
    if new is None or new.status != "True":
        return []
    if old is not None and old.status == "True" and old.reason == new.reason:
        return []
    return [EventNote(EventType.WARNING, "Waiting", f"{new.reason}: {new.message}")]


def _failed(before: Conditioned, after: Conditioned) -> list[EventNote]:
    condition = find(after, ConditionType.FAILED)
    if is_true(before, ConditionType.FAILED) or condition is None or condition.status != "True":
        return []
    return [EventNote(EventType.WARNING, "Failed", condition.message)]
