"""Why one execution ended: by itself, or because something outside took its pod."""

from __future__ import annotations

from finetune_api.failures import FAILURES, Consequence, Reason, by_exit_code
from finetune_api.names import Stage
from finetune_operator.planning.model import OOM_KILLED, Pod, StageFailure, StageView

_ROOM = {
    "PreemptionByScheduler": "made room for a pod of higher priority",
    "EvictionByEvictionAPI": "node drained",
    "DeletionByTaintManager": "node tainted",
}
_KUBELET_MAKES_ROOM = ("Terminated", "NodeShutdown", "Preempting", "Shutdown")
"""status.reason of pods that a kubelet stops for no fault of theirs: its node shuts down, a critical pod needs the place."""


_FORMER = {"PodGone": Reason.INTERRUPTED}
"""What earlier versions wrote into attempts, and what it is called now."""


def consequence_of(reason: str | None) -> Consequence:
    """What follows from a reason; one that is not in the table is as good as Unknown."""
    try:
        return FAILURES[_FORMER.get(reason or "") or Reason(reason or "")].consequence
    except ValueError:
        return FAILURES[Reason.UNKNOWN].consequence


def replaced(reason: str | None) -> bool:
    """Whether an execution ended through no fault of its own."""
    return reason in (Reason.NODE_LOST, Reason.UNSCHEDULABLE) or consequence_of(reason) is Consequence.REPLACE


def pod_failure(pod: Pod, stage: Stage) -> StageFailure:
    """Why one pod failed."""
    if pod.refused:
        words = (pod.pod_message or pod.pod_reason).strip()
        return StageFailure(Reason.UNSCHEDULABLE, f"node {pod.node} refused the pod ({pod.pod_reason}: {words})")
    told = pod.report if pod.report is not None and not pod.report.succeeded else None
    if told is None and pod.terminated_reason == OOM_KILLED:
        return StageFailure(
            Reason.HOST_OUT_OF_MEMORY,
            f"the {stage} container of pod {pod.name} used more memory than its limit and was killed.",
        )
    outside = _from_outside(pod)
    # What dies while its node is drained may die of anything; only what repeating cannot help is the pod's own.
    if outside is not None and (told is None or consequence_of(told.reason) is not Consequence.FAIL):
        return outside
    if told is not None:
        return StageFailure(told.reason, told.message)
    if pod.exit_code is None:
        why = pod.pod_message or pod.pod_reason or "its node did not report how"
        return StageFailure(Reason.UNKNOWN, f"pod {pod.name} ended: {why.strip()}.")
    failure = by_exit_code(pod.exit_code)
    words = f" ({pod.raw_message.strip()[:512]})" if pod.raw_message.strip() else ""
    if failure.reason is Reason.UNKNOWN:
        return StageFailure(
            failure.reason, f"the {stage} container of pod {pod.name} ended with exit code {pod.exit_code}{words}."
        )
    return StageFailure(failure.reason, f"{failure.meaning}{words}")


def _from_outside(pod: Pod) -> StageFailure | None:
    """What a kubelet, a scheduler or a controller did to a pod."""
    by_kubelet = pod.disruption == "TerminationByKubelet" and pod.pod_reason not in _KUBELET_MAKES_ROOM
    if by_kubelet or (not pod.disruption and pod.pod_reason == "Evicted"):
        words = (pod.pod_message or pod.disrupted).strip()
        return StageFailure(Reason.EVICTED, f"pod {pod.name} was evicted: {words}")
    # A tainted node that still answers tells how its pod ended; one that is unreachable, which is a taint too, never does.
    silent = pod.disruption == "DeletionByTaintManager" and pod.started_at is not None and pod.exit_code is None
    if pod.pod_reason == "NodeLost" or pod.disruption == "DeletionByPodGC" or silent:
        return StageFailure(Reason.NODE_LOST, _words("node lost", pod))
    if pod.disruption or pod.disrupted or pod.pod_reason in _KUBELET_MAKES_ROOM:
        return StageFailure(Reason.PREEMPTED, _words(_ROOM.get(pod.disruption, "disrupted"), pod))
    return None


def _words(what: str, pod: Pod) -> str:
    told = (pod.disrupted or pod.pod_message).strip().rstrip(".")
    return f"{what} ({told})" if told else what


def in_context(failure: StageFailure, view: StageView) -> StageFailure:
    """A pod does not know why it was told to stop; where its Job is suspended, the queue wanted its place."""
    suspended = view.job is not None and view.job.suspended
    if failure.reason == Reason.INTERRUPTED and suspended:
        return StageFailure(Reason.PREEMPTED, "the queue took its place back")
    return failure


def vanished(view: StageView) -> StageFailure:
    """Why a pod is gone that was never seen to end (a pod that suspension deletes takes its status with it)."""
    if view.failure is not None:
        return view.failure
    return in_context(StageFailure(Reason.INTERRUPTED, "the pod was deleted before its end was seen"), view)
