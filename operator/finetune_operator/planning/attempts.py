"""Executions (pods) of stages as status records them, and the running time that counts against the deadline."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_api.names import Stage
from finetune_api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.planning.clock import parse_time, rfc3339
from finetune_operator.planning.conditions import attempt_rank
from finetune_operator.planning.endings import in_context, pod_failure, vanished
from finetune_operator.planning.highlights import highlights, last_words, with_highlights
from finetune_operator.planning.model import Pod, StageFailure, StageState, StageView

MAX_ATTEMPTS = 64
REPORT_LOST = "ReportLost"
_NO_VIEW = StageView(Stage.PREPARE, StageState.ABSENT)
"""Of a stage that only another version knows."""


@dataclass(frozen=True)
class Ledger:
    """Attempts and running time after this look."""

    attempts: tuple[AttemptStatus, ...]
    active_seconds: int
    running_since: datetime | None


def keep_ledger(
    before: FineTuneJobStatus, views: tuple[StageView, ...], now: datetime, gone: tuple[Pod, ...] = ()
) -> Ledger:
    """Update the attempts from the pods that are there, or from how one ended that is ``gone``; where that was not seen it ended when
    it was noticed.

    Running time is added when an attempt ends, and once: an ended attempt never changes again.
    """
    of_stage = {view.stage.value: view for view in views}
    came = highlights(before.progress)
    pods = {p.uid: p for view in views for p in view.pods}
    last = {p.uid: p for p in gone}
    lost = {p.uid for view in views if view.state is StageState.REPORT_LOST for p in view.pods if p.exit_code == 0}
    # A full list has lost its oldest: a pod from before them is one of those, and its time was counted.
    oldest = min((attempt_rank(a) for a in before.attempts), default=None)
    dropped_before = oldest if len(before.attempts) >= MAX_ATTEMPTS else None
    attempts: dict[str, AttemptStatus] = {}
    ended: list[AttemptStatus] = []
    for old in before.attempts:
        new = old
        if old.outcome == "Running":
            pod = pods.pop(old.execution_id, None) or last.get(old.execution_id)
            view = of_stage.get(old.stage, _NO_VIEW)
            new = _from_pod(pod, old, now, view) if pod is not None else _vanished(old, now, view, before)
            if new.outcome != "Running":
                ended.append(new)
        else:
            pods.pop(old.execution_id, None)
        if new.execution_id in lost and new.reason != REPORT_LOST:
            new = new.model_copy(update={"reason": REPORT_LOST})
        attempts[new.execution_id] = with_highlights(new, came.get(new.execution_id))
    unseen = [pod for uid, pod in last.items() if uid not in attempts and uid not in pods]
    for pod in sorted([*pods.values(), *unseen], key=lambda p: (p.started_at or p.created, p.name)):
        if pod.started_at is None and pod.exit_code is None and not pod.refused:
            continue  # never ran: no execution, and the Job counts no failure
        new = _from_pod(pod, None, now, of_stage[pod.stage.value])
        if dropped_before is not None and attempt_rank(new) < dropped_before:
            continue
        if new.outcome != "Running":
            ended.append(new)
        if pod.uid in lost:
            new = new.model_copy(update={"reason": REPORT_LOST})
        attempts[pod.uid] = with_highlights(new, came.get(pod.uid))
    for view in views:
        if view.state is StageState.REPORT_LOST and view.job is not None and not any(p.uid in lost for p in view.pods):
            new = _lost_job(view)
            if dropped_before is None or attempt_rank(new) > dropped_before:
                attempts.setdefault(view.job.uid, new)
    kept = sorted(attempts.values(), key=attempt_rank)[-MAX_ATTEMPTS:]
    running = [parse_time(a.started_at) for a in kept if a.outcome == "Running"]
    since = min((t for t in running if t is not None), default=None)
    active = (before.active_seconds or 0) + sum(_seconds(a) for a in ended)
    return Ledger(tuple(kept), active, since)


def attempts_of(ledger: Ledger, stage: Stage) -> list[AttemptStatus]:
    """The executions of one stage, oldest first."""
    return [a for a in ledger.attempts if a.stage == stage]


def executions(ledger: Ledger, stage: Stage) -> list[AttemptStatus]:
    """Those that ran: a node may have refused the others."""
    return [a for a in attempts_of(ledger, stage) if a.started_at is not None]


def lost_reports(ledger: Ledger, stage: Stage) -> int:
    """How often a stage finished without leaving its report."""
    return sum(1 for a in ledger.attempts if a.stage == stage and a.reason == REPORT_LOST)


def _from_pod(pod: Pod, old: AttemptStatus | None, now: datetime, view: StageView) -> AttemptStatus:
    # What was written stays: the time that a fast clock's is taken for is that of the first look.
    started = (old.started_at if old else None) or (rfc3339(pod.started_at) if pod.started_at else None)
    scheduled = (old.scheduled_at if old else None) or (rfc3339(pod.bound_at) if pod.bound_at else None)
    mine = view.job is not None and view.job.uid == pod.owner_uid
    memory = (view.job.memory if view.job is not None and mine else None) or (old.memory if old else None)
    if not pod.ended:
        return AttemptStatus(
            execution_id=pod.uid,
            stage=pod.stage,
            pod=pod.name,
            node=pod.node or None,
            scheduled_at=scheduled,
            started_at=started,
            outcome="Running",
            memory=memory,
        )
    succeeded = pod.exit_code == 0 or (pod.exit_code is None and pod.phase == "Succeeded")
    failure = None if succeeded else in_context(pod_failure(pod, pod.stage), view)
    report = pod.report
    # A pod that was lost with its node tells no end: it counts as running until that was noticed.
    finished = pod.finished_at or (now if pod.started_at else pod.created)
    return AttemptStatus(
        execution_id=pod.uid,
        stage=pod.stage,
        pod=pod.name,
        node=pod.node or None,
        scheduled_at=scheduled,
        started_at=started,
        finished_at=rfc3339(finished),
        exit_code=pod.exit_code,
        outcome="Succeeded" if succeeded else "Failed",
        reason=(failure.reason if failure else report.reason if report else None) or None,
        message=(failure.message[:512] if failure else None),
        memory=memory,
        index=pod.index or None,
        **last_words(report),
    )


def _vanished(old: AttemptStatus, now: datetime, view: StageView, before: FineTuneJobStatus) -> AttemptStatus:
    """Its pod is gone: its own last post tells why it ended, or else its Job does."""
    if view.job is not None and view.job.complete_at is not None:
        return old.model_copy(update={"outcome": "Succeeded", "finished_at": rfc3339(view.job.complete_at)})
    progress = before.progress
    report = progress.report if progress is not None and progress.execution_id == old.execution_id else None
    if report is not None and not report.succeeded:
        failure = in_context(StageFailure(report.reason, report.message), view)
    else:
        failure = vanished(view)
    return old.model_copy(
        update={
            "outcome": "Failed",
            "finished_at": rfc3339(now),
            "reason": failure.reason,
            "message": failure.message[:512],
            **last_words(report),
        }
    )


def _lost_job(view: StageView) -> AttemptStatus:
    assert view.job is not None
    return AttemptStatus(
        execution_id=view.job.uid,
        stage=view.stage,
        pod="",
        started_at=rfc3339(view.job.created),
        finished_at=rfc3339(view.job.complete_at) if view.job.complete_at else None,
        outcome="Succeeded",
        reason=REPORT_LOST,
        message="The Job is complete, its pods are gone and no report arrived.",
    )


def _seconds(attempt: AttemptStatus) -> int:
    return 0 if attempt.index else _between(attempt.started_at, attempt.finished_at)


def _between(since: str | None, until: str | None) -> int:
    first, last = parse_time(since), parse_time(until)
    return max(0, int((last - first).total_seconds())) if first and last else 0
