"""Phase, message and conditions of a job on its way."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_api.names import Stage
from finetune_api.results import PublishReport
from finetune_api.spec import MethodType
from finetune_api.status import ConditionType, Phase
from finetune_operator.planning.clock import rfc3339
from finetune_operator.planning.conditions import Wish, find, is_true
from finetune_operator.planning.decision import Decision
from finetune_operator.planning.look import Look
from finetune_operator.planning.messages import plan_status, queued_message, sentence
from finetune_operator.planning.model import DeleteJob, StageState
from finetune_operator.planning.outcome import advice_for
from finetune_operator.planning.risk import checkpoint_at_risk
from finetune_operator.planning.story import last_restart, saved_step


def current(
    look: Look,
    *,
    create: Stage | None = None,
    create_snapshot: bool = False,
    deletes: tuple[DeleteJob, ...] = (),
    requeue_at: datetime | None = None,
) -> Decision:
    """The decision that tells how the current stage goes."""
    phase, message = _phase(look)
    wishes = [*milestones(look), *not_suspended(look)]
    if look.wait is not None and look.waiting_since is not None:
        # Times and no durations: a text that changes by the second would be written by the second.
        limit = look.spec.pending_timeout_seconds
        until = rfc3339(look.waiting_since + timedelta(seconds=limit))
        text = (
            f"{sentence(look.wait.message)} Since {rfc3339(look.waiting_since)}, and the job fails if it still is so at {until} "
            f"(pendingTimeoutSeconds is {limit}). {advice_for(look.wait.reason, look.stage)}"
        ).strip()
        wishes.append(Wish(ConditionType.WAITING, True, look.wait.reason, text))
        message = f"Waiting: {look.wait.reason}: {text}"
    else:
        wishes.append(not_waiting(look))
    return Decision(phase, message, tuple(wishes), create, create_snapshot, deletes, requeue_at)


def milestones(look: Look) -> list[Wish]:
    """Prepared and Trained, as far as they are behind us; a milestone once told keeps its words."""
    wishes = []
    was_prepared = is_true(look.before, ConditionType.PREPARED)
    if not look.prepared and was_prepared:
        text = (
            "The training Job is gone after it had run: prepare looks for its result before a GPU is asked for again."
        )
        wishes.append(Wish(ConditionType.PREPARED, False, "TrainingJobGone", text))
    if look.prepared and not was_prepared and _proven(look):
        wishes.append(Wish(ConditionType.PREPARED, True, "Prepared", _prepared_message(look)))
    if look.trained and not is_true(look.before, ConditionType.TRAINED):
        reason = "AlreadyTrained" if look.train_unneeded else "Trained"
        wishes.append(Wish(ConditionType.TRAINED, True, reason, _trained_message(look)))
    return [*wishes, *checkpoint_at_risk(look)]


def _proven(look: Look) -> bool:
    """A training Job proves that prepare was done, but not one that goes: prepare may have to run again after it."""
    job = look.views[Stage.TRAIN].job
    if look.trained or job is None:
        return look.trained or not look.views[Stage.TRAIN].occupied
    return not job.deleting and look.handed_back is None


def not_waiting(look: Look) -> Wish:
    """Nothing is missing (any more); the words are those of the first time, so that nothing flaps."""
    old = find(look.before, ConditionType.WAITING)
    if old is not None and old.status == "False":
        return Wish(ConditionType.WAITING, False, old.reason, old.message)
    return Wish(ConditionType.WAITING, False, "NothingMissing", "Nothing is missing.")


def not_suspended(look: Look) -> list[Wish]:
    """Suspended ends."""
    if not is_true(look.before, ConditionType.SUSPENDED):
        return []
    text = "Runs again, from prepare on."
    if look.training_began:
        step = saved_step(look.ledger.attempts)
        text += (
            f" Training goes on from the checkpoint of step {step}."
            if step
            else " No checkpoint is known of: training begins anew."
        )
    return [Wish(ConditionType.SUSPENDED, False, "Resumed", text)]


def success_message(report: PublishReport) -> str:
    """How it ended well."""
    metrics = report.metrics
    full = report.model_bytes is not None
    what = "Trained weights" if full else "Adapter"
    text = (
        f"{what} verified from the bucket: held-out loss {metrics.held_out_loss:.3f} reproduced "
        f"(base model {metrics.held_out_loss_base:.3f})."
    )
    if report.merge_check is not None:
        agrees = (
            "Published model agrees with the trained weights" if full else "Merged model agrees with base + adapter"
        )
        text += f" {agrees} within {report.merge_check.relative_difference:.1%}."
    return text


def planned_message(look: Look) -> str:
    """What a job with ``planOnly`` found out."""
    report = look.prepare_report
    if report is not None:
        memory = report.plan.summary if report.plan is not None else ""
    else:
        memory = (look.before.plan.memory if look.before.plan is not None else "") or ""
    told = sentence(memory) or "The memory of a GPU was not planned: see the plan in status for the rest."
    return f"Nothing was trained, as spec.planOnly asks for a plan alone. {told}"


def _phase(look: Look) -> tuple[Phase, str]:
    state = look.view.state
    if state is StageState.STOPPING:
        return _stage_phase(look.stage, look), "Waits for earlier pods to stop."
    if state is StageState.ABSENT:
        # Prepare's Job does not exist yet: Pending. Between two stages the earlier phase stays for a moment.
        phase = Phase.PENDING if look.stage is Stage.PREPARE else look.before.phase or Phase.PENDING
        if phase in (Phase.SUSPENDED, Phase.SUCCEEDED, Phase.FAILED):
            phase = Phase.PENDING
        again = " again: looks for a result of training before a GPU is asked for" if look.training_vanished else ""
        return phase, f"Starts {look.stage}{again if look.stage is Stage.PREPARE else ''}."
    if state is StageState.QUEUED:
        queue = look.view.job.queue if look.view.job else ""
        waits = queued_message(look.spec, look.obs.job.gpus_per_node, look.stage, queue, admitted=False)
        return Phase.QUEUED, f"{waits}{_fetched_meanwhile(look)}"
    return _stage_phase(look.stage, look), _stage_message(look)


def _fetched_meanwhile(look: Look) -> str:
    """What becomes of the base model while training is queued; with a leading blank."""
    job = look.fetch_job if look.stage is Stage.TRAIN else None
    if job is None:
        return ""
    if job.complete_at is not None:
        return " The base model was fetched meanwhile."
    if job.failed_at is not None:
        return f" The base model could not be fetched meanwhile (Job {job.name}): training will try to."
    return " The base model is fetched meanwhile."


def _stage_phase(stage: Stage, look: Look) -> Phase:
    if stage is Stage.PREPARE:
        return Phase.PREPARING
    if stage is Stage.PUBLISH:
        return Phase.PUBLISHING
    if look.view.state is StageState.REPORT_PENDING or any(p.running for p in look.view.pods) or _done(look):
        return Phase.TRAINING
    return Phase.QUEUED


def _done(look: Look) -> bool:
    """Whether the newest pod succeeded: its Job says so some seconds later, and nothing is queued meanwhile."""
    return bool(look.view.pods) and look.view.pods[-1].exit_code == 0


def _stage_message(look: Look) -> str:
    if look.stage is Stage.PREPARE:
        return "Checks model, data and output on a CPU, before any GPU is asked for."
    if look.stage is Stage.PUBLISH:
        if look.spec.method.type is MethodType.FULL:
            return "Writes the model, checks and publishes it on a CPU."
        merged = look.spec.output.merged.enabled
        return "Checks, merges and publishes on a CPU." if merged else "Checks and publishes on a CPU."
    if _done(look):
        return "The training pod is done."
    running = [p for p in look.view.pods if p.running]
    if not running:
        return queued_message(look.spec, look.obs.job.gpus_per_node, look.stage, "", admitted=True)
    attempts = [a for a in look.ledger.attempts if a.stage == Stage.TRAIN and a.pod]
    healed = last_restart(look.before.progress, running[-1].uid)
    return f"Trains on node {running[-1].node or 'unknown'}, attempt {max(1, len(attempts))}.{healed}"


def _prepared_message(look: Look) -> str:
    report = look.prepare_report
    if report is None:
        return "Model and data were checked and prepared."
    job = look.views[Stage.PREPARE].job
    took = ""
    if job is not None and job.complete_at is not None:
        took = f" in {int((job.complete_at - job.created).total_seconds())} s"
    record = look.obs.snapshot
    plan = ""
    if record is not None:
        told = plan_status(record.snapshot, report)
        plan = (
            f"; plan: {told.method}, {report.total_steps:,} steps, "
            f"micro-batch {told.micro_batch_sequences} × accumulation {told.gradient_accumulation_steps}"
        )
    return f"{report.data.rows:,} rows checked{took}{plan}."


def _trained_message(look: Look) -> str:
    if look.train_unneeded:
        return "A complete training result of this very run was found in the bucket: no GPU is asked for again."
    report = look.train_report
    if report is None:
        return "Training is complete."
    metrics = report.metrics
    return f"{metrics.steps:,} steps, held-out loss {metrics.held_out_loss_base:.3f} → {metrics.held_out_loss:.3f}."
