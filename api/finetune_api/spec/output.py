"""``spec.output``: where results go."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.spec.recovery import Retention
from finetune_api.spec.references import RemoteSource
from finetune_api.uris import OUTPUT_URI_PATTERN


class Workspace(ApiModel):
    """Prepared data and intermediate results: a copy of possibly private rows, so it goes after success unless kept."""

    uri: Annotated[str, StringConstraints(pattern=OUTPUT_URI_PATTERN, max_length=2048)] | None = Field(
        None,
        description=(
            "Where it lives, in <name>-<first 8 characters of the UID>/workspace/ below this; the default is the output's uri. "
            "Same store and credentials as the output."
        ),
    )
    retention: Retention = Field(Retention.DELETE)


class MergedDtype(StrEnum):
    """Element types of the merged weights."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class MergedBase(StrEnum):
    """Which base weights the adapter is merged into after QLoRA."""

    QUANTIZED = "Quantized"
    ORIGINAL = "Original"


class Merged(ApiModel):
    """Base and adapter merged into one model folder."""

    enabled: bool = False
    dtype: MergedDtype = MergedDtype.BFLOAT16
    base: MergedBase = Field(
        MergedBase.QUANTIZED,
        description=(
            "Quantized merges into the quantized-and-dequantized weights that training saw, which is what the adapter was "
            "trained for; Original into the published ones. The same for LoRA."
        ),
    )


class Selection(StrEnum):
    """Which of the weights that were evaluated become the result."""

    BEST = "Best"
    LAST = "Last"


class DeletionPolicy(StrEnum):
    """What deleting the FineTuneJob does to its output."""

    RETAIN = "Retain"
    DELETE = "Delete"


class Output(RemoteSource):
    """Where the results go: s3://bucket/prefix/<name>-<first 8 characters of the UID>/."""

    uri: Annotated[str, StringConstraints(pattern=OUTPUT_URI_PATTERN, max_length=2048)] = Field(
        description="s3://bucket/prefix"
    )
    workspace: Workspace = Field(default_factory=Workspace)
    merged: Merged = Field(default_factory=Merged)
    select: Selection = Field(
        Selection.BEST,
        description="Best: the weights with the lowest held-out loss of all evaluations; Last: those after the last step.",
    )
    deletion_policy: DeletionPolicy = Field(
        DeletionPolicy.RETAIN,
        description="What happens to everything below the job's output folder when the FineTuneJob is deleted.",
    )
