"""From a rule's decision to a whole Plan: the status as it should read, and how urgent that is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.names import PIPELINE, Stage, snapshot_name
from finetune_api.status import (
    ArtifactsStatus,
    AttemptStatus,
    ConditionType,
    FineTuneJobStatus,
    Phase,
    SnapshotStatus,
    StageTimes,
)
from finetune_api.uris import display_name
from finetune_operator.planning.clock import rfc3339
from finetune_operator.planning.conditions import Wish, apply_wishes, find
from finetune_operator.planning.gpu_time import count_held
from finetune_operator.planning.look import Look
from finetune_operator.planning.messages import data_status, gpu_time_status, metrics_status, plan_status, with_split
from finetune_operator.planning.model import AS_ASKED, Allotment, DeleteJob, Plan, Urgency
from finetune_operator.planning.stock import with_stock
from finetune_operator.planning.story import recoveries
from finetune_operator.planning.transitions import notes


@dataclass(frozen=True)
class Decision:
    """What a rule wants."""

    phase: Phase
    message: str
    wishes: tuple[Wish, ...] = ()
    create: Stage | None = None
    create_snapshot: bool = False
    deletes: tuple[DeleteJob, ...] = ()
    requeue_at: datetime | None = None
    pressing: bool = False
    """Something waits for the status to be written."""


def finish(look: Look, decision: Decision) -> Plan:
    """The plan that carries a decision out."""
    before = look.before.model_copy(update={"progress": None})
    after = _status(look, decision)
    changed = after != before
    return Plan(
        create_snapshot=decision.create_snapshot,
        create_job=decision.create,
        allotment=_allotment(look, after) if decision.create is Stage.TRAIN else AS_ASKED,
        deletes=decision.deletes,
        status=after if changed else None,
        urgency=Urgency.LATER if not changed else Urgency.NOW if decision.pressing else _urgency(before, after),
        events=notes(before, after) if changed else (),
        requeue_after=_requeue(look, decision),
    )


def _allotment(look: Look, status: FineTuneJobStatus) -> Allotment:
    planned = status.plan
    if planned is None:
        return Allotment(memory=look.wanted_memory)
    return Allotment(
        memory=look.wanted_memory,
        gpus_per_node=planned.gpus_per_node,
        avoid_gpus=tuple(planned.unsuitable_gpu_products or ()),
    )


def _status(look: Look, decision: Decision) -> FineTuneJobStatus:
    before, obs = look.before, look.obs
    wishes = list(decision.wishes)
    waiting = next((w for w in wishes if w.type is ConditionType.WAITING), None)
    finished = decision.phase in (Phase.SUCCEEDED, Phase.FAILED)
    spec = obs.job.spec
    since = look.ledger.running_since
    started = [j.created for j in obs.jobs]
    return before.model_copy(
        update={
            "phase": decision.phase,
            "observed_generation": obs.job.generation,
            "message": decision.message,
            "model_name": before.model_name or (display_name(spec.model.uri) if spec else None),
            "conditions": apply_wishes(before, wishes, obs.job.generation, obs.now),
            "start_time": before.start_time or (rfc3339(min(started)) if started else None),
            "completion_time": before.completion_time or (rfc3339(obs.now) if finished else None),
            "active_seconds": (int(look.active_seconds) if finished else look.ledger.active_seconds)
            or before.active_seconds,
            "running_since": rfc3339(since) if since and not finished else None,
            "waiting_since": rfc3339(look.waiting_since) if waiting and waiting.true and look.waiting_since else None,
            "gpu_held": look.gpu_held or None,
            "stages": _stages(look),
            "attempts": _attempts(look, decision),
            "recoveries": recoveries(look),
            **_facts(look),
            **_gpu_time(look, finished),
            "progress": None,
        }
    )


def _gpu_time(look: Look, finished: bool) -> dict[str, object]:
    """Counted as pods end, each once; a finished job's last may still run for a moment."""
    before, obs, gpus = look.before.gpu_time, look.obs, look.obs.job.gpus_per_node
    if gpus == 0:
        return {}
    counted = count_held(look.before, obs.pods, obs.gone, look.now, finished)
    facts: dict[str, object] = {"gpu_holders": list(counted.holders)}
    held = (before.held_seconds if before else 0) + (gpus or 0) * counted.seconds
    if not held:
        return facts
    known = before.training_seconds if before else None
    ranks = (gpus or 0) * (obs.job.spec.compute.nodes if obs.job.spec is not None else 1)
    trained = round(ranks * look.metrics.train_seconds) if look.metrics is not None else known
    return {**facts, "gpu_time": gpu_time_status(held, trained)}


def _attempts(look: Look, decision: Decision) -> list[AttemptStatus]:
    """A finished job has no running attempt: what still ran when it failed was stopped then, and one that is not known to have ended
    when all is done has ended well, as its Job says before its pod's last event has come."""
    if decision.phase is Phase.SUCCEEDED:
        return [_ended_well(a, look) if a.outcome == "Running" else a for a in look.ledger.attempts]
    if decision.phase is not Phase.FAILED:
        return list(look.ledger.attempts)
    reason = next((w.reason for w in decision.wishes if w.type is ConditionType.FAILED), None)
    end = {"outcome": "Failed", "finished_at": rfc3339(look.now), "reason": reason}
    return [a.model_copy(update=end) if a.outcome == "Running" else a for a in look.ledger.attempts]


def _ended_well(attempt: AttemptStatus, look: Look) -> AttemptStatus:
    job = look.views[Stage(attempt.stage)].job if attempt.stage in PIPELINE else None
    ended = job.complete_at if job is not None and job.complete_at is not None else look.now
    return attempt.model_copy(update={"outcome": "Succeeded", "finished_at": rfc3339(ended)})


def _stages(look: Look) -> list[StageTimes]:
    known = {s.stage: s for s in look.before.stages}
    for stage, view in look.views.items():
        if view.job is not None:
            ended = view.job.complete_at or view.job.failed_at
            known[stage.value] = StageTimes(
                stage=stage.value, started_at=rfc3339(view.job.created), finished_at=rfc3339(ended) if ended else None
            )
    return [known[s.value] for s in PIPELINE if s.value in known]


def _facts(look: Look) -> dict[str, object]:
    """Plan, data, metrics, artifacts and snapshot: once known they stay."""
    before, record = look.before, look.obs.snapshot
    facts: dict[str, object] = {}
    split = before.progress.split if before.progress is not None else None
    plan, report = before.plan, look.prepare_report
    if record is not None and (report is not None or plan is None):
        plan = plan_status(record.snapshot, report)
    if plan is not None:
        plan = with_stock(plan, before.plan, look.obs)
        facts["plan"] = with_split(plan, split) if split is not None else plan
    if record is None:
        return facts
    snapshot = record.snapshot
    if report is not None:
        facts["data"] = data_status(report, snapshot.spec.training.max_sequence_tokens)
    old = before.snapshot
    facts["snapshot"] = SnapshotStatus(
        hash=record.digest,
        config_map=snapshot_name(look.obs.job.name, look.obs.job.uid),
        images={"prepare": snapshot.images.prepare, "train": snapshot.images.train},
        model_commit=report.model_commit if report else (old.model_commit if old else None),
        data_hash=report.data_hash if report else (old.data_hash if old else None),
    )
    published = look.publish_report
    if look.metrics is not None:
        facts["metrics"] = metrics_status(look.metrics, published)
    uri = str(snapshot.output)
    if published is not None:
        merged = published.merged_bytes
        facts["artifacts"] = ArtifactsStatus(
            uri=uri,
            manifest_uri=f"{uri}/manifest.json",
            adapter_uri=f"{uri}/adapter" if published.model_bytes is None else None,
            adapter_bytes=published.adapter_bytes or None,
            merged_uri=f"{uri}/merged" if merged is not None else None,
            merged_bytes=merged,
            model_uri=f"{uri}/model" if published.model_bytes is not None else None,
            model_bytes=published.model_bytes,
            reports_uri=f"{uri}/reports",
        )
    return facts


def _urgency(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Urgency:
    if before.phase is None:
        return Urgency.NOW
    for kind in (ConditionType.FINISHED, ConditionType.WAITING, ConditionType.SUSPENDED):
        old, new = find(before, kind), find(after, kind)
        if (old and (old.status, old.reason)) != (new and (new.status, new.reason)):
            return Urgency.NOW
    lost_before = {a.execution_id for a in before.attempts if a.reason == "ReportLost"}
    if any(a.reason == "ReportLost" and a.execution_id not in lost_before for a in after.attempts):
        return Urgency.NOW
    milestones = (ConditionType.PREPARED, ConditionType.TRAINED)
    if before.phase != after.phase or any(find(before, k) != find(after, k) for k in milestones):
        return Urgency.SOON
    return Urgency.LATER


def _requeue(look: Look, decision: Decision) -> float | None:
    """Seconds until time alone changes the decision."""
    if decision.phase in (Phase.SUCCEEDED, Phase.FAILED):
        # The status that says so comes back as an event; then the time to live is counted.
        return None
    moments = [decision.requeue_at] if decision.requeue_at else []
    spec = look.obs.job.spec
    if spec is not None and not spec.suspend:
        if look.waiting_since is not None:
            moments.append(look.waiting_since + timedelta(seconds=spec.pending_timeout_seconds))
        if spec.active_deadline_seconds is not None and look.ledger.running_since is not None:
            left = spec.active_deadline_seconds - look.active_seconds
            moments.append(look.now + timedelta(seconds=left))
    # Kubernetes' times are whole seconds: a moment early would look once too often.
    return max(0.05, (min(moments) - look.now).total_seconds() + 0.05) if moments else None
