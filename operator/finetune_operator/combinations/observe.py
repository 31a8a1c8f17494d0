"""An AdapterCombination as it arrives, parsed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api import COMBINATION_KIND
from finetune_api.combination import AdapterCombinationStatus
from finetune_api.spec import AdapterCombinationSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.observe import parse_spec, read_status, time_of, version_of
from finetune_operator.planning.combination import CombinationView
from finetune_operator.planning.conditions import conditions_in_order
from finetune_operator.planning.model import JobView
from finetune_operator.unknown import unknown_fields

Raw = dict[str, Any]


@dataclass(frozen=True)
class CachedCombination:
    """As cached."""

    job: JobView
    """As far as its Job goes."""
    resource_version: int
    spec: AdapterCombinationSpec | None
    spec_error: str
    status: AdapterCombinationStatus
    unknown: Raw
    """Status fields that only a newer version knows."""

    @property
    def uid(self) -> str:
        """Its UID."""
        return self.job.uid

    def view(self) -> CombinationView:
        """As the planner sees it."""
        return CombinationView(self.spec, self.spec_error, self.status)


def trim_combination(raw: Raw) -> CachedCombination:
    """Parse an AdapterCombination."""
    meta = raw["metadata"]
    spec, error = parse_spec(AdapterCombinationSpec, raw.get("spec") or {})
    told = raw.get("status") or {}
    status = read_status(AdapterCombinationStatus, told)
    job = JobView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        generation=int(meta.get("generation") or 1),
        created=time_of(meta.get("creationTimestamp")),
        deleting=bool(meta.get("deletionTimestamp")),
        spec=None,
        spec_error="",
        status=FineTuneJobStatus(),
        kind=COMBINATION_KIND,
    )
    ordered = status.model_copy(update={"conditions": conditions_in_order(status.conditions)})
    return CachedCombination(job, version_of(meta), spec, error, ordered, unknown_fields(told, status))
