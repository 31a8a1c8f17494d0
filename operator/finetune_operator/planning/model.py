"""What the planner reads and what it answers: plain immutable values, without clients, clocks or environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from finetune_api import KIND
from finetune_api.failures import INTERRUPTED_EXIT_CODES
from finetune_api.names import Stage
from finetune_api.progress import StageReport
from finetune_api.snapshot import Snapshot
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus, GpuStock


@dataclass(frozen=True)
class PlannerConfig:
    """Knobs of the planner; the defaults are what the tests and the chart use."""

    report_grace_seconds: float = 5.0
    """A finished Job's pod may reach the cache later than the Job: so long its report is waited for."""
    max_repeats: int = 3
    """How often a stage may finish without leaving its report before the job fails."""
    volume_grace_seconds: float = 30.0
    """Mounting takes a while; a pod whose sandbox is not ready after this waits for a volume."""
    node_grace_seconds: float = 30.0
    """A node kills a deleted pod at the end of its grace period and says so; after this much longer it is lost."""
    pod_grace_seconds: float = 10.0
    """The Job controller makes a pod within a second or two; a Job without one after this is refused its pods."""


@dataclass(frozen=True)
class JobView:
    """A FineTuneJob."""

    namespace: str
    name: str
    uid: str
    generation: int
    created: datetime
    deleting: bool
    spec: FineTuneJobSpec | None
    """Absent when the stored spec cannot be parsed."""
    spec_error: str
    status: FineTuneJobStatus
    deleted_at: datetime | None = None
    holds_output: bool = False
    """Our finalizer keeps it until its artifacts are deleted."""
    kind: str = KIND
    """An AdapterCombination is seen as far as its Job goes: without spec and status, which are its own (see CombinationView)."""

    @property
    def gpus_per_node(self) -> int | None:
        """GPUs of the training pod; None as long as they are left to a plan that is not made."""
        if self.spec is None:
            return None
        return self.spec.compute.gpus(self.status.plan.gpus_per_node if self.status.plan is not None else None)


@dataclass(frozen=True)
class StageJob:
    """A batch/v1 Job of this FineTuneJob, as far as it matters."""

    name: str
    uid: str
    stage: Stage
    created: datetime
    resource_version: int = 0
    deleting: bool = False
    suspended: bool = False
    started_at: datetime | None = None
    """When the Job controller took it up; anew after each suspension."""
    active: int = 0
    """Pods that the Job controller counts, terminating ones too: between two pods the cache may show none."""
    complete_at: datetime | None = None
    failed_at: datetime | None = None
    failed_reason: str = ""
    failed_message: str = ""
    queue: str = ""
    memory: str = ""
    """What a training Job's pods get; empty where the spec does not say."""

    @property
    def finished(self) -> bool:
        """The Job controller starts no further pod."""
        return self.complete_at is not None or self.failed_at is not None


OOM_KILLED = "OOMKilled"
"""The kubelet's word for a container that exceeded its memory limit."""


@dataclass(frozen=True)
class Pod:
    """A pod of one of the Jobs, as far as it matters."""

    name: str
    uid: str
    owner_uid: str
    stage: Stage
    created: datetime
    resource_version: int = 0
    phase: str = "Pending"
    deleting: bool = False
    deletion_due: datetime | None = None
    """When a deleted pod's grace period ends (deletionTimestamp)."""
    node: str = ""
    bound_at: datetime | None = None
    """When the API server bound it to its node."""
    unschedulable: str = ""
    """The scheduler's words, while it finds no node."""
    unschedulable_since: datetime | None = None
    waiting_reason: str = ""
    """Why the container does not run yet (containerStatuses[].state.waiting)."""
    waiting_message: str = ""
    sandbox_missing_since: datetime | None = None
    """Scheduled, but volumes or network are not ready (condition PodReadyToStartContainers False)."""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    exit_code: int | None = None
    terminated_reason: str = ""
    report: StageReport | None = None
    """The termination message, if it is one of ours."""
    raw_message: str = ""
    """The termination message, if it is not."""
    pod_reason: str = ""
    pod_message: str = ""
    disruption: str = ""
    """Reason of a DisruptionTarget condition: PreemptionByScheduler, EvictionByEvictionAPI, TerminationByKubelet, …"""
    disrupted: str = ""
    """Its words."""
    index: int = 0
    """Which of several pods that train together."""

    @property
    def ended(self) -> bool:
        """No container of it runs any more or ever will."""
        return self.phase in ("Succeeded", "Failed") or self.finished_at is not None

    @property
    def refused(self) -> bool:
        """The kubelet of its node did not take it (UnexpectedAdmissionError, OutOfcpu, …): it never ran."""
        never_ran = self.started_at is None and self.exit_code is None
        return never_ran and self.phase == "Failed" and bool(self.node and self.pod_reason) and not self.disruption

    @property
    def counts(self) -> bool:
        """Whether it is an execution of its stage. Of several pods that train together the first one is, and speaks for all: another one
        only if it ended for a reason of its own."""
        killed = self.exit_code in INTERRUPTED_EXIT_CODES and self.terminated_reason != OOM_KILLED
        own_end = self.exit_code not in (None, 0) and not killed and not self.disruption
        return self.index == 0 or self.refused or own_end

    @property
    def running(self) -> bool:
        """Its container runs."""
        return self.started_at is not None and not self.ended


@dataclass(frozen=True)
class SnapshotRecord:
    """The run snapshot as stored: its text decides, so the digest is of the text."""

    snapshot: Snapshot
    digest: str


@dataclass(frozen=True)
class Refusal:
    """The API server's last answer to a create of ours, when it was no."""

    message: str
    retry_at: datetime
    for_good: bool = False
    """Nobody but the author of the spec can mend it: what is created would be the same each time."""
    terminating: bool = False
    """The namespace is being deleted: nothing can be created in it any more."""


@dataclass(frozen=True)
class Observation:
    """Everything a plan depends on."""

    job: JobView
    now: datetime
    jobs: tuple[StageJob, ...] = ()
    pods: tuple[Pod, ...] = ()
    snapshot: SnapshotRecord | None = None
    """As stored in the ConfigMap; absent until it is known to exist."""
    refusal: Refusal | None = None
    pod_refusal: str = ""
    """The API server's words to the Job controller, which may not create the pods of a Job (a FailedCreate Event)."""
    conflict: str | None = None
    """The object that exists under a name we need and belongs to something else."""
    gone: tuple[Pod, ...] = ()
    """The last pods that have gone, as they ended. Only attempts are told of them."""
    stock: tuple[GpuStock, ...] | None = None
    """What the training pod may land on, and what is free of it; absent where nobody needs to know (see stock_wanted), or nodes tell nothing."""
    fetch_refusal: Refusal | None = None
    """The last no to a create of the fetch Job, a foreign Job of its name included: nothing else is held up by it."""


class EventType(StrEnum):
    """Event types of Kubernetes."""

    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True)
class EventNote:
    """An Event to publish."""

    type: EventType
    reason: str
    message: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete this very Job and wait for its pods (foreground)."""

    name: str
    uid: str


class Urgency(StrEnum):
    """How soon a changed status must be seen."""

    NOW = "Now"
    """The first status, a wait that begins or ends, an end."""
    SOON = "Soon"
    """A phase: settles for a moment, so that two quick changes cost one write."""
    LATER = "Later"
    """Bookkeeping: joins the next write, at the latest after the progress interval."""


@dataclass(frozen=True)
class Allotment:
    """What a training pod gets that its snapshot does not say, or says otherwise."""

    memory: str | None = None
    """Instead of compute.memory, after it was killed for exceeding that."""
    gpus_per_node: int | None = None
    """As the memory plan has it; absent where there is none."""
    avoid_gpus: tuple[str, ...] = ()
    """GPU products that its plan does not fit: it must not land on them."""


AS_ASKED = Allotment()


@dataclass(frozen=True)
class Plan:
    """What to do. Applied in this order: creates, deletes, status, events."""

    create_snapshot: bool = False
    create_job: Stage | None = None
    allotment: Allotment = AS_ASKED
    """With the training Job."""
    hold_output: bool | None = None
    """Put the finalizer on, or let the FineTuneJob go."""
    create_cleanup: bool = False
    deletes: tuple[DeleteJob, ...] = ()
    delete_self: bool = False
    status: FineTuneJobStatus | None = None
    """The whole desired status without ``progress``; absent when it is as desired."""
    urgency: Urgency = Urgency.LATER
    events: tuple[EventNote, ...] = ()
    requeue_after: float | None = None

    @property
    def idle(self) -> bool:
        """Nothing to do (now)."""
        creates = self.create_snapshot or self.create_job or self.create_cleanup
        return not (creates or self.deletes or self.delete_self or self.status or self.hold_output is not None)


@dataclass(frozen=True)
class StageFailure:
    """Why a stage failed for good."""

    reason: str
    message: str


class StageState(StrEnum):
    """Where a stage stands, from its Job and pods."""

    ABSENT = "Absent"
    STOPPING = "Stopping"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    REPORT_PENDING = "ReportPending"
    REPORT_LOST = "ReportLost"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True)
class StageView:
    """A stage as its objects tell it."""

    stage: Stage
    state: StageState
    job: StageJob | None = None
    pods: tuple[Pod, ...] = field(default=())
    """Its executions."""
    report: StageReport | None = None
    failure: StageFailure | None = None
    peers: tuple[Pod, ...] = ()
    """Other pods that train with them."""

    @property
    def occupied(self) -> bool:
        """A pod of it has not ended: no other execution may begin."""
        return any(not p.ended for p in (*self.pods, *self.peers))
