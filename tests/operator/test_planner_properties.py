"""The planner under random histories: users, kubelets, controllers and failures act in any order."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_api.failures import MAX_FRUITLESS, MAX_RETURNS, by_exit_code
from finetune_api.names import PIPELINE, Stage
from finetune_api.progress import ProgressPost, StageReport
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase, ProgressStatus
from finetune_operator.planning import budget
from finetune_operator.planning.conditions import find, is_true
from finetune_operator.planning.endings import replaced
from finetune_operator.planning.model import Plan, Refusal
from finetune_operator.progress.protocol import merge
from tests.operator.manifests import failure, success
from tests.operator.world import World, world

HISTORIES = int(os.environ.get("FINETUNE_HISTORIES", "150"))
"""The same ones each time, so that a change is judged by them; ``make chaos`` runs more, of a seed of their own."""


class Histories(RuleBasedStateMachine):
    """Any of these may happen at any time; the operator may stop after any single step of a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World = world()
        self.end: FineTuneJobStatus | None = None

    @initialize(
        deadline=st.sampled_from([None, 30]),
        pending=st.sampled_from([20, 3600]),
        ttl=st.sampled_from([None, 60]),
        failures=st.sampled_from([0, 2]),
        grows=st.booleans(),
        policy=st.sampled_from(["Retain", "Delete"]),
        stages=st.sampled_from([0, 1, 1, 2]),
        plan_only=st.sampled_from([False, False, True]),
    )
    def create(
        self,
        deadline: int | None,
        pending: int,
        ttl: int | None,
        failures: int,
        grows: bool,
        policy: str,
        stages: int,
        plan_only: bool,
    ) -> None:
        """Some histories begin late: most of what can happen happens while training runs."""
        memory = {"outOfMemory": {"maxMemory": "8Gi"}} if grows else {}
        self.world = world(
            activeDeadlineSeconds=deadline,
            pendingTimeoutSeconds=pending,
            ttlSecondsAfterFinished=ttl,
            recovery={"maxFailures": failures, **memory},
            compute={"memory": "4Gi"},
            output={"uri": "s3://results/here", "deletionPolicy": policy},
            planOnly=plan_only and not stages,
        )
        for _ in range(stages):
            self.world.pass_stage()
        if stages:
            self.world.settle()
            self.world.start_pod()
            self.world.run_pod()

    def _running(self) -> bool:
        pod = self.world.pod()
        return pod is not None and pod.running

    def _replace(self, look: bool) -> None:
        """The operator looks, or is away; then the Job controller starts the next pod and it runs."""
        if look and not self.world.gone:
            self.reconcile_until_nothing_is_left_to_do()
            self.world.collect()
            self.reconcile_until_nothing_is_left_to_do()
        self.world.tick(10)
        self.world.start_pod()
        if not self._running():
            self.world.run_pod()

    # The operator

    @rule()
    def reconcile_once(self) -> None:
        if not self.world.gone:
            self.world.apply(self.world.plan())
            self._note_the_end()

    @rule()
    def reconcile_until_nothing_is_left_to_do(self) -> None:
        if not self.world.gone:
            self.world.settle()
            self._note_the_end()

    @precondition(lambda self: self.world.refusal is not None)
    @rule()
    def forget_what_was_in_memory(self) -> None:
        self.world.refusal = None

    # People

    @rule(value=st.booleans())
    def suspend_or_resume(self, value: bool) -> None:
        self.world.spec = self.world.spec.model_copy(update={"suspend": value})
        self.world.generation += 1

    @precondition(lambda self: bool(self.world.jobs))
    @rule()
    def somebody_deletes_a_job(self) -> None:
        job = next(iter(self.world.jobs.values()), None)
        if job is not None:
            self.world.jobs[job.name] = replace(job, deleting=True)
            for pod in [p for p in self.world.pods.values() if p.owner_uid == job.uid]:
                self.world.pods[pod.name] = replace(pod, deleting=True)

    @rule(chance=st.integers(0, 9))
    def somebody_deletes_the_finetunejob(self, chance: int) -> None:
        """Seldom: it cuts the rest of a history short."""
        if self.world.deleting or chance:
            return
        self.world.deleting, self.world.deleted_at = True, self.world.now
        self.world.gone = self.world.gone or not self.world.held

    # The cluster

    @rule(seconds=st.sampled_from([-3, 0, 2]))
    def the_operators_clock_is_set(self, seconds: int) -> None:
        self.world.skew = seconds

    @rule(seconds=st.sampled_from([-600, 0, 600]))
    def the_nodes_clocks_are_set(self, seconds: int) -> None:
        self.world.node_skew = seconds

    @rule(seconds=st.sampled_from([1, 6, 31]))
    def time_passes(self, seconds: int) -> None:
        self.world.tick(seconds)

    @precondition(lambda self: self.world.pod() is None and self.world.live_job() is not None)
    @rule()
    def a_pod_starts(self) -> None:
        self.world.start_pod()

    @precondition(lambda self: self.world.pod() is not None and not self._running())
    @rule()
    def a_pod_runs(self) -> None:
        pod = self.world.pod()
        if pod is not None and not pod.running:
            self.world.run_pod()

    @precondition(lambda self: self._running())
    @rule(report=st.sampled_from([True, True, True, False]), trained=st.booleans(), look=st.booleans())
    def a_pod_succeeds(self, report: bool, trained: bool, look: bool) -> None:
        pod = self.world.pod()
        if pod is not None:
            self.world.end_pod(0, success(pod.stage, trained) if report else None)
            self._replace(look)

    @precondition(lambda self: self._running())
    @rule(code=st.sampled_from([1, 11, 41, 44, 60, 61, 61, 137, 143]), told=st.booleans(), look=st.booleans())
    def a_pod_fails(self, code: int, told: bool, look: bool) -> None:
        pod = self.world.pod()
        if pod is not None:
            reason = by_exit_code(code).reason
            report: StageReport | None = failure(pod.stage, reason, "why") if told and code not in (137, 143) else None
            self.world.end_pod(code, report)
            self._replace(look)

    @precondition(lambda self: self.world.pod() is not None and not self._running())
    @rule(reason=st.sampled_from(["UnexpectedAdmissionError", "OutOfcpu", "Evicted"]))
    def a_node_refuses_a_pod(self, reason: str) -> None:
        self.world.refuse_pod(reason)

    @precondition(lambda self: self._running())
    @rule(
        fields=st.sampled_from(
            [
                {"terminated_reason": "OOMKilled"},
                {"disruption": "PreemptionByScheduler", "disrupted": "preempted"},
                {"disruption": "EvictionByEvictionAPI", "disrupted": "drained"},
                {"disruption": "TerminationByKubelet", "pod_reason": "Evicted", "pod_message": "low on memory"},
            ]
        ),
        look=st.booleans(),
    )
    def a_container_is_killed(self, fields: dict[str, object], look: bool) -> None:
        pod = self.world.pod()
        if pod is not None and pod.running:
            self.world.change_pod(**fields)
            self.world.end_pod(137)
            self._replace(look)

    @precondition(lambda self: self._running())
    @rule()
    def a_pod_is_lost_with_its_node(self) -> None:
        pod = next((p for p in self.world.pods.values() if p.running), None)
        if pod is not None:
            lost = {"disruption": "DeletionByPodGC", "disrupted": "orphaned", "phase": "Failed"}
            self.world.pods[pod.name] = replace(pod, **lost)  # type: ignore[arg-type]

    @precondition(lambda self: self._running())
    @rule(
        step=st.integers(0, 9),
        saved=st.booleans(),
        took=st.sampled_from([None, 5.0, 119.0]),
        problem=st.sampled_from([None, None, "", "StorageFull: full"]),
    )
    def training_posts(self, step: int, saved: bool, took: float | None, problem: str | None) -> None:
        pod = self.world.pod()
        if pod is None or not pod.running or pod.stage is not Stage.TRAIN:
            return
        post = ProgressPost(
            execution_id=pod.uid,
            stage=Stage.TRAIN,
            sequence=step,
            step=step,
            resumed_from_step=0,
            checkpoint_step=step if saved else None,
            checkpoint_seconds=took,
            checkpoint_problem=problem,
        )
        self.world.post(merge(self.world.status.progress, post, self.world.now))

    @precondition(lambda self: bool(self.world.pods))
    @rule()
    def a_pod_vanishes(self) -> None:
        pod = next(iter(self.world.pods.values()), None)
        if pod is not None:
            del self.world.pods[pod.name]

    @precondition(lambda self: self.world.pod() is not None)
    @rule(what=st.sampled_from(["image", "node", "volume", "told"]))
    def a_pod_waits(self, what: str) -> None:
        pod = self.world.pod()
        if pod is None:
            return
        if what == "told" and pod.running:
            self.world.post(
                ProgressStatus(execution_id=pod.uid, waiting_reason="SecretMissing", waiting_message="hf-token")
            )
        elif not pod.running and what == "image":
            self.world.change_pod(waiting_reason="ErrImagePull", waiting_message="refused")
        elif not pod.running and what == "node":
            self.world.change_pod(unschedulable="no room", unschedulable_since=self.world.now)
        elif not pod.running and what == "volume":
            self.world.change_pod(node="n", sandbox_missing_since=self.world.now)

    @precondition(lambda self: self.world.live_job() is not None)
    @rule(value=st.booleans())
    def kueue_suspends_or_admits(self, value: bool) -> None:
        job = self.world.live_job()
        if job is not None:
            self.world.jobs[job.name] = replace(job, suspended=value)
            if value:
                for pod in [p for p in self.world.pods.values() if p.owner_uid == job.uid and not p.ended]:
                    del self.world.pods[pod.name]

    @precondition(lambda self: self._running())
    @rule()
    def a_pod_is_deleted_and_its_node_does_not_answer(self) -> None:
        pod = self.world.pod()
        if pod is not None and pod.node:
            self.world.change_pod(deleting=True, deletion_due=self.world.now)

    @precondition(lambda self: any(x.deleting for x in (*self.world.jobs.values(), *self.world.pods.values())))
    @rule()
    def deletions_finish(self) -> None:
        self.world.collect()

    @precondition(lambda self: self.world.live_job() is None)
    @rule()
    def the_api_server_refuses(self) -> None:
        self.world.refusal = Refusal("exceeded quota", self.world.now + timedelta(seconds=5))

    # What must always hold

    def _note_the_end(self) -> None:
        if self.end is None and is_true(self.world.status, ConditionType.FINISHED):
            self.end = self._end()

    def _end(self) -> FineTuneJobStatus:
        """An edit of the time limits is seen even afterwards."""
        return self.world.status.model_copy(update={"progress": None, "observed_generation": None})

    @invariant()
    def at_most_one_stage_is_live(self) -> None:
        live = [j for j in self.world.jobs.values() if not j.finished and not j.deleting]
        assert len(live) <= 1, live

    @invariant()
    def two_executions_never_run_together(self) -> None:
        running = [p for p in self.world.pods.values() if p.running]
        assert len(running) <= 1, running

    @precondition(lambda self: self.world.live_job() is not None)
    @rule()
    def a_job_vanishes_before_its_pods(self) -> None:
        """Deleted in the background: the garbage collector takes the pods later."""
        job = self.world.live_job()
        if job is not None:
            del self.world.jobs[job.name]

    @precondition(lambda self: bool(self.world.jobs))
    @rule()
    def a_job_is_deleted_and_its_pods_are_orphaned(self) -> None:
        job = next(iter(self.world.jobs.values()))
        del self.world.jobs[job.name]
        for pod in [p for p in self.world.pods.values() if p.owner_uid == job.uid]:
            self.world.pods[pod.name] = replace(pod, owner_uid="")

    @invariant()
    def an_end_is_final(self) -> None:
        if self.end is None:
            return
        assert self._end() == self.end
        expires = self.world.spec.ttl_seconds_after_finished is not None
        assert not self.world.gone or self.world.deleting or expires

    @invariant()
    def what_came_from_outside_fails_no_job(self) -> None:
        failed = find(self.world.status, ConditionType.FAILED)
        if failed is None or failed.status != "True" or not replaced(failed.reason):
            return
        rows = [budget.fruitless(self.world.status.attempts, stage) for stage in PIPELINE]
        assert max(rows) >= MAX_FRUITLESS, self.world.status.attempts

    @invariant()
    def where_the_operator_takes_it_from_here_is_right(self) -> None:
        """One look ahead, as it costs most, for all that is asked of it. A plan applied leaves nothing to plan: ``settle`` says."""
        if self.world.gone:
            return
        ahead = replace(self.world, jobs=dict(self.world.jobs), pods=dict(self.world.pods), events=[])
        decided = ahead.settle()
        if self.world.deleting:
            return
        self._keeps_its_budget(ahead)
        self._never_stands_still(ahead, decided)
        self._holds_no_pods_suspended(ahead)

    def _keeps_its_budget(self, ahead: World) -> None:
        """A job that goes on has not failed more often than it may, nor given its GPU back."""
        if self.world.spec.suspend or ahead.gone or is_true(ahead.status, ConditionType.FINISHED):
            return
        stage = max((PIPELINE.index(j.stage) for j in ahead.jobs.values() if not j.deleting), default=0)
        attempts = ahead.status.attempts
        assert len(budget.failures(attempts, PIPELINE[stage], ahead.spec)) <= ahead.spec.recovery.max_failures
        assert budget.returns(attempts) <= MAX_RETURNS
        assert budget.fruitless(attempts, PIPELINE[stage]) < MAX_FRUITLESS

    def _never_stands_still(self, ahead: World, decided: Plan) -> None:
        """Whatever is neither over nor suspended goes on by itself: something lives or stops, or it is looked at again."""
        if ahead.gone or is_true(ahead.status, ConditionType.FINISHED) or ahead.status.phase is Phase.SUSPENDED:
            return
        live = any(not j.finished or j.deleting for j in ahead.jobs.values())
        live = live or any(not p.ended for p in ahead.pods.values())
        assert live or decided.requeue_after is not None, (ahead.status, ahead.jobs, ahead.pods)

    def _holds_no_pods_suspended(self, ahead: World) -> None:
        if not self.world.spec.suspend or self.end is not None:
            return
        ahead.collect()
        ahead.settle()
        for pod in ahead.pods.values():  # of a Job that somebody deleted, and not its pods: they end when they are done
            ahead.pods[pod.name] = replace(pod, phase="Failed", deleting=False)
        ahead.settle()
        if ahead.status.phase in (Phase.SUCCEEDED, Phase.FAILED):
            return
        assert ahead.status.phase is Phase.SUSPENDED
        assert not ahead.jobs

    @invariant()
    def memory_stays_within_its_limit(self) -> None:
        for job in self.world.jobs.values():
            assert job.memory in ("", "4Gi", "6Gi", "8Gi")

    @invariant()
    def artifacts_are_deleted_only_when_no_pod_can_write_any_more(self) -> None:
        if self.world.job(Stage.CLEANUP) is None:
            return
        assert self.world.deleting
        assert not [p for p in self.world.pods.values() if p.stage is not Stage.CLEANUP and not p.ended]

    @invariant()
    def finished_means_complete_or_failed_and_not_both(self) -> None:
        kinds = (ConditionType.COMPLETE, ConditionType.FAILED)
        true = [k for k in kinds if is_true(self.world.status, k)]
        assert len(true) == (1 if is_true(self.world.status, ConditionType.FINISHED) else 0)

    @invariant()
    def where_a_plan_is_enough_nothing_trains(self) -> None:
        stages = {j.stage for j in self.world.jobs.values()}
        assert not self.world.spec.plan_only or stages <= {Stage.PREPARE, Stage.CLEANUP}

    @invariant()
    def no_gpu_is_asked_for_before_prepare_is_done(self) -> None:
        if self.world.job(Stage.TRAIN) is not None and not self.world.gone:
            assert self.world.snapshot is not None


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=HISTORIES,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
