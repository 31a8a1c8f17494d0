"""What a scripted pod can do. A script is a function of the pod that gives a list of these steps."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

Pod = dict[str, Any]
Hook = Callable[[Pod], Awaitable[object] | object]


@dataclass(frozen=True)
class After:
    """Let time pass."""

    seconds: float


@dataclass(frozen=True)
class Unschedulable:
    """The scheduler finds no place, and says why. Later steps find one."""

    message: str = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


@dataclass(frozen=True)
class Waiting:
    """The containers cannot start."""

    reason: str = "ImagePullBackOff"
    message: str = "Back-off pulling image"


@dataclass(frozen=True)
class Running:
    """The containers run and are ready."""


@dataclass(frozen=True)
class Call:
    """Do something, for example post progress, while the pod is as it is. A coroutine is awaited; what it returns does not matter."""

    hook: Hook


@dataclass(frozen=True)
class Terminated:
    """The containers ended, and with them the pod."""

    exit_code: int = 0
    message: str = ""  # the termination message
    reason: str | None = None  # default: Completed or Error


@dataclass(frozen=True)
class Evicted:
    """The pod failed by no fault of its own: condition DisruptionTarget, as on preemption, eviction and node loss."""

    reason: str = "TerminationByKubelet"
    message: str = "The node was low on resource: memory."
    exit_code: int | None = 137


Step = After | Unschedulable | Waiting | Running | Call | Terminated | Evicted
Script = Callable[[Pod], Iterable[Step] | None]

OOM_KILLED = Terminated(137, reason="OOMKilled")


def succeed(after: float = 0, message: str = "") -> list[Step]:
    """The steps of a pod that runs and succeeds."""
    return [Running(), After(after), Terminated(0, message)]


def fail(exit_code: int, message: str = "", after: float = 0) -> list[Step]:
    """The steps of a pod that runs and fails."""
    return [Running(), After(after), Terminated(exit_code, message)]


def run_forever() -> list[Step]:
    """The steps of a pod that runs until it is deleted."""
    return [Running()]
