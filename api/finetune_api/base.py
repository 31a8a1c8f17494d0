"""Base class of every model that appears in YAML or JSON: camelCase outside, snake_case inside."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class ApiModel(BaseModel):
    """A strict, immutable value: unknown fields are refused, as the apiserver refuses them with strict validation."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        frozen=True,
    )

    def to_json_dict(self) -> dict[str, object]:
        """The camelCase JSON form, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
