"""A FineTuneJob with output.deletionPolicy: Delete: held from its first moment, let go when its artifacts are deleted."""

from __future__ import annotations

from datetime import timedelta

from finetune_api.names import Stage
from finetune_api.snapshot import output_location, workspace_location
from finetune_api.spec import DeletionPolicy
from finetune_operator.planning.endings import pod_failure
from finetune_operator.planning.look import Look
from finetune_operator.planning.messages import sentence
from finetune_operator.planning.model import DeleteJob, EventNote, EventType, Plan, StageJob


def must_be_held(look: Look) -> bool:
    """Whether the finalizer is missing: it comes before anything that could leave something behind."""
    spec = look.obs.job.spec
    return spec is not None and spec.output.deletion_policy is DeletionPolicy.DELETE and not look.obs.job.holds_output


def release(look: Look) -> Plan:
    """What to do about a FineTuneJob that is being deleted: stop its pods, delete its artifacts, let it go.

    Each step follows from what is there, and each wait is bounded: an object that cannot be deleted holds its namespace, too.
    """
    job, spec = look.obs.job, look.obs.job.spec
    if not job.holds_output:
        return Plan()  # the garbage collector removes what it owns
    if spec is None:
        return _let_go(look, "its spec cannot be read")
    if spec.output.deletion_policy is not DeletionPolicy.DELETE:
        return Plan(hold_output=False)
    cleanup = next((j for j in look.obs.jobs if j.stage is Stage.CLEANUP), None)
    if cleanup is not None:
        return _finish(look, cleanup)
    refusal = look.obs.refusal
    if refusal is not None and refusal.terminating:
        return _let_go(look, "its namespace is being deleted, so nothing can be created that would delete them")
    if look.obs.conflict is not None:
        return _let_go(look, look.obs.conflict)
    limit = timedelta(seconds=spec.pending_timeout_seconds)
    due = (job.deleted_at or look.now) + limit
    live = [j for j in look.obs.jobs if not j.finished or j.deleting]
    deletes = tuple(DeleteJob(j.name, j.uid) for j in live if not j.deleting)
    if deletes:
        return Plan(deletes=deletes)
    stopping = bool(live) or any(not p.ended for p in look.obs.pods)
    if look.now >= due:
        why = "its pods do not stop" if stopping else f"{refusal.message if refusal else 'no pod could be created'}"
        return _let_go(look, f"{sentence(why)[:-1]} (waited for pendingTimeoutSeconds, {spec.pending_timeout_seconds})")
    wait = (due - look.now).total_seconds()
    if stopping:
        return Plan(requeue_after=wait)
    if refusal is not None and refusal.retry_at > look.now:
        return Plan(requeue_after=min(wait, (refusal.retry_at - look.now).total_seconds() + 0.05))
    return Plan(create_cleanup=True)


def _finish(look: Look, cleanup: StageJob) -> Plan:
    if cleanup.complete_at is not None:
        note = EventNote(EventType.NORMAL, "OutputDeleted", f"everything below {_places(look)} is deleted")
        return Plan(hold_output=False, events=(note,))
    if cleanup.failed_at is not None:
        pods = sorted((p for p in look.obs.pods if p.owner_uid == cleanup.uid and p.ended), key=lambda p: p.created)
        found = pod_failure(pods[-1], Stage.CLEANUP) if pods else None
        why = f"{found.reason}: {found.message}" if found else cleanup.failed_message or cleanup.failed_reason
        return _let_go(look, f"Job {cleanup.name} failed: {why}")
    # Its own deadline does not run while a queue holds it back.
    limit = timedelta(seconds=2 * look.spec.pending_timeout_seconds)
    due = (look.obs.job.deleted_at or look.now) + limit
    if look.now >= due:
        return _let_go(look, f"Job {cleanup.name} did not end within {limit.total_seconds():.0f} s")
    return Plan(requeue_after=(due - look.now).total_seconds())


def _let_go(look: Look, why: str) -> Plan:
    text = f"The artifacts below {_places(look)} are left behind: {sentence(why)} Delete them by hand."
    return Plan(hold_output=False, events=(EventNote(EventType.WARNING, "OutputLeft", text),))


def _places(look: Look) -> str:
    job = look.obs.job
    if job.spec is None:
        artifacts = job.status.artifacts
        return artifacts.uri if artifacts is not None else "its output"
    output = str(output_location(job.spec, job.name, job.uid))
    workspace = str(workspace_location(job.spec, job.name, job.uid))
    return output if workspace.startswith(f"{output}/") else f"{output} and {workspace}"
