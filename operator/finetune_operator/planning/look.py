"""One look at a job: the observation and what follows from it before any decision is made."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from finetune_api.failures import Reason
from finetune_api.names import PIPELINE, Stage
from finetune_api.results import PrepareReport, PublishReport, TrainMetrics, TrainReport
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_operator.planning import conditions
from finetune_operator.planning.attempts import Ledger, executions, keep_ledger
from finetune_operator.planning.budget import HANDED_BACK, wanted_memory
from finetune_operator.planning.clock import parse_time
from finetune_operator.planning.model import (
    Observation,
    PlannerConfig,
    StageFailure,
    StageJob,
    StageState,
    StageView,
)
from finetune_operator.planning.outcome import stage_view
from finetune_operator.planning.waiting import Wait, find_wait


@dataclass(frozen=True)
class Look:
    """Derived facts, computed when first asked for."""

    obs: Observation
    config: PlannerConfig

    @property
    def now(self) -> datetime:
        """The moment of the observation."""
        return self.obs.now

    @property
    def before(self) -> FineTuneJobStatus:
        """The status as last written."""
        return self.obs.job.status

    @property
    def spec(self) -> FineTuneJobSpec:
        """The spec; rules that run after the validity check may rely on it."""
        assert self.obs.job.spec is not None
        return self.obs.job.spec

    @cached_property
    def views(self) -> dict[Stage, StageView]:
        """Each stage's state."""
        return {stage: stage_view(self.obs, stage, self.config) for stage in PIPELINE}

    @cached_property
    def ledger(self) -> Ledger:
        """Attempts and running time."""
        gone = tuple(pod for pod in self.obs.gone if pod.counts and pod.stage in PIPELINE)
        return keep_ledger(self.before, tuple(self.views.values()), self.now, gone)

    @cached_property
    def prepare_report(self) -> PrepareReport | None:
        """prepare's result, while its Job tells it."""
        view = self.views[Stage.PREPARE]
        return (
            PrepareReport.model_validate(view.report.result, extra="ignore")
            if view.state is StageState.SUCCEEDED and view.report
            else None
        )

    @cached_property
    def prepare_told_in_passing(self) -> bool:
        """Only a post tells prepare's result, the next stage's posts replace it, and status does not hold what follows from it yet."""
        told = any(p.report is not None and p.report.succeeded for p in self.views[Stage.PREPARE].pods)
        return self.prepare_report is not None and not told and self.before.data is None

    @cached_property
    def fetch_job(self) -> StageJob | None:
        """The Job that brings the base model into the cache while training is queued."""
        return next((j for j in self.obs.jobs if j.stage is Stage.FETCH), None)

    @cached_property
    def train_report(self) -> TrainReport | None:
        """train's result, while its Job tells it."""
        view = self.views[Stage.TRAIN]
        return (
            TrainReport.model_validate(view.report.result, extra="ignore")
            if view.state is StageState.SUCCEEDED and view.report
            else None
        )

    @cached_property
    def publish_report(self) -> PublishReport | None:
        """publish's result, while its Job tells it."""
        view = self.views[Stage.PUBLISH]
        return (
            PublishReport.model_validate(view.report.result, extra="ignore")
            if view.state is StageState.SUCCEEDED and view.report
            else None
        )

    @cached_property
    def metrics(self) -> TrainMetrics | None:
        """What training measured, as far as a stage tells it: publish repeats it."""
        told = self.publish_report or self.train_report
        return told.metrics if told is not None else None

    @cached_property
    def train_unneeded(self) -> bool:
        """prepare found a complete training result of this snapshot."""
        return self.prepare_report is not None and self.prepare_report.trained

    @cached_property
    def trained(self) -> bool:
        """Training is behind us: a later Job exists, its own Job is complete, or status remembers.

        A lost report of a complete training Job stops nothing: publish repeats the metrics.
        """
        return (
            self.views[Stage.PUBLISH].job is not None
            or self.views[Stage.TRAIN].state in (StageState.SUCCEEDED, StageState.REPORT_LOST)
            or self.train_unneeded
            or conditions.is_true(self.before, ConditionType.TRAINED)
        )

    @cached_property
    def prepared(self) -> bool:
        """Preparation is behind us."""
        train, prepare = self.views[Stage.TRAIN], self.views[Stage.PREPARE]
        if self.trained or train.job is not None or train.occupied:
            return True
        if self.training_vanished:
            return prepare.state is StageState.SUCCEEDED and not self.prepare_is_old
        return prepare.state is StageState.SUCCEEDED or conditions.is_true(self.before, ConditionType.PREPARED)

    @cached_property
    def handed_back(self) -> StageFailure | None:
        """Why training gave its GPU back, while its Job is there to tell."""
        view = self.views[Stage.TRAIN]
        return view.failure if view.failure is not None and view.failure.reason in HANDED_BACK else None

    @cached_property
    def training_vanished(self) -> bool:
        """A training Job has run and is gone: its result may be in the bucket, so prepare looks before a GPU is asked for.

        Not after an execution that exceeded its memory: that has no result, and its successor only needs more memory.
        """
        ran = executions(self.ledger, Stage.TRAIN)
        return (
            self.views[Stage.TRAIN].job is None
            and self._train_created is not None
            and bool(ran)
            and ran[-1].reason != Reason.HOST_OUT_OF_MEMORY
        )

    @cached_property
    def prepare_is_old(self) -> bool:
        """Prepare ran before the training Job that vanished. Both times are the API server's; within one second it is run again."""
        job, created = self.views[Stage.PREPARE].job, self._train_created
        return job is not None and created is not None and job.created <= created

    @cached_property
    def _train_created(self) -> datetime | None:
        return next((parse_time(s.started_at) for s in self.before.stages if s.stage == Stage.TRAIN), None)

    @cached_property
    def wanted_memory(self) -> str | None:
        """What the training pod should have."""
        return wanted_memory(self.ledger.attempts, self.spec)

    @cached_property
    def attempts_recorded(self) -> bool:
        """Status holds every end that was seen: what is counted from it may now lose its pod."""
        known = {a.execution_id for a in self.before.attempts if a.outcome != "Running"}
        return all(a.execution_id in known for a in self.ledger.attempts if a.outcome != "Running")

    @cached_property
    def executions_recorded(self) -> bool:
        """Status holds every end and every execution that was seen: none is forgotten if all pods go now."""
        known = {a.execution_id for a in self.before.attempts}
        return self.attempts_recorded and all(a.execution_id in known for a in self.ledger.attempts)

    @cached_property
    def stage(self) -> Stage:
        """The stage that is to run now."""
        return Stage.PUBLISH if self.trained else Stage.TRAIN if self.prepared else Stage.PREPARE

    @cached_property
    def view(self) -> StageView:
        """The current stage's state."""
        return self.views[self.stage]

    @cached_property
    def wait(self) -> Wait | None:
        """What the current stage waits for."""
        return find_wait(self.obs, self.view, self.config)

    @cached_property
    def waiting_since(self) -> datetime | None:
        """Since when that one thing has been missing: remembered in status, so that a restart does not start the clock anew."""
        if self.wait is None:
            return None
        condition = conditions.find(self.before, ConditionType.WAITING)
        remembered = parse_time(self.before.waiting_since)
        if condition is not None and condition.status == "True" and condition.reason == self.wait.reason and remembered:
            return remembered
        return min(self.wait.since or self.now, self.now)

    @cached_property
    def active_seconds(self) -> float:
        """Time in which a pod of the job ran, up to now."""
        since = self.ledger.running_since
        return self.ledger.active_seconds + ((self.now - since).total_seconds() if since else 0.0)

    @cached_property
    def training_began(self) -> bool:
        """Whether a training pod ever ran."""
        return bool(executions(self.ledger, Stage.TRAIN))

    @cached_property
    def gpu_held(self) -> bool:
        """Whether a training pod ever held a GPU: it does from when it is bound to a node, also while its image is pulled."""
        spec = self.obs.job.spec
        if self.before.gpu_held or (spec is not None and not spec.compute.gpus_per_node):
            return bool(self.before.gpu_held)
        train = self.views[Stage.TRAIN]
        return self.training_began or any(p.node for p in (*train.pods, *train.peers))

    @cached_property
    def idle(self) -> bool:
        """No Job of this FineTuneJob is left, and no pod that has not ended."""
        return not self.obs.jobs and all(p.ended for p in self.obs.pods)
