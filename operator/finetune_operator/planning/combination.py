"""What an AdapterCombination needs next: one Job, and a status that says how it goes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from pydantic import ValidationError

from finetune_api.combination import (
    AdapterCombinationStatus,
    CombinationArtifacts,
    CombinationPhase,
    CombineReport,
    combination_output,
)
from finetune_api.failures import Consequence, Reason
from finetune_api.names import Stage
from finetune_api.results import ADAPTER_DIR, MANIFEST
from finetune_api.spec import AdapterCombinationSpec
from finetune_api.status import ConditionType
from finetune_operator.planning.clock import parse_time, rfc3339
from finetune_operator.planning.conditions import Wish, apply_wishes, find, is_true, transition_time
from finetune_operator.planning.endings import consequence_of, pod_failure
from finetune_operator.planning.messages import sentence
from finetune_operator.planning.model import (
    DeleteJob,
    EventNote,
    Observation,
    PlannerConfig,
    StageFailure,
    StageState,
    StageView,
)
from finetune_operator.planning.outcome import advice_for, stage_view
from finetune_operator.planning.transitions import common_notes
from finetune_operator.planning.waiting import Wait, find_wait, next_look

STAGE = Stage.COMBINE
COMBINED = "Combined"
DEADLINE = "DeadlineExceeded"
"""Reason of a Job's Failed condition when its activeDeadlineSeconds are over."""
_NOT_RUNNING = {
    StageState.ABSENT: "Starts a pod on a CPU.",
    StageState.STARTING: "Starts a pod on a CPU.",
    StageState.QUEUED: "Its Job is suspended: a queue, or somebody, holds it.",
    StageState.STOPPING: "Waits for the pods of a Job that was deleted to stop.",
}
_NOTHING_MISSING = Wish(ConditionType.WAITING, False, "NothingMissing", "Nothing is missing.")


@dataclass(frozen=True)
class CombinationView:
    """What is an AdapterCombination's own; the rest is in the Observation's job."""

    spec: AdapterCombinationSpec | None
    """Absent when the stored spec cannot be parsed."""
    spec_error: str
    status: AdapterCombinationStatus


@dataclass(frozen=True)
class CombinationPlan:
    """What to do. Applied in this order."""

    create_job: bool = False
    deletes: tuple[DeleteJob, ...] = ()
    delete_self: bool = False
    status: AdapterCombinationStatus | None = None
    """The whole desired status; absent when it is as desired."""
    events: tuple[EventNote, ...] = ()
    requeue_after: float | None = None


def plan_combination(seen: CombinationView, obs: Observation, config: PlannerConfig) -> CombinationPlan:
    """The next step. Children go with their owner, so nothing is left to do for one that is being deleted."""
    if obs.job.deleting:
        return CombinationPlan()
    if is_true(seen.status, ConditionType.FINISHED):
        return _finished(seen, obs)
    if seen.spec is None:
        return _failed(seen, obs, StageFailure(Reason.INVALID_CONFIG, seen.spec_error))
    if obs.conflict is not None:
        return _failed(seen, obs, StageFailure(Reason.NAME_CONFLICT, obs.conflict))
    if obs.refusal is not None and obs.refusal.for_good:
        return _failed(seen, obs, StageFailure(Reason.ADMISSION_REFUSED, obs.refusal.message))
    view = stage_view(obs, STAGE, config)
    if view.state is StageState.FAILED:
        return _failed(seen, obs, _why(seen.spec, view))
    if view.state in (StageState.SUCCEEDED, StageState.REPORT_LOST):
        # A pod ends well only after it has written the manifest: without its report, sizes are missing and nothing else.
        return _complete(seen, obs, seen.spec, _report(view))
    due = _due(seen, obs, seen.spec, view)
    if due is not None and obs.now >= due:
        return _failed(seen, obs, _too_late(seen.spec, f" {_what_kept_it(obs, view, config)}"))
    return _on_its_way(seen, obs, seen.spec, view, config)


def _finished(seen: CombinationView, obs: Observation) -> CombinationPlan:
    """Nothing changes any more; a Job that never came to run is stopped, and the time to live counted."""
    leftovers = tuple(DeleteJob(j.name, j.uid) for j in obs.jobs if not j.finished and not j.deleting)
    ttl = seen.spec.ttl_seconds_after_finished if seen.spec is not None else None
    ended = transition_time(seen.status, ConditionType.FINISHED)
    if ttl is None or ended is None:
        return CombinationPlan(deletes=leftovers)
    left = ttl - (obs.now - ended).total_seconds()
    if left <= 0:
        return CombinationPlan(delete_self=True)
    return CombinationPlan(deletes=leftovers, requeue_after=left)


def _due(seen: CombinationView, obs: Observation, spec: AdapterCombinationSpec, view: StageView) -> datetime | None:
    """When waiting ends where no Job's deadline ends it: there is none, it is suspended (and its time begins anew after that), or goes."""
    if view.state not in _NOT_RUNNING or (view.state is StageState.STARTING and view.job and view.job.started_at):
        return None
    return (parse_time(seen.status.start_time) or obs.now) + timedelta(seconds=spec.active_deadline_seconds)


def _what_kept_it(obs: Observation, view: StageView, config: PlannerConfig) -> str:
    wait = find_wait(obs, view, config)
    return f"{wait.reason}: {sentence(wait.message)}" if wait is not None else _NOT_RUNNING[view.state]


def _on_its_way(
    seen: CombinationView, obs: Observation, spec: AdapterCombinationSpec, view: StageView, config: PlannerConfig
) -> CombinationPlan:
    refused = obs.refusal is not None and obs.now < obs.refusal.retry_at
    create = view.state is StageState.ABSENT and not refused
    running = view.state in (StageState.RUNNING, StageState.REPORT_PENDING)
    message = _NOT_RUNNING.get(view.state, f"Combines {len(spec.adapters)} adapters ({spec.type}) on a CPU.")
    last = _last_failure(view)
    wait = find_wait(obs, view, config)
    if wait is None and last is not None and consequence_of(last.reason) is Consequence.WAIT:
        wait = Wait(last.reason, last.message)
    wish = _NOTHING_MISSING
    if wait is not None:
        text = (
            f"{sentence(wait.message)} It fails when it is not done {spec.active_deadline_seconds} s after it, or its Job, began (activeDeadlineSeconds). "
            f"{advice_for(wait.reason, STAGE)}"
        ).strip()
        wish = Wish(ConditionType.WAITING, True, wait.reason, text)
        message = f"Waiting: {wait.reason}: {text}"
    elif last is not None:
        message = f"Tried again after {last.reason}: {sentence(last.message)}"
    phase = CombinationPhase.RUNNING if running else CombinationPhase.PENDING
    decided = _with_status(seen, obs, phase, message, (wish,))
    moments = [m for m in (_next(obs, view, config), _due(seen, obs, spec, view)) if m is not None]
    return replace(decided, create_job=create, requeue_after=_until(obs, min(moments, default=None)))


def _next(obs: Observation, view: StageView, config: PlannerConfig) -> datetime | None:
    if view.state is StageState.ABSENT:
        return obs.refusal.retry_at if obs.refusal is not None else None
    if view.state is StageState.REPORT_PENDING and view.job is not None:
        ended = view.job.complete_at or view.job.failed_at or obs.now
        return ended + timedelta(seconds=config.report_grace_seconds)
    return next_look(obs, view, config)


def _until(obs: Observation, moment: datetime | None) -> float | None:
    return None if moment is None else max(0.1, (moment - obs.now).total_seconds())


def _last_failure(view: StageView) -> StageFailure | None:
    """Why the newest pod that has ended failed."""
    ended = next((pod for pod in reversed(view.pods) if pod.ended), None)
    return pod_failure(ended, STAGE) if ended is not None and ended.exit_code != 0 else None


def _why(spec: AdapterCombinationSpec, view: StageView) -> StageFailure:
    """Pods that the deadline stops were told to stop, and know no more: before them, one may have said what was missing."""
    assert view.failure is not None
    if view.job is None or view.job.failed_reason != DEADLINE:
        return view.failure
    told = [pod_failure(pod, STAGE) for pod in view.pods if pod.ended]
    last = next((f for f in reversed(told) if consequence_of(f.reason) is not Consequence.REPLACE), None)
    if last is None:
        return _too_late(spec, "")
    what = "that was missing" if consequence_of(last.reason) is Consequence.WAIT else "failure"
    return _too_late(spec, f" The last {what}: {last.reason}: {sentence(last.message)}")


def _too_late(spec: AdapterCombinationSpec, words: str) -> StageFailure:
    text = f"It was not done after {spec.active_deadline_seconds} s (activeDeadlineSeconds).{words}"
    return StageFailure(Reason.DEADLINE_EXCEEDED, text)


def _failed(seen: CombinationView, obs: Observation, failure: StageFailure) -> CombinationPlan:
    text = f"{failure.reason}: {sentence(failure.message)} {advice_for(failure.reason, STAGE)}".strip()
    wishes = (
        Wish(ConditionType.FAILED, True, failure.reason, text),
        Wish(ConditionType.FINISHED, True, failure.reason, text),
        _NOTHING_MISSING,
    )
    return _with_status(seen, obs, CombinationPhase.FAILED, text, wishes, completion_time=rfc3339(obs.now))


def _report(view: StageView) -> CombineReport | None:
    if view.report is None:
        return None
    try:
        return CombineReport.model_validate(view.report.result, extra="ignore")
    except ValidationError:
        return None


def _complete(
    seen: CombinationView, obs: Observation, spec: AdapterCombinationSpec, report: CombineReport | None
) -> CombinationPlan:
    where = combination_output(spec, obs.job.name, obs.job.uid)
    artifacts = CombinationArtifacts(
        uri=str(where),
        manifest_uri=str(where.join(MANIFEST)),
        adapter_uri=str(where.join(ADAPTER_DIR)),
        adapter_bytes=report.adapter_bytes if report else None,
        adapter_sha256=report.adapter_sha256 if report else None,
    )
    text = _success(spec, report)
    wishes = (
        Wish(ConditionType.COMPLETE, True, COMBINED, text),
        Wish(ConditionType.FINISHED, True, COMBINED, text),
        _NOTHING_MISSING,
    )
    details: dict[str, object] = {"artifacts": artifacts, "completion_time": rfc3339(obs.now)}
    if report is not None:
        details |= {
            "base_model": report.base_model,
            "rank": report.rank,
            "modules": report.modules,
            "relative_error": report.relative_error,
            "warnings": report.warnings or None,
        }
    return _with_status(seen, obs, CombinationPhase.SUCCEEDED, text, wishes, **details)


def _success(spec: AdapterCombinationSpec, report: CombineReport | None) -> str:
    if report is None:
        return "Combined; the pod's report was lost, and the manifest has what it said."
    many = f"{len(spec.adapters)} adapters combined into one of rank {report.rank} ({spec.type}, {report.modules} modules), read back from the bucket"
    if report.exact:
        return f"{many}: the weighted sum, but for rounding ({report.relative_error:.1g})."
    return f"{many}: its update is {report.relative_error:.2g} (relative) from the weighted sum."


def _with_status(
    seen: CombinationView,
    obs: Observation,
    phase: CombinationPhase,
    message: str,
    wishes: tuple[Wish, ...],
    **details: object,
) -> CombinationPlan:
    before = seen.status
    after = before.model_copy(
        update={
            "phase": phase,
            "observed_generation": obs.job.generation,
            "message": message,
            "conditions": apply_wishes(before, wishes, obs.job.generation, obs.now),
            "start_time": before.start_time or rfc3339(obs.now),
            **details,
        }
    )
    if after == before:
        return CombinationPlan()
    return CombinationPlan(status=after, events=common_notes(before, after))


def outcome_of(before: AdapterCombinationStatus, after: AdapterCombinationStatus) -> tuple[str, str] | None:
    """(outcome, reason) of one that has just ended, for the metrics."""
    finished = find(after, ConditionType.FINISHED)
    if finished is None or finished.status != "True" or is_true(before, ConditionType.FINISHED):
        return None
    return "succeeded" if is_true(after, ConditionType.COMPLETE) else "failed", finished.reason
