"""Pod statuses as a kubelet writes them, as pure functions of pod, step and time."""

from typing import Any

from finetune_cluster.steps import Evicted, Pod, Running, Terminated, Unschedulable, Waiting

Status = dict[str, Any]


def status_after(
    pod: Pod, step: Unschedulable | Waiting | Running | Terminated | Evicted, now: str, addresses: tuple[str, str]
) -> Status:
    """The pod's status after ``step``; ``addresses`` are the node's and the pod's."""
    old: Status = pod.get("status", {})
    if isinstance(step, Unschedulable):
        return {
            "phase": "Pending",
            "conditions": [_condition("PodScheduled", False, now, "Unschedulable", step.message)],
        }
    status: Status = {
        "hostIP": addresses[0],
        "podIP": addresses[1],
        "podIPs": [{"ip": addresses[1]}],
        "startTime": old.get("startTime", now),
        "conditions": _merged(old.get("conditions", []), _conditions(step, now)),
        "containerStatuses": [_container(pod, c, step, now, old) for c in pod["spec"]["containers"]],
    }
    initial = pod["spec"].get("initContainers", [])
    if initial:
        done = Terminated() if not isinstance(step, Waiting) else step
        status["initContainerStatuses"] = [_container(pod, c, done, now, old) for c in initial]
    match step:
        case Waiting():
            status["phase"] = "Pending"
        case Running():
            status["phase"] = "Running"
        case Terminated(exit_code=code):
            status["phase"] = "Succeeded" if code == 0 else "Failed"
        case Evicted():
            status |= {"phase": "Failed", "reason": "Evicted", "message": step.message}
    return status


def _merged(old: list[Status], new: list[Status]) -> list[Status]:
    """The new conditions, and those that others wrote: the eviction API sets DisruptionTarget. Times change with statuses only."""
    before = {condition["type"]: condition for condition in old}
    for condition in new:
        last = before.pop(condition["type"], {})
        if last.get("status") == condition["status"]:
            condition["lastTransitionTime"] = last["lastTransitionTime"]
    return [*new, *before.values()]


def _conditions(step: Waiting | Running | Terminated | Evicted, now: str) -> list[Status]:
    ready = isinstance(step, Running)
    succeeded = isinstance(step, Terminated) and step.exit_code == 0
    reason = "" if ready else "PodCompleted" if succeeded else "ContainersNotReady"
    conditions = [
        _condition("PodReadyToStartContainers", True, now),
        _condition("Initialized", True, now),
        _condition("Ready", ready, now, reason),
        _condition("ContainersReady", ready, now, reason),
        _condition("PodScheduled", True, now),
    ]
    if isinstance(step, Evicted):
        conditions.append(_condition("DisruptionTarget", True, now, step.reason, step.message))
    return conditions


def _condition(kind: str, true: bool, now: str, reason: str = "", message: str = "") -> Status:
    condition = {"type": kind, "status": "True" if true else "False", "lastTransitionTime": now, "lastProbeTime": None}
    return condition | ({"reason": reason} if reason else {}) | ({"message": message} if message else {})


def _container(
    pod: Pod, container: Status, step: Waiting | Running | Terminated | Evicted, now: str, old: Status
) -> Status:
    identity = f"containerd://{pod['metadata']['uid']}-{container['name']}"
    before = [c for c in old.get("containerStatuses", []) if c["name"] == container["name"]]
    started = before[0].get("state", {}).get("running", {}).get("startedAt", now) if before else now
    status: Status = {
        "name": container["name"],
        "image": container["image"],
        "imageID": "" if isinstance(step, Waiting) else f"sha256:{'0' * 64}",
        "ready": isinstance(step, Running),
        "restartCount": 0,
        "started": isinstance(step, Running),
        "lastState": {},
    }
    match step:
        case Waiting():
            status["state"] = {"waiting": {"reason": step.reason, "message": step.message}}
        case Running():
            status |= {"containerID": identity, "state": {"running": {"startedAt": now}}}
        case Terminated(code, message, reason):
            cause = reason or ("Completed" if code == 0 else "Error")
            status |= {
                "containerID": identity,
                "state": {"terminated": _terminated(code, cause, message, started, now, identity)},
            }
        case Evicted():
            ended = _terminated(step.exit_code or 0, "Error", "", started, now, identity)
            status |= {"containerID": identity, "state": {"terminated": ended}}
    return status


def _terminated(code: int, reason: str, message: str, started: str, now: str, identity: str) -> Status:
    ended: Status = {
        "exitCode": code,
        "reason": reason,
        "startedAt": started,
        "finishedAt": now,
        "containerID": identity,
    }
    return ended | ({"message": message} if message else {})
