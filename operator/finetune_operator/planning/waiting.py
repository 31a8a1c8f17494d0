"""What the current stage waits for, seen from outside its containers or told by them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_operator.planning.clock import rfc3339
from finetune_operator.planning.messages import gpu_request, sentence
from finetune_operator.planning.model import Observation, PlannerConfig, Pod, StageJob, StageState, StageView
from finetune_operator.planning.stock import free_words, suitable

_IMAGE_REASONS = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError"}
_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 10, 600
"""The Job controller's pause before it replaces a failed pod: doubled with each failure, up to ten minutes."""


@dataclass(frozen=True)
class Wait:
    """One thing that is missing."""

    reason: str
    message: str
    since: datetime | None = None
    """Known only where the cluster tells it."""


def find_wait(obs: Observation, view: StageView, config: PlannerConfig) -> Wait | None:
    """The first thing that keeps a stage from working, or None."""
    if obs.refusal is not None and view.state is StageState.ABSENT:
        return Wait(Reason.ADMISSION_REFUSED, obs.refusal.message)
    if view.state not in (StageState.STARTING, StageState.RUNNING, StageState.STOPPING):
        return None
    pods = (*view.pods, *view.peers)
    for pod in pods:
        if not pod.ended and (lost_at := _lost_at(pod, config)) is not None and obs.now >= lost_at:
            return _node_wait(pod, view)
    if view.state is StageState.STOPPING:
        return None
    for pod in pods:
        if pod.ended or pod.deleting:
            continue
        wait = _pod_wait(obs, pod, view.stage, config)
        if wait is not None:
            return wait
    job = podless(obs, config)
    return _podless_wait(obs, job, view) if job is not None and job == view.job else None


def _lost_at(pod: Pod, config: PlannerConfig) -> datetime | None:
    """When a deleted pod that has not ended is taken for lost with its node."""
    if pod.deletion_due is None or not pod.node:
        return None
    return pod.deletion_due + timedelta(seconds=config.node_grace_seconds)


def _node_wait(pod: Pod, view: StageView) -> Wait:
    """No pod replaces one that may still write."""
    assert pod.deletion_due is not None
    return Wait(
        Reason.NODE_LOST,
        f"the {view.stage} pod {pod.name} should have stopped by {rfc3339(pod.deletion_due)}, and node {pod.node} does not "
        "confirm it; another pod starts only after it",
        pod.deletion_due,
    )


def podless(obs: Observation, config: PlannerConfig) -> StageJob | None:
    """The Job that should long have a pod and has none: quota, policy or a missing service account refuse them."""
    grace = timedelta(seconds=config.pod_grace_seconds)
    # Nothing waits for what is fetched beside a queued Job.
    jobs = [j for j in obs.jobs if j.stage is not Stage.FETCH]
    return next((j for j in jobs if (due := _pod_due(j, obs.pods)) is not None and obs.now >= due + grace), None)


def _pod_due(job: StageJob, pods: tuple[Pod, ...]) -> datetime | None:
    """Since when a Job should have a pod; None while it has one or needs none."""
    if job.finished or job.suspended or job.deleting or job.active:
        return None
    mine = [p for p in pods if p.owner_uid == job.uid]
    if any(not p.ended or p.phase == "Succeeded" or p.exit_code == 0 for p in mine):
        return None
    due = max(job.created, job.started_at or job.created)
    if mine:
        pause = min(_BACKOFF_SECONDS * 2 ** (len(mine) - 1), _LONGEST_BACKOFF_SECONDS)
        due = max(due, max(p.finished_at or p.created for p in mine) + timedelta(seconds=pause))
    return due


def _podless_wait(obs: Observation, job: StageJob, view: StageView) -> Wait:
    describe = f"kubectl describe job {job.name} -n {obs.job.namespace}"
    words = f": {obs.pod_refusal}" if obs.pod_refusal else f" ({describe} shows what stands in the way)"
    return Wait(
        Reason.ADMISSION_REFUSED, f"the {view.stage} pod cannot be created{words}", _pod_due(job, obs.pods) or obs.now
    )


def _pod_wait(obs: Observation, pod: Pod, stage: Stage, config: PlannerConfig) -> Wait | None:
    if pod.running:
        return _told_wait(obs, pod)
    if pod.unschedulable:
        since = pod.unschedulable_since
        if "persistentvolumeclaim" in pod.unschedulable.lower():
            return Wait(Reason.VOLUME_UNAVAILABLE, f"pod {pod.name}: {pod.unschedulable}", since)
        spec = obs.job.spec
        asked = gpu_request(spec, obs.job.gpus_per_node) if stage is Stage.TRAIN and spec is not None else ""
        what = f"no node has room for {asked or 'the pod'}"
        free = _free(obs) if stage is Stage.TRAIN else ""
        words = f"{sentence(pod.unschedulable)} {free}" if free else pod.unschedulable
        return Wait(Reason.UNSCHEDULABLE, f"{what}: {words}", since)
    if pod.waiting_reason in _IMAGE_REASONS:
        return Wait(
            Reason.IMAGE_UNAVAILABLE, f"{pod.waiting_reason}: {pod.waiting_message or 'the image cannot be pulled'}"
        )
    if pod.waiting_reason in _CONFIG_REASONS:
        return Wait(
            Reason.VOLUME_UNAVAILABLE,
            f"{pod.waiting_reason}: {pod.waiting_message or 'the container cannot be created'}",
        )
    missing_since = pod.sandbox_missing_since
    if missing_since is not None and obs.now - missing_since >= timedelta(seconds=config.volume_grace_seconds):
        return Wait(
            Reason.VOLUME_UNAVAILABLE,
            f"pod {pod.name} on node {pod.node} cannot start: its volumes or network are not ready"
            " (kubectl describe pod shows the node's words)",
            missing_since,
        )
    return None


def _free(obs: Observation) -> str:
    """What is free of what a training pod may use, as far as that was looked at."""
    plan = obs.job.status.plan
    if obs.stock is None or plan is None:
        return ""
    return f"GPUs when last looked at: {free_words(suitable(obs.stock, plan))}"


def _told_wait(obs: Observation, pod: Pod) -> Wait | None:
    """What the running container itself posted."""
    progress = obs.job.status.progress
    if progress is None or progress.execution_id != pod.uid or not progress.waiting_reason:
        return None
    return Wait(progress.waiting_reason, progress.waiting_message or "")


def next_look(obs: Observation, view: StageView, config: PlannerConfig) -> datetime | None:
    """When a wait may begin without any event telling so."""
    pods = (*view.pods, *view.peers)
    times = [
        p.sandbox_missing_since + timedelta(seconds=config.volume_grace_seconds)
        for p in pods
        if p.sandbox_missing_since is not None and not p.ended and not p.deleting
    ]
    due = _pod_due(view.job, obs.pods) if view.job is not None else None
    if due is not None:
        times.append(due + timedelta(seconds=config.pod_grace_seconds))
    times += [t for p in pods if not p.ended and (t := _lost_at(p, config)) is not None]
    future = [t for t in times if t > obs.now]
    return min(future, default=None)
