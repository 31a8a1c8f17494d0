"""Trims API objects to what the planner reads, once, when they arrive: a Pod of 7 kB becomes a handful of fields."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune_api.base import ApiModel
from finetune_api.names import (
    ANNOTATION_MEMORY,
    FINALIZER_DELETE_OUTPUT,
    LABEL_NAME,
    LABEL_STAGE,
    LABEL_UID,
    Stage,
    stage_job_name,
)
from finetune_api.progress import StageReport
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.planning.clock import parse_time
from finetune_operator.planning.conditions import in_order
from finetune_operator.planning.model import JobView, Pod, StageJob
from finetune_operator.unknown import unknown_fields

Raw = dict[str, Any]
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
M = TypeVar("M", bound=ApiModel)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class CachedJob:
    """A FineTuneJob as cached: parsed lazily, as the spec changes once and the status often."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: int
    created: datetime
    deleting: bool
    spec: FineTuneJobSpec | None
    spec_error: str
    status: FineTuneJobStatus
    deleted_at: datetime | None = None
    finalizers: tuple[str, ...] = ()
    unknown: Raw = field(default_factory=dict)
    """Status fields that only a newer version knows; empty but for a while after it was rolled back."""

    def view(self) -> JobView:
        """As the planner sees it."""
        return JobView(
            namespace=self.namespace,
            name=self.name,
            uid=self.uid,
            generation=self.generation,
            created=self.created,
            deleting=self.deleting,
            spec=self.spec,
            spec_error=self.spec_error,
            status=self.status,
            deleted_at=self.deleted_at,
            holds_output=FINALIZER_DELETE_OUTPUT in self.finalizers,
        )


def version_of(meta: Raw) -> int:
    """resourceVersion as a number: since Kubernetes 1.35 the documentation allows the comparison that etcd always did."""
    text = str(meta.get("resourceVersion") or "0")
    return int(text) if text.isdigit() else 0


def time_of(text: str | None) -> datetime:
    """A time of Kubernetes; long ago for none."""
    return parse_time(text) or _EPOCH


def _first(conditions: list[Raw] | None, kind: str) -> Raw | None:
    return next((c for c in conditions or [] if c.get("type") == kind and c.get("status") == "True"), None)


def trim_finetunejob(raw: Raw, known: CachedJob | None) -> CachedJob:
    """Parse a FineTuneJob; an unchanged spec (same UID and generation) is not parsed again."""
    meta = raw["metadata"]
    generation = int(meta.get("generation") or 1)
    spec: FineTuneJobSpec | None
    if known is not None and known.uid == meta["uid"] and known.generation == generation:
        spec, error = known.spec, known.spec_error
    else:
        spec, error = parse_spec(FineTuneJobSpec, raw.get("spec") or {})
    told = raw.get("status") or {}
    status = parse_status(told)
    return CachedJob(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        generation=generation,
        resource_version=version_of(meta),
        created=time_of(meta.get("creationTimestamp")),
        deleting=bool(meta.get("deletionTimestamp")),
        spec=spec,
        spec_error=error,
        status=status,
        deleted_at=parse_time(meta.get("deletionTimestamp")),
        finalizers=tuple(meta.get("finalizers") or ()),
        unknown=unknown_fields(told, status),
    )


def parse_spec(model: type[M], raw: Raw) -> tuple[M | None, str]:
    """What the API server has admitted is not judged again: a field that only a newer schema knows fails nothing that runs."""
    try:
        return model.model_validate(raw, extra="ignore"), ""
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return None, f"spec.{place}: {first['msg']}"


def parse_status(raw: Raw) -> FineTuneJobStatus:
    """A FineTuneJob's status, in our order."""
    return in_order(read_status(FineTuneJobStatus, raw))


def read_status(model: type[M], raw: Raw) -> M:
    """Parse a status that another version may have written: fields it does not know are ignored, and of what it cannot read
    only that item or field is left out. A condition lost is a job run again."""
    raw = dict(raw)
    for _ in range(len(raw) + 1):
        try:
            return model.model_validate(raw, extra="ignore")
        except ValidationError as problem:
            places = {tuple(e["loc"][:2]) for e in problem.errors(include_url=False, include_input=False)}
        for name in {str(place[0]) for place in places}:
            bad = {place[1] for place in places if place[0] == name and len(place) > 1}
            value = raw.pop(name, None)
            if isinstance(value, list):
                raw[name] = [item for index, item in enumerate(value) if index not in bad]
    return model()


def owner_uid(meta: Raw) -> str:
    """UID of the controller owner."""
    return next((str(r["uid"]) for r in meta.get("ownerReferences") or [] if r.get("controller")), "")


def finetunejob_uid(raw: Raw) -> str:
    """UID of the FineTuneJob that a Job or Pod is labelled with."""
    return str((raw["metadata"].get("labels") or {}).get(LABEL_UID, ""))


def _is_ours(meta: Raw, labels: Raw, stage: Stage) -> bool:
    """A Job is its controller's; cleanup has none (it must outlive the FineTuneJob) and is known by its name."""
    name, uid = str(labels.get(LABEL_NAME, "")), str(labels.get(LABEL_UID, ""))
    if stage is Stage.CLEANUP:
        return not owner_uid(meta) and meta["name"] == stage_job_name(name, uid, stage)
    return owner_uid(meta) == uid


def trim_job(raw: Raw) -> StageJob | None:
    """A Job of ours; None for one that only bears the label (its controller owner must agree)."""
    meta = raw["metadata"]
    labels = meta.get("labels") or {}
    stage = labels.get(LABEL_STAGE)
    if stage not in set(Stage) or not _is_ours(meta, labels, Stage(stage)):
        return None
    status = raw.get("status") or {}
    conditions = status.get("conditions")
    complete = _first(conditions, "Complete")
    # FailureTarget comes first, while the last pods still stop; both carry the reason and the message.
    failed = _first(conditions, "Failed") or _first(conditions, "FailureTarget")
    return StageJob(
        name=meta["name"],
        uid=meta["uid"],
        stage=Stage(stage),
        created=time_of(meta.get("creationTimestamp")),
        resource_version=version_of(meta),
        deleting=bool(meta.get("deletionTimestamp")),
        # Resumed, but the Job controller has not noticed yet: startTime and the pods still are those of before.
        suspended=bool((raw.get("spec") or {}).get("suspend")) or _first(conditions, "Suspended") is not None,
        started_at=parse_time(status.get("startTime")),
        active=int(status.get("active") or 0) + int(status.get("terminating") or 0),
        complete_at=time_of(complete.get("lastTransitionTime")) if complete else None,
        failed_at=time_of(failed.get("lastTransitionTime")) if failed else None,
        failed_reason=str(failed.get("reason") or "") if failed else "",
        failed_message=str(failed.get("message") or "") if failed else "",
        queue=str(labels.get(QUEUE_LABEL, "")),
        memory=str((meta.get("annotations") or {}).get(ANNOTATION_MEMORY, "")),
    )


def trim_pod(raw: Raw) -> Pod | None:
    """A pod of one of our Jobs."""
    meta = raw["metadata"]
    stage = (meta.get("labels") or {}).get(LABEL_STAGE)
    if stage not in set(Stage):
        return None
    status = raw.get("status") or {}
    conditions = status.get("conditions") or []
    # By name: an injected sidecar may stand first, and it may even end first.
    container: Raw = next((c for c in status.get("containerStatuses") or [] if c.get("name") == stage), {})
    state = container.get("state") or {}
    waiting, running, ended = state.get("waiting") or {}, state.get("running") or {}, state.get("terminated") or {}
    message = str(ended.get("message") or "")
    report = parse_report(message)
    scheduled: Raw = next((c for c in conditions if c.get("type") == "PodScheduled"), {})
    bound = parse_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None
    refused = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
    sandbox = next(
        (c for c in conditions if c.get("type") == "PodReadyToStartContainers" and c.get("status") == "False"), None
    )
    disruption = _first(conditions, "DisruptionTarget")
    phase = str(status.get("phase") or "Pending")
    node = str((raw.get("spec") or {}).get("nodeName") or "")
    started = running.get("startedAt") or ended.get("startedAt")
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        owner_uid=owner_uid(meta),
        stage=Stage(stage),
        created=time_of(meta.get("creationTimestamp")),
        resource_version=version_of(meta),
        phase=phase,
        deleting=bool(meta.get("deletionTimestamp")),
        deletion_due=parse_time(meta.get("deletionTimestamp")),
        node=node,
        bound_at=bound,
        unschedulable=str(scheduled.get("message") or "no node fits") if refused else "",
        unschedulable_since=time_of(scheduled.get("lastTransitionTime")) if refused else None,
        waiting_reason=str(waiting.get("reason") or ""),
        waiting_message=str(waiting.get("message") or ""),
        sandbox_missing_since=time_of(sandbox.get("lastTransitionTime")) if sandbox and node and not started else None,
        started_at=parse_time(started),
        finished_at=parse_time(ended.get("finishedAt")),
        exit_code=ended.get("exitCode"),
        terminated_reason=str(ended.get("reason") or ""),
        report=report,
        raw_message="" if report else message[:1024],
        pod_reason=str(status.get("reason") or ""),
        pod_message=str(status.get("message") or "")[:1024],
        index=int((meta.get("annotations") or {}).get(COMPLETION_INDEX, 0)),
        disruption=str(disruption.get("reason") or "") if disruption else "",
        disrupted=str(disruption.get("message") or disruption.get("reason") or "disrupted") if disruption else "",
    )


def parse_report(message: str) -> StageReport | None:
    """A termination message of our entry point; None for anything else (a kubelet's words, an empty file)."""
    if not message.startswith("{"):
        return None
    try:
        return StageReport.model_validate(json.loads(message), extra="ignore")
    except (ValueError, ValidationError):
        return None
