"""Where each stage stands: from its Job's conditions, its pods, its termination message, its final post and its exit code.

A stage has succeeded when its Job is Complete *and* its report is known; it has failed when its Job is. The report is
looked for in the pods' termination messages first, then in the final progress post (which survives the pod).
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta

from pydantic import ValidationError

from finetune_api.base import ApiModel
from finetune_api.combination import CombineReport
from finetune_api.failures import FAILURES, Reason, by_exit_code
from finetune_api.names import Stage
from finetune_api.progress import StageReport
from finetune_api.results import PrepareReport, PublishReport, TrainReport
from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_operator.planning.conditions import is_true
from finetune_operator.planning.endings import pod_failure
from finetune_operator.planning.model import (
    Observation,
    PlannerConfig,
    Pod,
    StageFailure,
    StageJob,
    StageState,
    StageView,
)

_POLICY_EXIT_CODE = re.compile(r"failed with exit code (\d+)")


def stage_view(obs: Observation, stage: Stage, config: PlannerConfig) -> StageView:
    """The state of one stage."""
    job = next((j for j in obs.jobs if j.stage is stage), None)
    found = sorted((p for p in obs.pods if p.stage is stage), key=lambda p: (p.created, p.name))
    pods, peers = tuple(p for p in found if p.counts), tuple(p for p in found if not p.counts)
    if job is None:
        # The next Job waits for a pod without one, so that no two executions overlap. One that has ended may stay for ever, where
        # somebody deleted its Job and not its pods (--cascade=orphan).
        view = StageView(stage, StageState.ABSENT, pods=pods, peers=peers)
        return replace(view, state=StageState.STOPPING) if view.occupied else view
    return replace(_of_job(obs, job, tuple(p for p in pods if p.owner_uid == job.uid), config), peers=peers)


def _of_job(obs: Observation, job: StageJob, pods: tuple[Pod, ...], config: PlannerConfig) -> StageView:
    stage = job.stage
    report = _report(job, pods, obs.job.status)
    if job.deleting:
        failure = (_failure(job, pods, report, stage) or _from_condition(job)) if job.failed_at is not None else None
        return StageView(stage, StageState.STOPPING, job, pods, failure=failure)
    if job.complete_at is not None:
        if report is not None and report.succeeded and _readable(report):
            return StageView(stage, StageState.SUCCEEDED, job, pods, report)
        waited = obs.now - job.complete_at
        pending = waited < timedelta(seconds=config.report_grace_seconds)
        return StageView(stage, StageState.REPORT_PENDING if pending else StageState.REPORT_LOST, job, pods)
    if job.failed_at is not None:
        failure = _failure(job, pods, report, stage)
        waited = obs.now - job.failed_at
        if failure is None and waited < timedelta(seconds=config.report_grace_seconds):
            return StageView(stage, StageState.REPORT_PENDING, job, pods)
        return StageView(stage, StageState.FAILED, job, pods, failure=failure or _from_condition(job))
    if job.suspended:
        return StageView(stage, StageState.QUEUED, job, pods)
    running = any(p.running for p in pods)
    return StageView(stage, StageState.RUNNING if running else StageState.STARTING, job, pods)


def untold_end(obs: Observation, config: PlannerConfig) -> StageJob | None:
    """A finished Job that is about to be taken for one whose pods are gone: none that is known tells how it ended."""
    if obs.job.deleting or is_true(obs.job.status, ConditionType.FINISHED):
        return None
    for job in obs.jobs:
        # Almost every look ends here, and reads no report a second time.
        if (
            not job.finished
            or job.stage is Stage.FETCH
            or any(p.owner_uid == job.uid and p.exit_code == 0 and p.counts for p in obs.pods)
        ):
            continue
        view = stage_view(obs, job.stage, config)
        untold = view.state is StageState.FAILED and not any(p.ended for p in view.pods)
        if untold or view.state is StageState.REPORT_LOST:
            return job
    return None


def _report(job: StageJob, pods: tuple[Pod, ...], status: FineTuneJobStatus) -> StageReport | None:
    """The newest success report, or else the newest report of any kind."""
    reports = [p.report for p in pods if p.report is not None and p.report.stage is job.stage]
    posted = status.progress.report if status.progress is not None else None
    if posted is not None and posted.stage is job.stage and _belongs(status, job, pods):
        reports.append(posted)
    return next((r for r in reversed(reports) if r.succeeded and _readable(r)), reports[-1] if reports else None)


_RESULTS: dict[Stage, type[ApiModel]] = {
    Stage.PREPARE: PrepareReport,
    Stage.TRAIN: TrainReport,
    Stage.PUBLISH: PublishReport,
    Stage.COMBINE: CombineReport,
}


def _readable(report: StageReport) -> bool:
    """A success whose result was cut off or is of another version is as good as lost."""
    try:
        _RESULTS[report.stage].model_validate(report.result, extra="ignore")
    except ValidationError:
        return False
    return True


def _belongs(status: FineTuneJobStatus, job: StageJob, pods: tuple[Pod, ...]) -> bool:
    """Whether the final post came from an execution of this very Job: one of its pods, or all its pods are gone."""
    assert status.progress is not None
    execution = status.progress.execution_id
    if any(p.uid == execution for p in pods):
        return True
    return not pods and any(a.execution_id == execution and a.stage == job.stage for a in status.attempts)


def _failure(job: StageJob, pods: tuple[Pod, ...], report: StageReport | None, stage: Stage) -> StageFailure | None:
    """What the pods tell about a failed Job; None while no ended pod is visible."""
    ended = sorted((p for p in pods if p.ended), key=lambda p: (p.created, p.finished_at or p.created))
    if not ended:
        if report is not None and not report.succeeded:
            return StageFailure(report.reason, report.message)
        return None
    permanent = _POLICY_EXIT_CODE.search(job.failed_message)
    if permanent:
        code = int(permanent.group(1))
        ended = [p for p in ended if p.exit_code == code] or ended
    return pod_failure(ended[-1], stage)


def _from_condition(job: StageJob) -> StageFailure:
    """The pods are gone: a FailJob rule leaves the exit code in the Job's condition."""
    found = _POLICY_EXIT_CODE.search(job.failed_message)
    if found:
        failure = by_exit_code(int(found.group(1)))
        return StageFailure(failure.reason, failure.meaning)
    words = job.failed_message or job.failed_reason or "no reason given"
    return StageFailure(Reason.UNKNOWN, f"Job {job.name} failed: {words}.".replace("..", "."))


def advice_for(reason: str, stage: Stage) -> str:
    """The table's advice for a reason in a stage, or nothing for one it does not know."""
    try:
        return FAILURES[Reason(reason)].advice_in(stage)
    except ValueError:
        return ""
