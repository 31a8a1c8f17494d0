"""What went wrong and was mended without anybody's help: status.recoveries.

Every entry follows from attempts and restarts, under a key that never changes (execution, time, reason): an operator that
dies before it is written finds the same again, and one that was written keeps its words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.quantity import human_bytes
from finetune_api.status import AttemptStatus, ExecutionProgress, ProgressStatus, RecoveryStatus
from finetune_operator.planning.budget import HANDED_BACK, ended, growths
from finetune_operator.planning.clock import parse_time, rfc3339
from finetune_operator.planning.endings import replaced
from finetune_operator.planning.highlights import highlights
from finetune_operator.planning.look import Look
from finetune_operator.planning.transitions import RESUMED

MAX_RECOVERIES = 32
MESSAGE_LIMIT = 1024


def recoveries(look: Look) -> list[RecoveryStatus]:
    """The list after this look: the newest stay."""
    known = {_key(r): r for r in look.before.recoveries}
    floor = look.before.recoveries[0].at if len(known) >= MAX_RECOVERIES else ""
    new = {}
    for entry in _found(look):
        # A full list has lost its oldest: what is not newer than those that are left was told long ago.
        if _key(entry) not in known and (not floor or _moment(entry.at) > _moment(floor)):
            new[_key(entry)] = entry
    return sorted([*known.values(), *new.values()], key=lambda r: _moment(r.at))[-MAX_RECOVERIES:]


def _found(look: Look) -> Iterator[RecoveryStatus]:
    came = highlights(look.before.progress)
    for execution in came.values():
        for restart in execution.restarts or []:
            yield _entry(restart.at, execution.execution_id, restart.reason, restart.message)
    attempts = [a for a in look.ledger.attempts if a.stage == Stage.TRAIN and a.pod]
    for number, attempt in enumerate(attempts, start=1):
        if number > 1 and attempt.resumed_from_step is not None and attempt.started_at:
            words = _resumption(number, attempt, attempts[: number - 1])
            yield _entry(attempt.started_at, attempt.execution_id, RESUMED, words)
    for attempt in ended(attempts, Stage.TRAIN):
        if attempt.finished_at and (replaced(attempt.reason) or attempt.reason in HANDED_BACK):
            yield _entry(attempt.finished_at, attempt.execution_id, attempt.reason or "", _interruption(attempt))
    if look.obs.job.spec is not None:
        for attempt, before, after in growths(attempts, look.spec):
            if before != after and attempt.finished_at:
                words = (
                    f"the training container exceeded its memory of {before}{_peak(came.get(attempt.execution_id))}; "
                    f"the Job is created anew with {after}"
                )
                yield _entry(attempt.finished_at, attempt.execution_id, Reason.HOST_OUT_OF_MEMORY, words)


def _entry(at: str, execution: str, reason: str, message: str) -> RecoveryStatus:
    # Whole seconds, as Kubernetes' own times: what is compared must be written in one way.
    moment = parse_time(at)
    text = rfc3339(moment) if moment is not None else at
    return RecoveryStatus(at=text, execution_id=execution, reason=reason, message=message[:MESSAGE_LIMIT])


def _key(entry: RecoveryStatus) -> tuple[str, str, str]:
    return entry.execution_id, entry.at, entry.reason


def _moment(text: str) -> float:
    moment = parse_time(text)
    return moment.timestamp() if moment is not None else 0.0


def _interruption(attempt: AttemptStatus) -> str:
    """``node drained at step 402; checkpoint saved at step 402``."""
    words = (attempt.message or "").strip().rstrip(".")
    if attempt.started_at is None:
        return f"{words}; another pod is tried"
    if attempt.last_step is not None:
        words += f" at step {attempt.last_step}"
    saved = attempt.checkpoint_step
    if saved is None:
        return f"{words}; no checkpoint was saved"
    return f"{words}; checkpoint saved at step {saved}"


def _resumption(number: int, attempt: AttemptStatus, before: Sequence[AttemptStatus]) -> str:
    """``attempt 2 on node gpu-3 from step 402; nothing recomputed``."""
    start = attempt.resumed_from_step or 0
    lost = max(0, max((a.last_step or 0 for a in before), default=0) - start)
    again = f"{lost:,} {'step' if lost == 1 else 'steps'} computed again" if lost else "nothing recomputed"
    return f"attempt {number}{f' on node {attempt.node}' if attempt.node else ''} from step {start}; {again}"


def _peak(came: ExecutionProgress | None) -> str:
    return (
        f" (it held {human_bytes(came.peak_memory_bytes)} when it last told)" if came and came.peak_memory_bytes else ""
    )


def peak_memory(progress: ProgressStatus | None, execution: str) -> str:
    """The most memory that an execution told of; empty if it told nothing."""
    return _peak(highlights(progress).get(execution))


def saved_step(attempts: Sequence[AttemptStatus]) -> int:
    """The newest step that an execution of training left in the bucket; 0 for none."""
    return max(
        (max(a.checkpoint_step or 0, a.resumed_from_step or 0) for a in attempts if a.stage == Stage.TRAIN), default=0
    )


def last_restart(progress: ProgressStatus | None, execution: str) -> str:
    """What was changed the last time that training was started again in its pod; with a leading blank."""
    if progress is None or progress.execution_id != execution or not progress.restarts:
        return ""
    return f" {progress.restarts[-1].message.strip()}"
