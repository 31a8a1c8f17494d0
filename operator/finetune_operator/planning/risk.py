"""Whether what training computes now may be lost: said before it matters.

Checkpoints cannot be stored while training goes on; or a pod that is told to stop would not have the time to save one.
"""

from __future__ import annotations

import math

from finetune_api.names import Stage
from finetune_api.snapshot import RESERVED_STOP_SECONDS, saving_seconds
from finetune_api.status import Condition, ConditionType, ProgressStatus
from finetune_operator.planning.conditions import Wish, find
from finetune_operator.planning.look import Look
from finetune_operator.planning.messages import sentence
from finetune_operator.planning.outcome import advice_for
from finetune_operator.planning.story import saved_step
from finetune_operator.planning.transitions import CHECKPOINTS_FAIL

SHARE = 0.8
"""Of the time there is to save; the rest is for the micro-batch that is under way and a store that is slower than usual."""
REASON = "GracePeriodTooShort"


def checkpoint_at_risk(look: Look) -> list[Wish]:
    """The condition CheckpointAtRisk; its words stay as they were first told, so that no measurement is a write."""
    if look.obs.job.spec is None:
        return []
    progress, grace = look.before.progress, look.spec.recovery.termination_grace_period_seconds
    posting = progress if progress is not None and progress.stage == Stage.TRAIN and not look.trained else None
    found = find(look.before, ConditionType.CHECKPOINT_AT_RISK)
    was = found if found is not None and found.status == "True" else None
    if posting is not None and posting.checkpoint_problem:
        return _not_stored(look, posting, posting.checkpoint_problem, was)
    took = posting.checkpoint_seconds if posting is not None else None
    if took is not None and took > SHARE * saving_seconds(grace):
        return [] if was is not None and was.reason == REASON else [_too_short(took, grace)]
    if was is None:
        return []
    if was.reason == CHECKPOINTS_FAIL and (posting is not None or look.trained):
        text = "Training is over." if look.trained else "Checkpoints are stored again."
        return [Wish(ConditionType.CHECKPOINT_AT_RISK, False, "CheckpointsStored", text)]
    if look.trained or took is not None:
        fits = f"Saving a checkpoint takes less than {SHARE:.0%} of the time that the grace period leaves for it."
        text = "Training is over." if look.trained else fits
        return [Wish(ConditionType.CHECKPOINT_AT_RISK, False, "GracePeriodSuffices", text)]
    return []


def _not_stored(look: Look, progress: ProgressStatus, problem: str, was: Condition | None) -> list[Wish]:
    """Told anew only when the reason or the last good checkpoint is another: the rest of the words may change with each try."""
    reason = problem.split(":")[0]
    step = max(progress.checkpoint_step or 0, progress.resumed_from_step or 0, saved_step(look.ledger.attempts))
    since = f"since the checkpoint of step {step}" if step else "so far, as there is no checkpoint yet,"
    stake = f"Training goes on, and what it computed {since} is lost if its pod ends before one is stored."
    if was is not None and was.reason == CHECKPOINTS_FAIL and f" {reason}:" in was.message and stake in was.message:
        return []
    text = f"Checkpoints cannot be stored: {sentence(problem)} {stake} {advice_for(reason, Stage.TRAIN)}".strip()
    return [Wish(ConditionType.CHECKPOINT_AT_RISK, True, CHECKPOINTS_FAIL, text)]


def _too_short(took: float, grace: int) -> Wish:
    advised = max(grace + 30, 10 * math.ceil((took / SHARE + RESERVED_STOP_SECONDS) / 10))
    text = (
        f"Saving a checkpoint took {took:.0f} s, and a training pod that is told to stop is killed after {grace} s: what was "
        "computed since the last checkpoint may be lost then. Set recovery.terminationGracePeriodSeconds to at least "
        f"{advised} for the next job."
    )
    return Wish(ConditionType.CHECKPOINT_AT_RISK, True, REASON, text)
