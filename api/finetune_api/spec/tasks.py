"""``spec.evaluation.tasks``: what EleutherAI's lm-eval measures."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.spec.references import RemoteSource


class EvaluationTask(RemoteSource):
    """A task or a group of tasks of lm-eval, or one of your own, that base and tuned model do. Credentials are for its data."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=128)] = Field(
        description="Its name in lm-eval, such as arc_easy, hellaswag or gsm8k."
    )
    uri: (
        Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^?#\s]+/$", max_length=2048)]
        | None
    ) = Field(
        None,
        description=(
            "Folder in a bucket (s3://bucket/folder/) with a task of your own: its YAML, and the json, jsonl, csv or parquet files that it "
            "names relative to the folder."
        ),
    )
    limit: Annotated[int, Field(ge=1, le=10_000)] = Field(
        100, description="The first so many documents; of a group, of each of its tasks."
    )
    few_shot: Annotated[int, Field(ge=0, le=64)] | None = Field(
        None, description="How many examples stand before each question; the default is the task's own."
    )
