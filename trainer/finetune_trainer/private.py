"""What of a job's configuration may be passed around."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

from finetune_api.snapshot import Snapshot
from finetune_api.spec import AdapterCombinationSpec, FineTuneJobSpec

PRIVATE = ("runtime",)
"""Of the specification, what is left out: environment variables may hold keys."""
HIDDEN = "…"


def shareable(spec: FineTuneJobSpec | AdapterCombinationSpec) -> dict[str, Any]:
    """The specification without what may be secret."""
    asked: dict[str, Any] = without_credentials({k: v for k, v in spec.to_json_dict().items() if k not in PRIVATE})
    return asked


def shareable_snapshot(snapshot: Snapshot) -> dict[str, object]:
    """The snapshot, whose digest stays that of the whole, without what may be secret: in addresses, and the values of environment
    variables."""
    shown: dict[str, Any] = without_credentials(snapshot.to_json_dict())
    for variable in shown["spec"].get("runtime", {}).get("env", []):
        variable["value"] = HIDDEN
    return shown


def without_credentials(value: Any) -> Any:
    """The same, with every web address without user and query: those of signed URLs are secrets."""
    if isinstance(value, dict):
        return {k: without_credentials(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("http://", "https://")):
        return value
    try:
        parts = urlsplit(value)
    except ValueError:  # such as brackets that are not closed: what its parts are, nobody knows
        return f"{value.partition(':')[0]}://…"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
