"""What is counted: failures that may pass, executions that get nowhere, GPUs given back, and memory that must grow.

All of it from the attempts in status, so that an operator that restarts counts the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finetune_api.failures import HANDED_BACK_EXIT_CODES, Consequence, Reason, by_exit_code
from finetune_api.names import Stage
from finetune_api.quantity import grown_memory, parse_quantity
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AttemptStatus
from finetune_operator.planning.clock import parse_time
from finetune_operator.planning.endings import consequence_of, replaced

HANDED_BACK = frozenset(by_exit_code(code).reason.value for code in HANDED_BACK_EXIT_CODES)
"""Reasons with which a training pod gives its GPU back."""


def ended(attempts: Sequence[AttemptStatus], stage: Stage) -> list[AttemptStatus]:
    """Executions of a stage that are over, oldest first."""
    return [a for a in attempts if a.stage == stage and a.outcome != "Running"]


def failures(attempts: Sequence[AttemptStatus], stage: Stage, spec: FineTuneJobSpec) -> list[AttemptStatus]:
    """Executions that count against recovery.maxFailures. Those that exceeded their memory do not while it can grow."""
    found = [
        a for a in ended(attempts, stage) if a.outcome == "Failed" and consequence_of(a.reason) is Consequence.RETRY
    ]
    excused = set()
    if stage is Stage.TRAIN:
        excused = {a.execution_id for a, before, after in growths(found, spec) if before != after}
    return [a for a in found if a.execution_id not in excused]


def growths(attempts: Sequence[AttemptStatus], spec: FineTuneJobSpec) -> list[tuple[AttemptStatus, str, str]]:
    """Executions of training that exceeded their memory, each with the memory that it had and that would be more.

    Several may have had the same: the Job goes on by itself while the operator is away. (Attempts of an earlier version do not tell
    what they had: one grew after the other.)
    """
    had, limit = spec.compute.memory, spec.recovery.out_of_memory.max_memory
    if had is None:
        return []
    found = []
    for attempt in ended(attempts, Stage.TRAIN):
        if attempt.reason == Reason.HOST_OUT_OF_MEMORY:
            before = attempt.memory or had
            had = grown_memory(before, limit, 1)
            found.append((attempt, before, had))
    return found


def wanted_memory(attempts: Sequence[AttemptStatus], spec: FineTuneJobSpec) -> str | None:
    """What the training pod should have now: never less than any before it had, also when status has lost the oldest."""
    if spec.compute.memory is None:
        return None
    had = [a.memory for a in attempts if a.stage == Stage.TRAIN and a.memory]
    return max([spec.compute.memory, *had, *(after for _, _, after in growths(attempts, spec))], key=parse_quantity)


LONG_SECONDS = 300
"""An execution that told no step (its posts did not arrive) and ran for longer is taken to have got farther."""


def fruitless(attempts: Sequence[AttemptStatus], stage: Stage) -> int:
    """How many executions in a row were interrupted without any getting farther than those before it."""
    return _in_a_row(ended(attempts, stage), lambda a: replaced(a.reason), _worked_long)


def returns(attempts: Sequence[AttemptStatus]) -> int:
    """How often in a row training gave its GPU back without having got any farther. (It ran for long, but waited.)

    Several pods that wait for another one give theirs back at about the same time: prepare runs again between two returns.
    """
    row = [a for n, a in enumerate(attempts) if not (n and _gave_back(a) and _gave_back(attempts[n - 1]))]
    return _in_a_row(ended(row, Stage.TRAIN), _gave_back, lambda _: False)


def _gave_back(attempt: AttemptStatus) -> bool:
    return attempt.stage == Stage.TRAIN and attempt.reason in HANDED_BACK


def _in_a_row(
    attempts: Sequence[AttemptStatus],
    counts: Callable[[AttemptStatus], bool],
    advanced_unseen: Callable[[AttemptStatus], bool],
) -> int:
    best, row = 0, 0
    for attempt in attempts:
        step = attempt.last_step or 0
        if step > best or attempt.outcome == "Succeeded" or advanced_unseen(attempt):
            best, row = max(best, step), 0
        elif counts(attempt):
            row += 1
    return row


def _worked_long(attempt: AttemptStatus) -> bool:
    """Whether an execution of which no step is known ran for long. One that told where it began is known to have got no farther."""
    known = attempt.last_step is not None or attempt.resumed_from_step is not None
    started, finished = parse_time(attempt.started_at), parse_time(attempt.finished_at)
    return not known and bool(started and finished and (finished - started).total_seconds() >= LONG_SECONDS)
