"""``spec.objective``: what is learned."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from finetune_api.base import ApiModel


class LossOn(StrEnum):
    """Which tokens are learned."""

    ASSISTANT = "Assistant"
    COMPLETION = "Completion"
    ALL = "All"


class SupervisedFineTuning(ApiModel):
    """Settings of supervised fine-tuning."""

    loss_on: LossOn = Field(
        LossOn.ASSISTANT,
        description=(
            "Assistant: every assistant turn (or the completion). Completion: the last assistant turn only. All: every token. "
            "Text rows are always learned whole, Tokenized rows by their labels."
        ),
    )


class ObjectiveType(StrEnum):
    """Training objectives."""

    SFT = "SFT"


class Objective(ApiModel):
    """What is optimized."""

    type: ObjectiveType = Field(ObjectiveType.SFT)
    sft: SupervisedFineTuning = Field(default_factory=SupervisedFineTuning)
