"""metav1.Conditions with fixed semantics: lastTransitionTime moves only when the status flips."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from finetune_api.names import Stage
from finetune_api.status import AttemptStatus, Condition, ConditionType, FineTuneJobStatus
from finetune_operator.planning.clock import parse_time, rfc3339

MESSAGE_LIMIT = 4096


class Conditioned(Protocol):
    """A status, of whichever kind."""

    @property
    def conditions(self) -> list[Condition]:
        """All that were ever set."""


@dataclass(frozen=True)
class Wish:
    """What a condition should say."""

    type: ConditionType
    true: bool
    reason: str
    message: str


def find(status: Conditioned, kind: ConditionType) -> Condition | None:
    """The condition of a type, if it was ever set."""
    return next((c for c in status.conditions if c.type == kind), None)


def is_true(status: Conditioned, kind: ConditionType) -> bool:
    """Whether a condition is set and true."""
    found = find(status, kind)
    return found is not None and found.status == "True"


def transition_time(status: Conditioned, kind: ConditionType) -> datetime | None:
    """When a condition last flipped."""
    found = find(status, kind)
    return parse_time(found.last_transition_time) if found else None


def apply_wishes(before: Conditioned, wishes: Iterable[Wish], generation: int, now: datetime) -> list[Condition]:
    """The conditions after ``wishes``; a condition that was never set is added only when it becomes true."""
    result = {c.type: c for c in before.conditions}
    for wish in wishes:
        old = result.get(wish.type)
        if old is None and not wish.true:
            continue
        state = "True" if wish.true else "False"
        flipped = old is None or old.status != state
        message = wish.message if len(wish.message) <= MESSAGE_LIMIT else f"{wish.message[: MESSAGE_LIMIT - 1]}…"
        same = old is not None and not flipped and old.reason == wish.reason and old.message == message
        result[wish.type] = Condition(
            type=wish.type,
            status="True" if wish.true else "False",
            # An unchanged condition keeps the generation it was found for: a mere spec.suspend edit rewrites nothing.
            observed_generation=old.observed_generation if same and old else generation,
            last_transition_time=rfc3339(now) if flipped or old is None else old.last_transition_time,
            reason=wish.reason,
            message=message,
        )
    return conditions_in_order(result.values())


def conditions_in_order(conditions: Iterable[Condition]) -> list[Condition]:
    """In our order: server-side apply may keep another, and that is no difference."""
    return sorted(conditions, key=_rank)


_STAGES = {stage.value: i for i, stage in enumerate(Stage)}
_ORDER = {t.value: i for i, t in enumerate(ConditionType)}


def _rank(condition: Condition) -> tuple[int, str]:
    return _ORDER.get(condition.type, len(_ORDER)), condition.type


_NOT_YET = "~"
"""Behind every time."""


def attempt_rank(attempt: AttemptStatus) -> tuple[str, str, int, str]:
    """Attempts stand in the order in which they started.

    Kubernetes' times are whole seconds. Of two that started in one, the earlier one ended before the other began: the one that ended
    first comes first, and where even that does not tell, the stages' order decides.
    """
    return (
        attempt.started_at or attempt.finished_at or "",
        attempt.finished_at or _NOT_YET,
        _STAGES.get(attempt.stage, len(_STAGES)),
        attempt.execution_id,
    )


def in_order(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """The status with its keyed lists in our order: server-side apply may keep another, and that is no difference."""
    return status.model_copy(
        update={
            "conditions": conditions_in_order(status.conditions),
            "attempts": sorted(status.attempts, key=attempt_rank),
        }
    )
