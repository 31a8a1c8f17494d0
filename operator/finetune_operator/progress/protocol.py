"""Posts and what becomes of them: pure folding of ProgressPosts into ``status.progress``."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from finetune_api.names import Stage
from finetune_api.progress import ProgressPost
from finetune_api.status import ExecutionProgress, ProgressStatus
from finetune_operator.planning.clock import human_duration, rfc3339
from finetune_operator.planning.highlights import MAX_EARLIER, highlight

LOSS_DIGITS = 4
_COPIED = (
    "activity",
    "step",
    "total_steps",
    "epoch",
    "learning_rate",
    "download",
    "merge",
    "upload",
    "resumed_from_step",
    "checkpoint_step",
    "peak_memory_bytes",
    "split",
    "restarts",
)
_FLOATS = ("epoch", "loss", "learning_rate", "tokens_per_second", "eta_seconds", "held_out_loss", "checkpoint_seconds")


def finite(post: ProgressPost) -> ProgressPost:
    """The post without NaN and infinity, which JSON does not know."""
    bad = {name: None for name in _FLOATS if (v := getattr(post, name)) is not None and not math.isfinite(v)}
    return post.model_copy(update=bad) if bad else post


def fold(earlier: ProgressPost | None, later: ProgressPost) -> ProgressPost:
    """Two posts of one execution as one: absent fields keep their last value, a wait lasts only while it is posted."""
    if earlier is None or earlier.execution_id != later.execution_id or earlier.stage is not later.stage:
        return later
    given = {name: getattr(later, name) for name in type(later).model_fields if getattr(later, name) is not None}
    return earlier.model_copy(update={**given, "waiting": later.waiting, "final": later.final or earlier.final})


def merge(base: ProgressStatus | None, post: ProgressPost, now: datetime) -> ProgressStatus:
    """``status.progress`` after a post. A new execution starts with a clean slate; publish keeps training's figures.

    What the planner must know of earlier executions moves to ``earlier`` with the post that takes their place: the operator may
    not have looked in between. The split stays, too: the bucket remembers it for the next execution.
    """
    keep: dict[str, Any] = {}
    if base is not None:
        same = base.execution_id == post.execution_id
        if same:
            keep = {n: getattr(base, n) for n in ProgressStatus.model_fields}
        elif post.stage is Stage.PUBLISH:
            kept = ("summary", "step", "total_steps", "epoch", "loss", "held_out_loss")
            keep = {n: getattr(base, n) for n in kept}
        if not same:
            keep |= {"earlier": _earlier(base, post.execution_id), "split": base.split}
    new: dict[str, Any] = {
        **keep,
        "execution_id": post.execution_id,
        "stage": post.stage.value,
        "sequence": post.sequence,
        "updated_at": rfc3339(now),
        "waiting_reason": post.waiting.reason.value if post.waiting else None,
        "waiting_message": post.waiting.message if post.waiting else None,
    }
    for name in _COPIED:
        value = getattr(post, name)
        if value is not None:
            new[name] = value
    for name in ("loss", "held_out_loss"):
        value = getattr(post, name)
        if value is not None:
            new[name] = round(value, LOSS_DIGITS)
    if post.checkpoint_seconds is not None:
        new["checkpoint_seconds"] = round(post.checkpoint_seconds, 1)
    if post.checkpoint_problem is not None:
        new["checkpoint_problem"] = post.checkpoint_problem or None
    if post.tokens_per_second is not None:
        new["tokens_per_second"] = round(post.tokens_per_second, 1)
    if post.eta_seconds is not None:
        new["eta"] = human_duration(post.eta_seconds)
    if new.get("step") is not None:
        new["summary"] = f"{new['step']}/{new['total_steps']}" if new.get("total_steps") else str(new["step"])
    if post.final is not None:
        new["report"] = post.final
    if post.final is not None or post.stage is not Stage.TRAIN:
        new["eta"] = None if post.eta_seconds is None else new.get("eta")
    return ProgressStatus.model_validate(new)


def _earlier(base: ProgressStatus, execution_id: str) -> list[ExecutionProgress] | None:
    """Earlier executions of training, the one that posted last among them."""
    kept = {e.execution_id: e for e in base.earlier or []}
    last = highlight(base)
    if last is not None:
        kept[last.execution_id] = last
    kept.pop(execution_id, None)
    return list(kept.values())[-MAX_EARLIER:] or None


def from_kubeflow(body: Any, pod_uid: str, stage: Stage, sequence: int) -> ProgressPost:
    """A post of transformers' KubeflowCallback (5.23): ``{"trainerStatus": {progressPercentage, estimatedRemainingSeconds,
    metrics: [{name, value}]}}``, all values as text.

    Raises:
        ValueError: another shape.
    """
    status = body.get("trainerStatus") if isinstance(body, dict) else None
    if not isinstance(status, dict):
        raise ValueError("trainerStatus is missing")  # noqa: TRY004 - the caller answers 422 to every ValueError
    metrics = {str(m.get("name")): _number(m.get("value")) for m in status.get("metrics") or [] if isinstance(m, dict)}
    step, total = metrics.get("current_step"), metrics.get("total_steps")
    eta = _number(status.get("estimatedRemainingSeconds"))
    return ProgressPost(
        execution_id=pod_uid,
        stage=stage,
        sequence=sequence,
        activity="Training",
        step=_count(step),
        total_steps=_count(total),
        epoch=_at_least_zero(metrics.get("current_epoch", metrics.get("epoch"))),
        loss=metrics.get("loss"),
        learning_rate=metrics.get("learning_rate"),
        held_out_loss=metrics.get("eval_loss"),
        eta_seconds=_at_least_zero(eta),
    )


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _count(value: float | None) -> int | None:
    return int(value) if value is not None and value >= 0 else None


def _at_least_zero(value: float | None) -> float | None:
    return max(0.0, value) if value is not None else None
