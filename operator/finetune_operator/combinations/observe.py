"""An AdapterCombination as it arrives, parsed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_api import COMBINATION_KIND
from finetune_api.combination import AdapterCombinationStatus
from finetune_api.spec import AdapterCombinationSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.observe import time_of, version_of
from finetune_operator.planning.combination import CombinationView
from finetune_operator.planning.conditions import conditions_in_order
from finetune_operator.planning.model import JobView

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
    spec, error = _parse_spec(raw.get("spec") or {})
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
    return CachedCombination(job, version_of(meta), spec, error, _parse_status(raw.get("status") or {}))


def _parse_spec(raw: Raw) -> tuple[AdapterCombinationSpec | None, str]:
    """A field that only a newer schema knows fails nothing."""
    try:
        return AdapterCombinationSpec.model_validate(raw, extra="ignore"), ""
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("spec", *first["loc"]))
        return None, f"{place}: {first['msg']}"


def _parse_status(raw: Raw) -> AdapterCombinationStatus:
    """One that cannot be read is decided anew from the Job, which is there for as long as the resource is."""
    try:
        status = AdapterCombinationStatus.model_validate(raw, extra="ignore")
    except ValidationError:
        return AdapterCombinationStatus()
    return status.model_copy(update={"conditions": conditions_in_order(status.conditions)})
