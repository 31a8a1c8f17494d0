"""Types of single fields: Kubernetes' names, labels and quantities, and the CEL rules that a JSON schema cannot say."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", min_length=1, max_length=253)]
Quantity = Annotated[
    str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$", min_length=1, max_length=32)
]
MAX_MODULE = 128
_MODULE = r"^[A-Za-z0-9_.-]+$"
_MODULE_MESSAGE = "every key must be a module's name such as q_proj or layers.0.mlp.up_proj"
ModuleName = Annotated[str, StringConstraints(pattern=_MODULE, min_length=1, max_length=MAX_MODULE)]
ModulePattern = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_.*?!\[\]-]+$", min_length=1, max_length=MAX_MODULE)
]
"""A module's name, or a pattern of names (:func:`finetune_api.targets.is_pattern`)."""
TokenText = Annotated[str, StringConstraints(min_length=1, max_length=64)]
NewToken = Annotated[str, StringConstraints(pattern=r"^\S(.*\S)?$", min_length=1, max_length=64)]
LabelValue = Annotated[str, StringConstraints(pattern=r"^(([A-Za-z0-9][A-Za-z0-9_.-]*)?[A-Za-z0-9])?$", max_length=63)]
ShortText = Annotated[str, StringConstraints(max_length=4096)]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=256)]

MAX_ENTRIES = 32
MAX_KEY = 317
"""A prefix of 253, a slash and a name of 63 characters."""
_NAME = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_DOMAIN = "[a-z0-9]([a-z0-9-]*[a-z0-9])?([.][a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
KEY_PATTERN = f"^({_DOMAIN}/)?{_NAME}$"
_KEYS_MESSAGE = "every key must be a name such as team or example.com/team, of letters, digits, '-', '_' and '.'"


def cel(*rules: tuple[str, str]) -> dict[str, Any]:
    """JSON-schema extra that carries CEL ``(rule, message)`` pairs into the CRD."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


def exactly_one(*fields: str) -> tuple[str, str]:
    """CEL rule: exactly one of ``fields`` is set."""
    count = " + ".join(f"(has(self.{f}) ? 1 : 0)" for f in fields)
    return f"{count} == 1", f"exactly one of {', '.join(fields)} must be set"


LABEL_KEYS: dict[str, Any] = {
    "maxProperties": MAX_ENTRIES,
    **cel((f"self.all(k, size(k) <= {MAX_KEY} && k.matches('{KEY_PATTERN}'))", _KEYS_MESSAGE)),
}
"""JSON-schema extra of maps whose keys are those of labels or annotations: a schema constrains only the values."""


def _qualified_keys(value: dict[str, str]) -> dict[str, str]:
    bad = next((k for k in value if len(k) > MAX_KEY or not re.fullmatch(KEY_PATTERN, k)), None)
    if bad is not None:
        raise ValueError(f"{bad!r}: {_KEYS_MESSAGE}")
    return value


MODULE_KEYS: dict[str, Any] = {
    "maxProperties": MAX_ENTRIES,
    **cel((f"self.all(k, size(k) <= {MAX_MODULE} && k.matches('{_MODULE}'))", _MODULE_MESSAGE)),
}
"""JSON-schema extra of maps whose keys are names of modules."""

LabelMap = Annotated[dict[str, LabelValue], AfterValidator(_qualified_keys)]
AnnotationMap = Annotated[dict[str, ShortText], AfterValidator(_qualified_keys)]


def _module_names(value: dict[str, int]) -> dict[str, int]:
    bad = next((k for k in value if len(k) > MAX_MODULE or not re.fullmatch(_MODULE, k)), None)
    if bad is not None:
        raise ValueError(f"{bad!r}: {_MODULE_MESSAGE}")
    return value


Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[int, Field(ge=1, le=4096)]
RankMap = Annotated[dict[str, Rank], AfterValidator(_module_names)]
AlphaMap = Annotated[dict[str, Alpha], AfterValidator(_module_names)]
"""By the names of modules."""
