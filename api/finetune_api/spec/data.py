"""``spec.data``: rows and the checks on them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import ColumnName, cel, exactly_one
from finetune_api.spec.references import RemoteSource
from finetune_api.spec.rows import DataFormat, RowTemplate
from finetune_api.uris import DATA_URI_PATTERN

_COLUMNS_MESSAGE = "a template names the columns itself: leave columns out"
_FORMAT_MESSAGE = (
    "a template says which format its rows have: leave format out (text: Text; prompt, user: PromptCompletion)"
)
_TEACHES_MESSAGE = "rows that are trained on need something to learn: set template.completion beside prompt, template.assistant beside user"


class DataSource(RemoteSource):
    """One file, or one prefix or repository of files (json, jsonl, csv, parquet; also .gz, .bz2, .xz, .zst)."""

    uri: Annotated[str, StringConstraints(pattern=DATA_URI_PATTERN, max_length=2048)] = Field(
        description="s3://bucket/key, hf://org/dataset[/path], https://… or pvc://claim/path; a trailing / means all files below."
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="Branch, tag or commit (hf:// only)."
    )
    format: DataFormat = Field(DataFormat.AUTO, description="Row format; Auto detects it and records it in status.")
    columns: dict[str, ColumnName] | None = Field(
        None,
        description=(
            "Maps the format's field names (messages, conversations, tools, prompt, completion, instruction, input, output, system, text, "
            "input_ids, labels, attention_mask) to this source's column names."
        ),
        json_schema_extra={"maxProperties": 16},
    )
    template: RowTemplate | None = Field(
        None, description="Writes each row from its columns, where they fit no format; in the place of columns."
    )
    weight: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None,
        description=(
            "How often each of this source's training rows stands in an epoch: 2 twice, 0.25 a quarter of the rows (drawn with "
            "training.seed, the same rows in every epoch). The default is 1. Held-out rows have none."
        ),
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.revision) || self.uri.startsWith('hf://')", "revision applies to hf:// data only"),
            ("!has(self.template) || !has(self.columns)", _COLUMNS_MESSAGE),
            (
                "!has(self.template) || self.format == 'Auto' || self.format == (has(self.template.text) ? 'Text' : 'PromptCompletion')",
                _FORMAT_MESSAGE,
            ),
        )
    )

    @model_validator(mode="after")
    def _template_alone(self) -> DataSource:
        if self.template is None:
            return self
        if self.columns is not None:
            raise ValueError(_COLUMNS_MESSAGE)
        if self.format not in (DataFormat.AUTO, self.template.format):
            raise ValueError(_FORMAT_MESSAGE)
        return self


class HeldOut(ApiModel):
    """The rows that are never trained on: a fraction of the training data, or sources of their own."""

    fraction: Annotated[float, Field(gt=0, le=0.5)] | None = Field(
        None, description="Share of the rows held out, split by prompt so that no prompt stands on both sides."
    )
    sources: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = Field(
        None, description="Held-out data of their own.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            exactly_one("fraction", "sources"),
            (
                "!has(self.sources) || self.sources.all(source, !has(source.weight))",
                "every held-out row counts once: leave weight out",
            ),
        )
    )

    @model_validator(mode="after")
    def _one_of(self) -> HeldOut:
        if (self.fraction is None) == (self.sources is None):
            raise ValueError("exactly one of fraction, sources must be set")
        return self


class Overlength(StrEnum):
    """What happens to a row longer than training.maxSequenceTokens."""

    TRUNCATE = "Truncate"
    DROP = "Drop"
    FAIL = "Fail"


class NearDuplicates(ApiModel):
    """Rows that say nearly the same, by MinHash."""

    enabled: bool = Field(
        True,
        description=(
            "Count them, keep rows that are nearly the same on one side of the split by heldOut.fraction, and tell how many rows of "
            "heldOut.sources nearly stand in the training data."
        ),
    )
    threshold: Annotated[float, Field(ge=0.6, le=1)] = Field(
        0.8,
        description="Share of their runs of 16 characters that two rows have in common from which on they are near duplicates (an estimate).",
    )


class PiiPolicy(StrEnum):
    """What happens to obvious personal data: e-mail addresses, telephone, card and US social security numbers, IBANs, public IPv4
    addresses."""

    IGNORE = "Ignore"
    COUNT = "Count"
    REDACT = "Redact"


class DataChecks(ApiModel):
    """How strictly the rows are judged, before any GPU is asked for."""

    max_bad_rows: Annotated[int, Field(ge=0, le=1_000_000_000)] = Field(
        0, description="Rows that may be unusable (they are left out and listed) before the job fails."
    )
    overlength: Overlength = Field(
        Overlength.TRUNCATE, description="What to do with a row longer than training.maxSequenceTokens."
    )
    near_duplicates: NearDuplicates = Field(default_factory=NearDuplicates)
    pii: PiiPolicy = Field(
        PiiPolicy.IGNORE,
        description=(
            "Personal data of obvious form: Ignore; Count and warn; or Redact, which puts [EMAIL], [PHONE], [CREDIT_CARD], [IBAN], [SSN] or "
            "[IP_ADDRESS] in its place in all texts before anything is made of them. Names and addresses are not looked for."
        ),
    )


_PII_MESSAGE = (
    "data.checks.pii: Redact cannot find personal data in rows of token ids: give texts instead of format: Tokenized"
)


def _teaches(sources: str) -> str:
    """CEL: every template of these sources writes something to learn."""
    answers = "has(s.template.text) || has(s.template.completion) || has(s.template.assistant)"
    return f"{sources}.all(s, !has(s.template) || {answers})"


class Data(ApiModel):
    """Training data, held-out data and the checks on both."""

    train: Annotated[list[DataSource], Field(min_length=1, max_length=32)] = Field(
        description="Sources of training rows; their rows are concatenated.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    held_out: HeldOut = Field(
        default=HeldOut(fraction=0.1), description="The rows used for evaluation, never for training."
    )
    checks: DataChecks = Field(default_factory=DataChecks)
    chat_template: Annotated[str, StringConstraints(min_length=1, max_length=32768)] | None = Field(
        None,
        description=(
            "Jinja chat template in the place of the model's own, or where it has none. It is kept with the adapter and the merged model. "
            "strftime_now gives one fixed date, in any template."
        ),
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.checks.pii != 'Redact' || (self.train.all(source, source.format != 'Tokenized') && (!has(self.heldOut.sources) || "
                "self.heldOut.sources.all(source, source.format != 'Tokenized')))",
                _PII_MESSAGE,
            ),
            (_teaches("self.train"), _TEACHES_MESSAGE),
            (f"!has(self.heldOut.sources) || {_teaches('self.heldOut.sources')}", _TEACHES_MESSAGE),
        )
    )

    @model_validator(mode="after")
    def _texts_to_redact(self) -> Data:
        formats = {source.format for source in [*self.train, *(self.held_out.sources or [])]}
        if self.checks.pii is PiiPolicy.REDACT and DataFormat.TOKENIZED in formats:
            raise ValueError(_PII_MESSAGE)
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> Data:
        sources = [*self.train, *(self.held_out.sources or [])]
        if not all(source.template is None or source.template.teaches for source in sources):
            raise ValueError(_TEACHES_MESSAGE)
        return self
