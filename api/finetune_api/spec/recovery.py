"""``spec.recovery``: what happens after a failure."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import Quantity, cel, exactly_one


class Retention(StrEnum):
    """What happens to intermediate results after success."""

    DELETE = "Delete"
    KEEP = "Keep"


class CheckpointInterval(ApiModel):
    """How often training is checkpointed: every so many optimizer steps, or as soon as so many seconds have passed."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    seconds: Annotated[int, Field(ge=1, le=86_400)] | None = None

    model_config = ConfigDict(json_schema_extra=cel(exactly_one("steps", "seconds")))

    @model_validator(mode="after")
    def _one_of(self) -> CheckpointInterval:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("exactly one of steps, seconds must be set")
        return self


class Checkpoint(ApiModel):
    """Checkpoints of the adapter, optimizer, scheduler, random numbers and data position; never of the base. They lie in the
    workspace and are written while training goes on."""

    interval: CheckpointInterval = Field(
        default=CheckpointInterval(seconds=300),
        description="The first step and the last are checkpointed in any case, and so is a run that is told to stop.",
    )
    keep: Annotated[int, Field(ge=1, le=100)] = Field(
        2, description="How many of the newest are kept; the one with the best held-out loss is kept beside them."
    )
    retention: Retention = Field(Retention.DELETE, description="What happens to them after success.")


class OutOfMemoryAction(StrEnum):
    """What may be changed after the GPU's memory did not suffice. Only ShorterSequences changes the result."""

    SMALLER_MICRO_BATCH = "SmallerMicroBatch"
    GRADIENT_CHECKPOINTING = "GradientCheckpointing"
    SHORTER_SEQUENCES = "ShorterSequences"


class OutOfMemory(ApiModel):
    """How a job heals itself when memory does not suffice."""

    actions: Annotated[list[OutOfMemoryAction], Field(max_length=3)] = Field(
        default=[OutOfMemoryAction.SMALLER_MICRO_BATCH, OutOfMemoryAction.GRADIENT_CHECKPOINTING],
        description=(
            "What may be tried, in this order, each until it helps no more: half the micro-batch and twice the accumulation "
            "(same rows, same normaliser), gradient checkpointing, half of maxSequenceTokens (longer rows are truncated)."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    max_memory: Quantity | None = Field(
        None,
        description=(
            "Up to here compute.memory grows by half each time the training container was killed for exceeding it; absent: never."
        ),
    )


class Recovery(ApiModel):
    """What happens after a failure that may pass."""

    # status.attempts, from which the operator counts, holds 64.
    max_failures: Annotated[int, Field(ge=0, le=50)] = Field(
        2, description="Failed executions of a stage that are repeated. Interruptions from outside do not count."
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    out_of_memory: OutOfMemory = Field(default_factory=OutOfMemory)
    hung_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = Field(
        1800, description="So long training may show no sign of life before its processes are started again."
    )
    stop_on_divergence: bool = Field(
        True,
        description="Fail when the training loss has risen far above where it began and stays there, instead of training on.",
    )
    termination_grace_period_seconds: Annotated[int, Field(ge=10, le=3600)] = Field(
        120, description="How long a training pod that is told to stop may take to save a checkpoint."
    )
    placement_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = Field(
        600,
        description=(
            "With compute.nodes above 1: so long, and at random up to half as long again, pods that run wait for the others (an image that "
            "must be pulled counts). Then "
            "all give their GPUs back, and the job starts at prepare again, so that two jobs never hold each other up for ever."
        ),
    )
