"""What pods post to the operator while they work."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.failures import Reason
from finetune_api.names import Stage


class Transfer(ApiModel):
    """Bytes moved so far, of how many."""

    completed_bytes: Annotated[int, Field(ge=0)]
    total_bytes: Annotated[int, Field(ge=0)] | None = None


class Waiting(ApiModel):
    """What a stage waits for."""

    reason: Reason
    message: Annotated[str, Field(max_length=1024)]


class Split(ApiModel):
    """How an optimizer step is cut, as it is now: an out-of-memory error may have changed it since the plan."""

    micro_batch_sequences: Annotated[int, Field(ge=1)]
    gradient_accumulation_steps: Annotated[int, Field(ge=1)]
    gradient_checkpointing: bool
    max_sequence_tokens: Annotated[int, Field(ge=1)]
    evaluation_divisor: Annotated[int, Field(ge=1)] = 1
    """Evaluation batches have so many times fewer tokens than usual."""


class Restart(ApiModel):
    """The training process was started again inside its pod."""

    at: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    reason: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=1024)]


class StageReport(ApiModel):
    """A stage's outcome: the last post of a stage and, shortened, its termination message."""

    stage: Stage
    succeeded: bool
    reason: str
    message: Annotated[str, Field(max_length=2048)]
    result: dict[str, object] | None = None


class ProgressPost(ApiModel):
    """One post. Absent fields keep their last value; ``sequence`` grows with every post of an execution."""

    execution_id: str
    stage: Stage
    sequence: Annotated[int, Field(ge=0)]
    activity: Annotated[str, Field(max_length=64)] | None = None
    """What the stage does just now: Downloading, Checking, Tokenizing, Loading, Training, Evaluating, Verifying, Scoring, Judging, Merging, Uploading."""
    step: Annotated[int, Field(ge=0)] | None = None
    total_steps: Annotated[int, Field(ge=0)] | None = None
    epoch: Annotated[float, Field(ge=0)] | None = None
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    eta_seconds: Annotated[float, Field(ge=0)] | None = None
    held_out_loss: float | None = None
    download: Transfer | None = None
    merge: Transfer | None = None
    upload: Transfer | None = None
    resumed_from_step: Annotated[int, Field(ge=0)] | None = None
    """The step whose checkpoint this execution went on from; 0 without one."""
    checkpoint_step: Annotated[int, Field(ge=0)] | None = None
    """The newest step whose checkpoint is complete in the bucket."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] | None = None
    """How long it took from the copy to the completion marker: what a pod that is told to stop needs."""
    checkpoint_problem: Annotated[str, Field(max_length=1024)] | None = None
    """Why checkpoints cannot be stored while training goes on: ``<reason>: <message>``; empty once they are stored again."""
    peak_memory_bytes: Annotated[int, Field(ge=0)] | None = None
    """The most memory the container has held, as its cgroup counts it."""
    split: Split | None = None
    """Present once it differs from the plan's."""
    restarts: Annotated[list[Restart], Field(max_length=16)] | None = None
    """All restarts in this pod, oldest first."""
    waiting: Waiting | None = None
    """Present while the stage waits; the next post without it ends the wait."""
    final: StageReport | None = None
