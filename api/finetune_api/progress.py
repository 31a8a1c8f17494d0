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
    """What the stage does just now: Downloading, Checking, Tokenizing, Loading, Training, Evaluating, Verifying, Merging, Uploading."""
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
    waiting: Waiting | None = None
    """Present while the stage waits; the next post without it ends the wait."""
    final: StageReport | None = None
