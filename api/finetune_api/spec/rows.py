"""What a row of data looks like: its format, or the templates that make one of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import cel, exactly_one


class DataFormat(StrEnum):
    """Row formats. Auto detects one of the others from the first rows."""

    AUTO = "Auto"
    MESSAGES = "Messages"
    SHAREGPT = "ShareGPT"
    PROMPT_COMPLETION = "PromptCompletion"
    ALPACA = "Alpaca"
    TOKENIZED = "Tokenized"
    TEXT = "Text"


Template = Annotated[str, StringConstraints(min_length=1, max_length=16384)]

_COMPLETION_MESSAGE = "completion belongs to prompt, assistant to user, and system to either of them"


class RowTemplate(ApiModel):
    """Jinja templates that write a row from its columns: {{ question }} is the column question, {{ row['a column'] }} one whose name is
    no identifier. A row that lacks a column, or in which it is null, cannot be used, unless the template provides for it."""

    text: Template | None = Field(None, description="A text that is learned whole, as of format Text.")
    prompt: Template | None = Field(None, description="What is read before completion, a text without a chat template.")
    completion: Template | None = Field(None, description="What is learned after prompt.")
    user: Template | None = Field(None, description="A user's turn, for the chat template.")
    assistant: Template | None = Field(None, description="The answer to user, which is learned.")
    system: Template | None = Field(
        None,
        description="Stands before prompt, or is the system message before user; left out where it writes nothing.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            exactly_one("text", "prompt", "user"),
            (
                "(!has(self.completion) || has(self.prompt)) && (!has(self.assistant) || has(self.user)) && "
                "(!has(self.system) || !has(self.text))",
                _COMPLETION_MESSAGE,
            ),
        )
    )

    @property
    def format(self) -> DataFormat:
        """That of the rows that it writes."""
        return DataFormat.TEXT if self.text is not None else DataFormat.PROMPT_COMPLETION

    @property
    def teaches(self) -> bool:
        """Whether there is something to learn in them."""
        return any(part is not None for part in (self.text, self.completion, self.assistant))

    @property
    def parts(self) -> dict[str, str]:
        """The templates that are set, by field."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _one_kind(self) -> RowTemplate:
        if sum(part is not None for part in (self.text, self.prompt, self.user)) != 1:
            raise ValueError("exactly one of text, prompt, user must be set")
        whole = (
            (self.completion is None or self.prompt is not None)
            and (self.assistant is None or self.user is not None)
            and (self.system is None or self.text is None)
        )
        if not whole:
            raise ValueError(_COMPLETION_MESSAGE)
        return self
