"""The numbers that trackers are told, and under which names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, Any]
"""As in ``reports/metrics.jsonl``: a step's numbers or an evaluation's, with ``step``."""

TRAINING = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens", "epoch")
HELD_OUT_LOSS = "held_out_loss"
STEP_METRIC = "train/global_step"
EVALUATION_STEP = "eval/step"


@dataclass(frozen=True)
class Known:
    """The last step and the last evaluation that a tracker has; -1 for none. Lines come in order, so it has all before."""

    step: int = -1
    evaluation: int = -1

    def lacks(self, line: Line) -> bool:
        """Whether a line is new to it."""
        return int(line["step"]) > (self.evaluation if is_evaluation(line) else self.step)

    def and_(self, lines: Iterable[Line]) -> Known:
        """With what it has been told since."""
        step, evaluation = self.step, self.evaluation
        for line in lines:
            if is_evaluation(line):
                evaluation = max(evaluation, int(line["step"]))
            else:
                step = max(step, int(line["step"]))
        return Known(step, evaluation)


def is_evaluation(line: Line) -> bool:
    """Whether a line is an evaluation's."""
    return HELD_OUT_LOSS in line


def metrics(line: Line) -> dict[str, float]:
    """A line's numbers by the names that transformers' own integrations use (``train/loss``, ``eval/loss``). What is not finite has
    no place on a curve."""
    if is_evaluation(line):
        named = {f"eval/{'loss' if k == HELD_OUT_LOSS else k}": v for k, v in line.items() if k != "step"}
    else:
        named = {f"train/{k}": line[k] for k in TRAINING if k in line}
    return {k: float(v) for k, v in named.items() if isinstance(v, int | float) and math.isfinite(v)}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": [1]}}`` as ``{"a.b": [1]}``: for trackers whose parameters are a list."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result |= flat(value, f"{name}.")
        else:
            result[name] = value
    return result
