"""How far each execution of training came, as it told itself: read from status.progress."""

from __future__ import annotations

from finetune_api.names import Stage
from finetune_api.status import AttemptStatus, ExecutionProgress, ProgressStatus

MAX_EARLIER = 4


def highlights(progress: ProgressStatus | None) -> dict[str, ExecutionProgress]:
    """By execution: the one that posts now and those before it."""
    if progress is None:
        return {}
    found = {e.execution_id: e for e in progress.earlier or []}
    now = highlight(progress)
    if now is not None:
        found[now.execution_id] = now
    return found


def highlight(progress: ProgressStatus) -> ExecutionProgress | None:
    """What must be kept of an execution of training when another begins to post."""
    if progress.execution_id is None or progress.stage != Stage.TRAIN:
        return None
    return ExecutionProgress(
        execution_id=progress.execution_id,
        step=progress.step,
        resumed_from_step=progress.resumed_from_step,
        checkpoint_step=progress.checkpoint_step,
        peak_memory_bytes=progress.peak_memory_bytes,
        restarts=progress.restarts,
    )


def with_highlights(attempt: AttemptStatus, came: ExecutionProgress | None) -> AttemptStatus:
    """An attempt and how far it came. While it runs, status.progress tells that: each step would be a write."""
    if came is None:
        return attempt
    facts: dict[str, int | None] = {"resumed_from_step": came.resumed_from_step}
    if attempt.outcome != "Running":
        facts |= {"last_step": came.step, "checkpoint_step": came.checkpoint_step}
    return attempt.model_copy(update={name: value for name, value in facts.items() if value is not None})
