"""``spec.evaluation``: what is measured."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import cel
from finetune_api.spec.data import DataSource
from finetune_api.spec.references import LocalObjectReference
from finetune_api.spec.rows import DataFormat
from finetune_api.spec.tasks import EvaluationTask


class TextMetric(StrEnum):
    """What is computed of the answers. ROUGE is ROUGE-1, -2 and -L."""

    EXACT_MATCH = "ExactMatch"
    ROUGE = "ROUGE"
    BLEU = "BLEU"
    CHRF = "ChrF"
    JSON_VALIDITY = "JSONValidity"
    REGEX = "Regex"


_PROMPTS_MESSAGE = "every prompt is answered once, and token ids hold none: leave weight and format: Tokenized out"


_REGEX_MESSAGE = "regex and the metric Regex need each other: set both or none"


class Generation(ApiModel):
    """Answers to held-out prompts, or to prompts of your own, by base and tuned model, kept side by side."""

    prompts: Annotated[int, Field(ge=0, le=100)] = Field(
        3, description="How many prompts are answered: the first held-out ones, or the first of the sources."
    )
    sources: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = Field(
        None,
        description=(
            "Prompts of your own, answered instead of held-out ones and never trained on: rows as in data.train, whose answers may be missing "
            "(then only what needs no reference is scored)."
        ),
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="Longest answer, in tokens.")
    metrics: Annotated[list[TextMetric], Field(max_length=len(TextMetric))] = Field(
        default=[TextMetric.EXACT_MATCH, TextMetric.ROUGE, TextMetric.BLEU, TextMetric.CHRF],
        description=(
            "What is computed of both models' answers. ExactMatch, ROUGE, BLEU and ChrF compare with the reference; JSONValidity is the share of "
            "answers that are JSON, Regex of those in which regex finds something."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    regex: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        None,
        description="Regular expression (Python's syntax) that is searched for in every answer; ^ and $ stand for its ends.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("has(self.regex) == self.metrics.exists(m, m == 'Regex')", _REGEX_MESSAGE),
            (
                "!has(self.sources) || self.sources.all(source, !has(source.weight) && source.format != 'Tokenized')",
                _PROMPTS_MESSAGE,
            ),
        )
    )

    @model_validator(mode="after")
    def _regex_where_it_counts(self) -> Generation:
        if (self.regex is not None) != (TextMetric.REGEX in self.metrics):
            raise ValueError(_REGEX_MESSAGE)
        return self

    @model_validator(mode="after")
    def _sources_of_prompts(self) -> Generation:
        if any(s.weight is not None or s.format is DataFormat.TOKENIZED for s in self.sources or []):
            raise ValueError(_PROMPTS_MESSAGE)
        return self


class Judge(ApiModel):
    """A language model that compares the answers of base and tuned model. It is asked by the publish stage, without a GPU, over the
    protocol of OpenAI's chat completions."""

    endpoint_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@?#]+$", max_length=2048)] = Field(
        alias="endpointURL",
        description="Below it /chat/completions is asked, for example https://api.openai.com/v1 or http://vllm.models/v1.",
    )
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] = Field(
        description="Name of the judge there."
    )
    secret_ref: LocalObjectReference | None = Field(
        None, description="Secret in the same namespace with the key OPENAI_API_KEY; without one, no key is sent."
    )
    criteria: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = Field(
        None,
        description="What makes an answer better, in words; the default is correctness, helpfulness and following instructions.",
    )
    max_pairs: Annotated[int, Field(ge=1, le=100)] = Field(
        50, description="Most pairs of answers that are judged, each with two questions."
    )


_JUDGE_MESSAGE = "a judge compares answers: set generation.prompts above 0, or leave judge out"


class EarlyStopping(ApiModel):
    """When training ends before its last step, since the held-out loss no longer falls (transformers' ``EarlyStoppingCallback``)."""

    patience: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="So many evaluations in a row without a lower held-out loss."
    )
    threshold: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0, description="By more than this the loss must fall below the lowest so far to count."
    )


_EARLY_STOPPING_MESSAGE = (
    "earlyStopping goes by the evaluations on the way: set evaluation.intervalSteps, the number of steps between two"
)


def _each_once(tasks: list[EvaluationTask]) -> list[EvaluationTask]:
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} stands twice")
    return tasks


class Evaluation(ApiModel):
    """What is measured on the held-out rows, and what is made of answers."""

    generation: Generation = Field(default_factory=Generation)
    judge: Judge | None = Field(None, description="Who compares the answers of base and tuned model.")
    tasks: Annotated[list[EvaluationTask], Field(min_length=1, max_length=8), AfterValidator(_each_once)] | None = (
        Field(
            None,
            description=(
                "Tasks of lm-eval that base and tuned model do. Their data are fetched and their requests made before a GPU is asked for; the scores "
                "are computed when it has been given back."
            ),
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        )
    )
    interval_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None,
        description="Measure the held-out loss every so many optimizer steps too, not only before and after training.",
    )
    early_stopping: EarlyStopping | None = Field(
        None,
        description="End training when the held-out loss no longer falls. With output.select: Best the lowest one's weights are the result.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.earlyStopping) || has(self.intervalSteps)", _EARLY_STOPPING_MESSAGE),
            ("!has(self.judge) || self.generation.prompts > 0", _JUDGE_MESSAGE),
        )
    )

    @model_validator(mode="after")
    def _evaluations_to_stop_by(self) -> Evaluation:
        if self.early_stopping is not None and self.interval_steps is None:
            raise ValueError(_EARLY_STOPPING_MESSAGE)
        return self

    @model_validator(mode="after")
    def _judge_of_answers(self) -> Evaluation:
        if self.judge is not None and not self.generation.prompts:
            raise ValueError(_JUDGE_MESSAGE)
        return self
