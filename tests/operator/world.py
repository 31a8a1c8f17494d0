"""A small model of a cluster for the planner's tests: applies plans, and lets pods and Job controllers act."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from finetune_api.names import Stage, stage_job_name
from finetune_api.progress import StageReport
from finetune_api.snapshot import Images, JobIdentity, make_snapshot
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus, ProgressStatus
from finetune_operator.manifests import Owner, stage_job
from finetune_operator.planning import Observation, Plan, plan
from finetune_operator.planning.model import EventNote, JobView, Pod, Refusal, SnapshotRecord, StageJob
from finetune_operator.settings import Settings
from tests.operator.manifests import finetunejob, success

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
UID = "3f9c2a11-0000-4000-8000-000000000000"


@dataclass
class World:
    """One FineTuneJob and what exists for it."""

    spec: FineTuneJobSpec
    now: datetime = START
    status: FineTuneJobStatus = field(default_factory=FineTuneJobStatus)
    jobs: dict[str, StageJob] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    snapshot: SnapshotRecord | None = None
    refusal: Refusal | None = None
    fetch_refusal: Refusal | None = None
    pod_refusal: str = ""
    conflict: str | None = None
    deleting: bool = False
    skew: float = 0.0
    """How many seconds the operator's clock is ahead of the API server's."""
    node_skew: float = 0.0
    """How many seconds the nodes' clocks are ahead of it: containers' times are theirs."""
    held: bool = False
    ended: list[Pod] = field(default_factory=list)
    """Pods whose end was seen as they went."""
    deleted_at: datetime | None = None
    gone: bool = False
    generation: int = 1
    events: list[EventNote] = field(default_factory=list)
    numbers: int = 0

    # What the operator does

    def observe(self) -> Observation:
        view = JobView(
            "ns",
            "story",
            UID,
            self.generation,
            START,
            self.deleting,
            self.spec,
            "",
            self.status,
            self.deleted_at,
            self.held,
        )
        return Observation(
            view,
            self.now + timedelta(seconds=self.skew),
            tuple(self.jobs.values()),
            tuple(self.pods.values()),
            self.snapshot,
            self.refusal,
            self.pod_refusal,
            self.conflict,
            tuple(self.ended),
            fetch_refusal=self.fetch_refusal,
        )

    def plan(self) -> Plan:
        return plan(self.observe())

    def apply(self, decided: Plan) -> None:
        """As the reconciler does: a plan that creates is followed by a new look, not by its status."""
        if decided.hold_output is not None:
            self.held = decided.hold_output
            self.events.extend(decided.events)
            self.gone = self.deleting and not self.held
            return
        if decided.create_cleanup:
            self.create_job(Stage.CLEANUP)
            return
        if decided.create_snapshot:
            self.make_snapshot()
        if decided.create_job is not None:
            self.create_job(decided.create_job, decided.allotment.memory)
            return
        for delete in decided.deletes:
            job = self.jobs[delete.name]
            assert job.uid == delete.uid
            self.jobs[delete.name] = replace(job, deleting=True)
            for pod in [p for p in self.pods.values() if p.owner_uid == job.uid]:
                self.pods[pod.name] = replace(pod, deleting=True)
        if decided.delete_self:
            self.gone = True
        if decided.status is not None:
            progress = self.status.progress
            # Through JSON, as the API server would.
            text = decided.status.model_dump_json(by_alias=True, exclude_none=True)
            self.status = FineTuneJobStatus.model_validate_json(text).model_copy(update={"progress": progress})
            self.events.extend(decided.events)

    def settle(self, limit: int = 12) -> Plan:
        """Apply plans until there is nothing to do; the last plan."""
        for _ in range(limit):
            decided = self.plan()
            if decided.idle or self.gone:
                return decided
            self.apply(decided)
        raise AssertionError(f"no fixed point: {decided}")

    def make_snapshot(self) -> None:
        identity = JobIdentity(name="story", namespace="ns", uid=UID, generation=1)
        snapshot = make_snapshot(self.spec, identity, Images(prepare="p", train="t"), "1")
        self.snapshot = SnapshotRecord(snapshot, snapshot.digest())

    def create_job(self, stage: Stage, memory: str | None = None) -> None:
        name = stage_job_name("story", UID, stage)
        assert name not in self.jobs, "the API server would answer 409"
        self.jobs[name] = StageJob(name, self._uid("job"), stage, self.now, memory=memory or "")

    # What the cluster does

    def _uid(self, kind: str) -> str:
        self.numbers += 1
        return f"{kind}-{self.numbers}"

    def job(self, stage: Stage) -> StageJob | None:
        return next((j for j in self.jobs.values() if j.stage is stage), None)

    def live_job(self) -> StageJob | None:
        return next((j for j in self.jobs.values() if not j.finished and not j.deleting), None)

    def pod(self) -> Pod | None:
        return next((p for p in self.pods.values() if not p.ended and not p.deleting), None)

    def start_pod(self) -> None:
        job = self.live_job()
        if job is None or job.suspended or any(p.owner_uid == job.uid and not p.ended for p in self.pods.values()):
            return
        uid = self._uid("pod")
        self.pods[uid] = Pod(uid, uid, job.uid, job.stage, self.now)

    def change_pod(self, **fields: object) -> None:
        pod = self.pod()
        if pod is not None:
            self.pods[pod.name] = replace(pod, **fields)  # type: ignore[arg-type]

    def run_pod(self) -> None:
        self.change_pod(
            phase="Running",
            node="gpu-7",
            started_at=self.now + timedelta(seconds=self.node_skew),
            unschedulable="",
            unschedulable_since=None,
            waiting_reason="",
        )

    def end_pod(self, code: int = 0, report: StageReport | None = None) -> None:
        """The pod ends, and the Job controller does what the real Job's failure policy says."""
        pod = self.pod()
        if pod is None or not pod.running:
            return
        finished = self.now + timedelta(seconds=self.node_skew)
        self.change_pod(phase="Failed" if code else "Succeeded", finished_at=finished, exit_code=code, report=report)
        job = next((j for j in self.jobs.values() if j.uid == pod.owner_uid), None)
        if job is None:
            return
        if code == 0:
            self.jobs[job.name] = replace(job, complete_at=self.now)
            return
        self._count_failure(job, pod, code)

    def refuse_pod(self, reason: str = "UnexpectedAdmissionError") -> None:
        """Its node does not take it."""
        pod = self.pod()
        if pod is None or pod.running:
            return
        words = "Pod was rejected: Allocate failed due to no healthy devices present"
        self.change_pod(phase="Failed", node="gpu-7", pod_reason=reason, pod_message=words)
        job = next((j for j in self.jobs.values() if j.uid == pod.owner_uid), None)
        if job is not None:
            self._count_failure(job, pod, None)

    def _count_failure(self, job: StageJob, pod: Pod, code: int | None) -> None:
        action = self._action(self.pods[pod.name])
        if action == "FailJob":
            words = f"Container {job.stage} for pod ns/{pod.name} failed with exit code {code} matching FailJob rule at index 1"
            self.jobs[job.name] = replace(
                job, failed_at=self.now, failed_reason="PodFailurePolicy", failed_message=words
            )
        elif action == "Count":
            mine = [p for p in self.pods.values() if p.owner_uid == job.uid and p.phase == "Failed"]
            counted = [p for p in mine if self._action(p) == "Count"]
            if len(counted) > self.spec.recovery.max_failures:
                self.jobs[job.name] = replace(job, failed_at=self.now, failed_reason="BackoffLimitExceeded")

    def _action(self, pod: Pod) -> str:
        assert self.snapshot is not None
        body = stage_job(Owner("ns", "story", UID), self.snapshot, pod.stage, Settings())
        for rule in body["spec"]["podFailurePolicy"]["rules"]:
            if "onPodConditions" in rule and pod.disruption:
                return str(rule["action"])
            if pod.exit_code in rule.get("onExitCodes", {}).get("values", ()):
                return str(rule["action"])
        return "Count"

    def pass_stage(self, trained: bool = False) -> None:
        """The current stage's Job starts a pod, which ends well."""
        self.settle()
        job = self.live_job()
        assert job is not None
        self.start_pod()
        self.run_pod()
        self.settle()
        self.tick(10)
        self.end_pod(0, success(job.stage, trained))

    def collect(self) -> None:
        """Finish foreground deletions."""
        for pod in [p for p in self.pods.values() if p.deleting]:
            del self.pods[pod.name]
            job = next((j for j in self.jobs.values() if j.uid == pod.owner_uid), None)
            if job is not None:  # the Job controller still counts it until it makes the next
                self.jobs[job.name] = replace(job, active=1)
        for job in [j for j in self.jobs.values() if j.deleting]:
            if not any(p.owner_uid == job.uid for p in self.pods.values()):
                del self.jobs[job.name]

    def drop_pods(self) -> None:
        """Somebody deletes the ended pods."""
        for pod in [p for p in self.pods.values() if p.ended]:
            del self.pods[pod.name]

    def tick(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def post(self, progress: ProgressStatus) -> None:
        self.status = self.status.model_copy(update={"progress": progress})


def world(**spec: object) -> World:
    """A world with the smallest FineTuneJob and these spec fields (camelCase)."""
    raw = finetunejob("story").set(**spec).build()["spec"]
    return World(FineTuneJobSpec.model_validate(raw))
