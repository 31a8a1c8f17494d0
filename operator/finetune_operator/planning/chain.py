"""The ordered chain of rules: the first that has something to say decides.

Every decision can be made again after it was half carried out: a plan that creates or deletes is followed by a new look,
and the status always describes what that look found. So an operator that dies between two writes loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from finetune_api.failures import MAX_FRUITLESS, MAX_RETURNS, Reason
from finetune_api.names import Stage
from finetune_api.quantity import parse_quantity
from finetune_api.status import ConditionType, Phase
from finetune_operator.planning import budget, conditions, phases
from finetune_operator.planning.attempts import lost_reports
from finetune_operator.planning.clock import exact_duration, parse_time, rfc3339
from finetune_operator.planning.conditions import Wish
from finetune_operator.planning.decision import Decision, finish
from finetune_operator.planning.endings import pod_failure
from finetune_operator.planning.fetching import fetch_while_queued
from finetune_operator.planning.look import Look
from finetune_operator.planning.messages import NO_GPU_USED, sentence
from finetune_operator.planning.model import DeleteJob, Observation, Plan, PlannerConfig, StageState
from finetune_operator.planning.nodetime import in_server_time
from finetune_operator.planning.outcome import advice_for
from finetune_operator.planning.release import must_be_held, release
from finetune_operator.planning.story import peak_memory
from finetune_operator.planning.waiting import next_look

BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
REFUSED_PAUSE_SECONDS, LONGEST_REFUSED_PAUSE_SECONDS = 5, 600
_REASON = re.compile(r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")


def plan(obs: Observation, config: PlannerConfig | None = None) -> Plan:
    """What to do about a job, given everything that is known about it."""
    look = Look(replace(obs, pods=in_server_time(obs.pods, obs.now)), config or PlannerConfig())
    if obs.job.deleting:
        return release(look)
    if must_be_held(look):  # one that had finished before the operator knew of finalizers, too
        return Plan(hold_output=True)
    if conditions.is_true(obs.job.status, ConditionType.FINISHED):
        return _finished(look)
    decision = next(d for d in (rule(look) for rule in RULES) if d is not None)
    return finish(look, decision)


def _finished(look: Look) -> Plan:
    """A finished job never changes again; what still runs for it is stopped, and its time to live counted.

    Its time to live may still be edited: the status then says that this was seen, and nothing else.
    """
    leftovers = tuple(DeleteJob(j.name, j.uid) for j in look.obs.jobs if not j.finished and not j.deleting)
    spec = look.obs.job.spec
    ttl = spec.ttl_seconds_after_finished if spec is not None else None
    generation = look.obs.job.generation
    seen = look.before.observed_generation == generation
    status = None if seen else look.before.model_copy(update={"observed_generation": generation, "progress": None})
    if ttl is None:
        return Plan(deletes=leftovers, status=status)
    ended = parse_time(look.before.completion_time) or look.now
    left = ttl - (look.now - ended).total_seconds()
    expired = left <= 0
    return Plan(
        deletes=leftovers,
        delete_self=expired,
        status=None if expired else status,
        requeue_after=None if expired else left,
    )


def invalid_spec(look: Look) -> Decision | None:
    """Fail if the stored spec cannot be read (it passed an older or newer schema)."""
    if look.obs.job.spec is not None:
        return None
    return fail(look, Reason.INVALID_CONFIG, f"the spec cannot be read: {look.obs.job.spec_error}")


def name_conflict(look: Look) -> Decision | None:
    """Fail if a name that this job needs is taken: what belongs to others is never adopted."""
    if look.obs.conflict is None:
        return None
    return fail(look, Reason.NAME_CONFLICT, look.obs.conflict)


def invalid_object(look: Look) -> Decision | None:
    """Fail if the API server's validation refuses what this spec makes of a stage's Job: it will each time."""
    refusal = look.obs.refusal
    if refusal is None or not refusal.for_good:
        return None
    return fail(look, Reason.INVALID_CONFIG, refusal.message)


def succeeded(look: Look) -> Decision | None:
    """Succeed if publish has: its manifest is the last thing written."""
    report = look.publish_report
    if report is None:
        return None
    return _end(look, ConditionType.COMPLETE, "Succeeded", phases.success_message(report))


def planned(look: Look) -> Decision | None:
    """Succeed without training if a plan was all that was asked for, and prepare has made it."""
    if not look.spec.plan_only or not look.prepared:
        return None
    return _end(look, ConditionType.COMPLETE, "Planned", phases.planned_message(look))


def stage_failed(look: Look) -> Decision | None:
    """Fail if the current stage has failed for good."""
    failure = look.view.failure
    return fail(look, failure.reason, failure.message) if look.view.state is StageState.FAILED and failure else None


def too_many_failures(look: Look) -> Decision | None:
    """Fail if executions of the stage failed more often than allowed, also where its Job does not count them: it ignores evicted
    pods and exit code 137, and a new Job has forgotten what the last one counted."""
    found = budget.failures(look.ledger.attempts, look.stage, look.spec)
    limit = look.spec.recovery.max_failures
    if len(found) <= limit:
        return None
    last = found[-1]
    message = sentence(last.message or f"{look.stage} failed")
    if len(found) > 1:
        message += f" {len(found)} executions of {look.stage} have failed; recovery.maxFailures is {limit}."
    return fail(look, last.reason or Reason.UNKNOWN, message)


def got_nowhere(look: Look) -> Decision | None:
    """Fail if one execution after the other was interrupted, and none got any farther."""
    row = budget.fruitless(look.ledger.attempts, look.stage)
    if row < MAX_FRUITLESS:
        return None
    last = budget.ended(look.ledger.attempts, look.stage)[-1]
    words = f"{row} executions of {look.stage} in a row were interrupted, and none got farther than the ones before."
    return fail(look, last.reason or Reason.INTERRUPTED, f"{words} The last: {sentence(last.message or '')}")


def handed_back(look: Look) -> Decision | None:
    """Back to prepare, which waits without a GPU, if training waited for something as long as it may hold one.

    Told first, then the Jobs go: the number of returns is counted from the attempts in status.
    """
    failure = look.handed_back
    if (
        failure is None
        or look.stage is not Stage.TRAIN
        or look.view.state not in (StageState.FAILED, StageState.STOPPING)
    ):
        return None
    count = budget.returns(look.ledger.attempts)
    if count > MAX_RETURNS:
        words = f"{sentence(failure.message)} Training gave its GPU back {count} times in a row and got no farther."
        return fail(look, failure.reason, words)
    text = f"Training gave its GPU back; prepare waits without one. {failure.reason}: {sentence(failure.message)}"
    # (Where status never said that prepare was done, there is nothing to take back: an operator died before it told.)
    recorded = look.attempts_recorded and not conditions.is_true(look.before, ConditionType.PREPARED)
    # What was fetched goes first: as long as the training Job is there, this rule decides.
    jobs = (look.fetch_job, look.views[Stage.TRAIN].job, look.views[Stage.PREPARE].job)
    gone = [j for j in jobs if j is not None]
    wish = Wish(ConditionType.PREPARED, False, failure.reason, text)
    decision = phases.current(
        look, deletes=tuple(DeleteJob(j.name, j.uid) for j in gone if recorded and not j.deleting)
    )
    return replace(decision, message=text, wishes=(*decision.wishes, wish), pressing=not recorded)


def more_memory(look: Look) -> Decision | None:
    """Replace the training Job by one with more memory, if its container was killed for exceeding what it has."""
    job, wanted = look.views[Stage.TRAIN].job, look.wanted_memory
    if job is None or job.deleting or job.complete_at is not None or not job.memory or wanted is None:
        return None
    if parse_quantity(job.memory) >= parse_quantity(wanted):
        return None
    recorded = look.attempts_recorded
    decision = phases.current(look, deletes=(DeleteJob(job.name, job.uid),) if recorded else ())
    text = f"The training Job is created anew with {wanted} instead of {job.memory} of memory."
    return replace(decision, message=text, pressing=not recorded)


def refused_by_nodes(look: Look) -> Decision | None:
    """Make a Job anew that failed because nodes refused its pods: its controller counts them as failures, and they never ran.

    After a pause, as the controller makes between two pods; got_nowhere bounds how often. Who suspends the job does not wait for that.
    """
    job = look.view.job
    if look.view.state is not StageState.FAILED or job is None or job.failed_reason != BACKOFF_LIMIT_EXCEEDED:
        return None
    refused = [p for p in look.view.pods if p.refused]
    if not refused:
        return None
    row = budget.fruitless(look.ledger.attempts, look.stage)
    pause = min(REFUSED_PAUSE_SECONDS * 2**row, LONGEST_REFUSED_PAUSE_SECONDS)
    due = (job.failed_at or look.now) + timedelta(seconds=pause)
    go = look.attempts_recorded and (look.now >= due or look.spec.suspend)
    deletes = (DeleteJob(job.name, job.uid),) if go else ()
    words = pod_failure(refused[-1], look.stage).message
    text = f"{sentence(words[:1].upper() + words[1:])} Its Job is created anew at {rfc3339(due)}."
    decision = phases.current(look, deletes=deletes, requeue_at=due if look.now < due else None)
    return replace(decision, message=text)


def prepare_again(look: Look) -> Decision | None:
    """Run prepare again if a training Job that had run is gone: a CPU pod looks for its result before a GPU is asked for."""
    job = look.views[Stage.PREPARE].job
    if look.stage is not Stage.PREPARE or job is None or job.deleting or job.complete_at is None:
        return None
    if not look.training_vanished or not look.prepare_is_old:
        return None
    return phases.current(look, deletes=(DeleteJob(job.name, job.uid),))


def suspended(look: Look) -> Decision | None:
    """Hold nothing while spec.suspend is true: every Job goes, finished ones too, so that resuming starts at prepare.

    Their executions are written down first: a pod takes with it why it ended, and that it was there at all.
    """
    if not look.spec.suspend:
        return None
    recorded = look.executions_recorded
    deletes = tuple(DeleteJob(j.name, j.uid) for j in look.obs.jobs if recorded and not j.deleting)
    reset = tuple(
        Wish(kind, False, "Suspended", "Found again by prepare when the job resumes.")
        for kind in (ConditionType.PREPARED, ConditionType.TRAINED)
    )
    if not look.idle:
        phase, text = look.before.phase or Phase.PENDING, "Suspending: waits for the pods to stop."
        if look.view.state is StageState.STOPPING and look.wait is not None:
            text += f" {look.wait.reason}: {sentence(look.wait.message)} {advice_for(look.wait.reason, look.stage)}"
        again = next_look(look.obs, look.view, look.config)
        wishes = (phases.not_waiting(look),)
        return Decision(phase, text, wishes, deletes=deletes, requeue_at=again, pressing=not recorded)
    text = "spec.suspend is true: nothing runs and nothing is held."
    return Decision(
        Phase.SUSPENDED,
        text,
        (Wish(ConditionType.SUSPENDED, True, "Suspended", text), *reset, phases.not_waiting(look)),
    )


def deadline_exceeded(look: Look) -> Decision | None:
    """Fail if the job's pods ran longer than they may."""
    limit = look.spec.active_deadline_seconds
    if limit is None or look.active_seconds < limit:
        return None
    return fail(
        look,
        Reason.DEADLINE_EXCEEDED,
        f"the job's pods ran for {exact_duration(look.active_seconds)}; activeDeadlineSeconds is {limit}.",
    )


def waited_too_long(look: Look) -> Decision | None:
    """Fail if one thing has been missing without a break for longer than allowed."""
    if look.wait is None or look.waiting_since is None:
        return None
    waited, limit = look.now - look.waiting_since, look.spec.pending_timeout_seconds
    if waited < timedelta(seconds=limit):
        return None
    advice = advice_for(look.wait.reason, look.stage)
    return fail(
        look,
        Reason.PENDING_TIMEOUT,
        f"waited {exact_duration(waited.total_seconds())} (pendingTimeoutSeconds is {limit}) and still {look.wait.reason}: "
        f"{sentence(look.wait.message)} {advice}",
    )


def repeat_lost_stage(look: Look) -> Decision | None:
    """Run prepare or publish again if its Job is complete and its report is lost: markers in the bucket make that quick.

    The loss is written to status before the Job goes, so that the number of repeats is bounded across restarts.
    """
    view = look.view
    if view.state is not StageState.REPORT_LOST or view.job is None:
        return None
    if lost_reports(look.ledger, view.stage) > look.config.max_repeats:
        message = f"{view.stage} finished {look.config.max_repeats + 1} times, and each time its report was lost."
        return fail(look, Reason.UNKNOWN, message)
    recorded = look.before.attempts == list(look.ledger.attempts)
    return phases.current(look, deletes=(DeleteJob(view.job.name, view.job.uid),) if recorded else ())


def advance(look: Look) -> Decision:
    """Start the current stage if it has no Job; otherwise tell how it goes."""
    state = look.view.state
    if state is StageState.ABSENT:
        refusal = look.obs.refusal
        if refusal is not None and refusal.retry_at > look.now:
            return phases.current(look, requeue_at=refusal.retry_at)
        if look.prepare_told_in_passing:
            return replace(phases.current(look), pressing=True)
        return phases.current(look, create=look.stage, create_snapshot=look.obs.snapshot is None)
    if state is StageState.REPORT_PENDING and look.view.job is not None:
        ended = look.view.job.complete_at or look.view.job.failed_at or look.now
        return phases.current(look, requeue_at=ended + timedelta(seconds=look.config.report_grace_seconds))
    return phases.current(look, requeue_at=next_look(look.obs, look.view, look.config))


def fail(look: Look, reason: str, message: str) -> Decision:
    """The job has failed: what, why and what to do, in one sentence each."""
    reason = str(reason) if _REASON.match(reason) else str(Reason.UNKNOWN)
    parts = [f"{reason}: {sentence(message)}"]
    if reason == Reason.HOST_OUT_OF_MEMORY and look.stage is Stage.TRAIN and (peak := _peak_memory(look)):
        parts.append(peak)
    advice = advice_for(reason, look.stage)
    waited = reason == Reason.PENDING_TIMEOUT  # its message ends with the advice for what was missing
    if advice and advice not in message and not waited:
        parts.append(advice)
    if not look.gpu_held and not look.trained:
        parts.append(NO_GPU_USED)
    return _end(look, ConditionType.FAILED, reason, " ".join(parts))


def _end(look: Look, kind: ConditionType, reason: str, text: str) -> Decision:
    """The last decision about a job: Complete or Failed."""
    return Decision(
        phase=Phase.SUCCEEDED if kind is ConditionType.COMPLETE else Phase.FAILED,
        message=text,
        wishes=(
            Wish(kind, True, reason, text),
            Wish(ConditionType.FINISHED, True, reason, text),
            *phases.milestones(look),
            phases.not_waiting(look),
            *phases.not_suspended(look),
        ),
    )


def _peak_memory(look: Look) -> str:
    """What the training pod had, and the most that it told to hold."""
    last = budget.ended(look.ledger.attempts, Stage.TRAIN)[-1:]
    peak = peak_memory(look.before.progress, last[0].execution_id) if last else ""
    had = (last[0].memory if last else None) or look.wanted_memory
    return f"It had {had or 'no limit of its own'}{peak}." if had or peak else ""


Rule = Callable[[Look], Decision | None]

RULES: tuple[Rule, ...] = (
    invalid_spec,
    name_conflict,
    invalid_object,
    succeeded,
    planned,
    too_many_failures,
    got_nowhere,
    handed_back,
    more_memory,
    refused_by_nodes,
    stage_failed,
    suspended,
    deadline_exceeded,
    waited_too_long,
    prepare_again,
    repeat_lost_stage,
    fetch_while_queued,
    advance,
)
