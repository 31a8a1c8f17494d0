"""How far each execution of training came, as it told itself: read from status.progress."""

from __future__ import annotations

from finetune_api.names import Stage
from finetune_api.progress import StageReport
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
    """An attempt and how far it came. While it runs, status.progress tells that: each step would be a write.

    Its last words may have told more than its posts: the greater step counts.
    """
    if came is None:
        return attempt
    facts: dict[str, int | None] = {"resumed_from_step": came.resumed_from_step}
    if attempt.outcome != "Running":
        facts |= {"last_step": _greater(attempt.last_step, came.step)}
        facts |= {"checkpoint_step": _greater(attempt.checkpoint_step, came.checkpoint_step)}
    return attempt.model_copy(update={name: value for name, value in facts.items() if value is not None})


def last_words(report: StageReport | None) -> dict[str, int | None]:
    """How far an execution of training came that says so in the report with which it failed: no post need have arrived."""
    if report is None or report.succeeded or report.stage is not Stage.TRAIN:
        return {}
    result = report.result or {}
    return {"last_step": _step(result.get("step")), "checkpoint_step": _step(result.get("checkpointStep"))}


def _step(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _greater(one: int | None, other: int | None) -> int | None:
    return max((step for step in (one, other) if step is not None), default=None)
