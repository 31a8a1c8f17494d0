"""Fields of a status that only a newer version knows.

A server-side apply without them would delete them: they are written again as they were read, so that an operator that is rolled back
for a while, or upgraded after another replica, destroys nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from finetune_api.base import ApiModel

Raw = dict[str, Any]


@cache
def _list_keys(model: type[ApiModel]) -> dict[str, str]:
    """Which field tells the items of a model's keyed lists apart."""
    found = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        keys = extra.get("x-kubernetes-list-map-keys") if isinstance(extra, dict) else None
        if isinstance(keys, list):
            found[field.alias or name] = str(keys[0])
    return found


def unknown_fields(raw: Raw, read: ApiModel) -> Raw:
    """What of a JSON object its model does not know, in the object's own shape; items of keyed lists by their key.

    (Atomic lists are left out: their items belong to whoever writes the list.)
    """
    names = {field.alias or name: name for name, field in type(read).model_fields.items()}
    keys = _list_keys(type(read))
    found: Raw = {}
    for alias, value in raw.items():
        if alias not in names:
            found[alias] = value
            continue
        known = getattr(read, names[alias])
        inner: Raw = {}
        if isinstance(known, ApiModel) and isinstance(value, dict):
            inner = unknown_fields(value, known)
        elif alias in keys and isinstance(value, list):
            inner = _of_items(value, known, keys[alias])
        if inner:
            found[alias] = inner
    return found


def _of_items(raw: list[Raw], read: list[ApiModel], key: str) -> Raw:
    by_key = {item.to_json_dict()[key]: item for item in read}
    fields = {i[key]: unknown_fields(i, by_key[i[key]]) for i in raw if i.get(key) in by_key}
    return {name: inner for name, inner in fields.items() if inner}


def with_unknown(body: Raw, unknown: Raw, model: type[ApiModel]) -> Raw:
    """What is to be written, with the fields of what was read that we do not know. What we removed on purpose stays removed."""
    names = {field.alias or name for name, field in model.model_fields.items()}
    result = dict(body)
    for alias, value in unknown.items():
        there = body.get(alias)
        if alias not in names:
            result[alias] = value
        elif isinstance(there, list):
            key = _list_keys(model)[alias]
            result[alias] = [{**value.get(item[key], {}), **item} for item in there]
        elif isinstance(there, dict):
            result[alias] = _merged(there, value)
    return result


def _merged(body: Raw, unknown: Raw) -> Raw:
    """Nested objects, in which whatever is known wins."""
    result = {**unknown, **body}
    for name, value in unknown.items():
        if isinstance(value, dict) and isinstance(body.get(name), dict):
            result[name] = _merged(body[name], value)
    return result
