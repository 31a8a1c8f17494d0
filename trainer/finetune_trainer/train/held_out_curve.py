"""What the held-out losses on the way say: whether more training is of use, and whether there was too much of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from finetune_api.spec import EarlyStopping

OVERFITTED = 1.02
"""By so much the last held-out loss is above the lowest where it is no noise."""


def perplexity(loss: float) -> float:
    """exp(loss), infinite beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluation_line(step: int, loss: float, token_accuracy: float | None = None) -> dict[str, Any]:
    """An evaluation's line of ``reports/metrics.jsonl``."""
    known = {"perplexity": perplexity(loss), "token_accuracy": token_accuracy}
    shown = {name: value for name, value in known.items() if value is not None and math.isfinite(value)}
    return {"step": step, "held_out_loss": loss, **shown}


def is_enough(evaluations: Sequence[dict[str, Any]], rule: EarlyStopping | None) -> bool:
    """Whether the last ``patience`` evaluations brought nothing: as transformers' EarlyStoppingCallback counts, which forgets its count when
    a run is interrupted.

    Args:
        evaluations: ``step`` and ``held_out_loss`` of each, in any order.
    """
    if rule is None:
        return False
    best, without = float("inf"), 0
    for loss in (e["held_out_loss"] for e in sorted(evaluations, key=lambda e: e["step"])):
        without = 0 if loss < best - rule.threshold else without + 1
        best = min(best, loss)
    return without >= rule.patience


def overfitting(evaluations: Sequence[dict[str, Any]], base_loss: float, selected_step: int | None) -> list[str]:
    """Warnings for people.

    Args:
        evaluations: as above, the last step's included.
        base_loss: before training.
        selected_step: whose weights are the result, if not the last step's.
    """
    last = max(evaluations, key=lambda e: e["step"])
    best = min(evaluations, key=lambda e: e["held_out_loss"])
    loss, lowest = last["held_out_loss"], best["held_out_loss"]
    if loss > OVERFITTED * lowest:
        result = f"the result is what step {last['step'] if selected_step is None else selected_step} gave"
        return [
            f"overfitting: the held-out loss was lowest at step {best['step']} ({lowest:.4f}) and {loss:.4f} at step {last['step']}; {result}. "
            "Train fewer epochs or at a lower learning rate, or set evaluation.earlyStopping"
        ]
    if loss > OVERFITTED * base_loss and lowest > base_loss:
        return [
            f"the held-out loss rose from {base_loss:.4f} to {loss:.4f}: on rows that it has not seen the tuned model is worse than the base. "
            "Lower training.optimizer.learningRate or the epochs, and see with evaluation.intervalSteps where it turns"
        ]
    return []
