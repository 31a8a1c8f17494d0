"""What the current stage waits for, seen from outside its containers or told by them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_operator.planning.messages import gpu_request
from finetune_operator.planning.model import Observation, PlannerConfig, Pod, StageState, StageView

_IMAGE_REASONS = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError"}


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
    if view.state not in (StageState.STARTING, StageState.RUNNING):
        return None
    for pod in view.pods:
        if pod.ended or pod.deleting:
            continue
        wait = _pod_wait(obs, pod, view.stage, config)
        if wait is not None:
            return wait
    return None


def _pod_wait(obs: Observation, pod: Pod, stage: Stage, config: PlannerConfig) -> Wait | None:
    if pod.running:
        return _told_wait(obs, pod)
    if pod.unschedulable:
        since = pod.unschedulable_since
        if "persistentvolumeclaim" in pod.unschedulable.lower():
            return Wait(Reason.VOLUME_UNAVAILABLE, f"pod {pod.name}: {pod.unschedulable}", since)
        asked = gpu_request(obs.job.spec) if stage is Stage.TRAIN and obs.job.spec else ""
        what = f"no node has room for {asked or 'the pod'}"
        return Wait(Reason.UNSCHEDULABLE, f"{what}: {pod.unschedulable}", since)
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


def _told_wait(obs: Observation, pod: Pod) -> Wait | None:
    """What the running container itself posted."""
    progress = obs.job.status.progress
    if progress is None or progress.execution_id != pod.uid or not progress.waiting_reason:
        return None
    return Wait(progress.waiting_reason, progress.waiting_message or "")


def next_look(obs: Observation, view: StageView, config: PlannerConfig) -> datetime | None:
    """When a wait may begin without any event telling so."""
    times = [
        p.sandbox_missing_since + timedelta(seconds=config.volume_grace_seconds)
        for p in view.pods
        if p.sandbox_missing_since is not None and not p.ended and not p.deleting
    ]
    future = [t for t in times if t > obs.now]
    return min(future, default=None)
