"""Whether a training pod that is told to stop would have the time to save a checkpoint: said before it matters."""

from __future__ import annotations

import math

from finetune_api.names import Stage
from finetune_api.status import ConditionType
from finetune_operator.planning.conditions import Wish, find, is_true
from finetune_operator.planning.look import Look

SHARE = 0.8
"""Of the grace period; the rest is for the micro-batch that is under way and a store that is slower than usual."""
REASON = "GracePeriodTooShort"


def checkpoint_at_risk(look: Look) -> list[Wish]:
    """The condition CheckpointAtRisk; its words stay as they were first told, so that no measurement is a write."""
    if look.obs.job.spec is None:
        return []
    progress, grace = look.before.progress, look.spec.recovery.termination_grace_period_seconds
    posting = progress is not None and progress.stage == Stage.TRAIN and not look.trained
    took = progress.checkpoint_seconds if posting and progress is not None else None
    was = is_true(look.before, ConditionType.CHECKPOINT_AT_RISK)
    if took is not None and took > SHARE * grace:
        if was:
            return []
        advised = max(grace + 30, 10 * math.ceil(took / SHARE / 10))
        text = (
            f"Saving a checkpoint took {took:.0f} s, and a training pod that is told to stop is killed after {grace} s: what was "
            "computed since the last checkpoint may be lost then. Set recovery.terminationGracePeriodSeconds to at least "
            f"{advised} for the next job."
        )
        return [Wish(ConditionType.CHECKPOINT_AT_RISK, True, REASON, text)]
    over = look.trained or took is not None
    if not was or not over or find(look.before, ConditionType.CHECKPOINT_AT_RISK) is None:
        return []
    text = (
        "Training is over." if look.trained else f"Saving a checkpoint takes less than {SHARE:.0%} of the grace period."
    )
    return [Wish(ConditionType.CHECKPOINT_AT_RISK, False, "GracePeriodSuffices", text)]
