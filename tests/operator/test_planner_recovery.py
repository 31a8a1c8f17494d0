"""What the planner does about faults, row by row: what counts, what is waited for, what is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_api.failures import MAX_FRUITLESS, MAX_RETURNS
from finetune_api.names import Stage
from finetune_api.progress import Restart, Split
from finetune_api.status import AttemptStatus, ConditionType, Phase, ProgressStatus
from finetune_operator.observe import parse_status
from finetune_operator.planning.attempts import MAX_ATTEMPTS
from finetune_operator.planning.conditions import find, is_true
from finetune_operator.planning.model import EventType, Urgency
from finetune_operator.planning.story import MAX_RECOVERIES
from tests.operator.manifests import failure, success
from tests.operator.test_planner import in_training, message, reason
from tests.operator.world import World, world

MEMORY = {"compute": {"memory": "4Gi"}, "recovery": {"maxFailures": 0, "outOfMemory": {"maxMemory": "8Gi"}}}


def execution(w: World) -> str:
    pod = w.pod()
    assert pod is not None
    return pod.uid


def came_to(w: World, step: int | None, **fields: object) -> None:
    """The running training pod posts."""
    posted = ProgressStatus.model_validate({"execution_id": execution(w), "stage": "train", "step": step, **fields})
    w.post(posted)


def again(w: World) -> None:
    """The Job controller starts the next pod."""
    w.settle()
    w.tick(10)
    w.start_pod()
    w.run_pod()
    w.settle()


def last(w: World, stage: Stage = Stage.TRAIN) -> AttemptStatus:
    return [a for a in w.status.attempts if a.stage == stage][-1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"disruption": "PreemptionByScheduler", "disrupted": "preempted by x"}, "Preempted"),
        ({"disruption": "EvictionByEvictionAPI", "disrupted": "Eviction API: evicting"}, "Preempted"),
        ({"disruption": "DeletionByTaintManager", "disrupted": "deleting due to NoExecute taint"}, "Preempted"),
        ({"disruption": "TerminationByKubelet", "pod_reason": "Evicted", "pod_message": "low on memory"}, "Evicted"),
        ({"disruption": "TerminationByKubelet", "disrupted": "low on memory"}, "Evicted"),
        ({"disruption": "TerminationByKubelet", "pod_reason": "Terminated"}, "Preempted"),
        ({"disruption": "DeletionByPodGC", "disrupted": "orphaned pod"}, "NodeLost"),
        ({"terminated_reason": "OOMKilled"}, "HostOutOfMemory"),
        ({}, "Interrupted"),
    ],
)
def test_an_execution_that_was_killed_tells_by_whom(fields: dict[str, object], expected: str) -> None:
    w = in_training()
    w.change_pod(**fields)
    w.end_pod(137)
    w.settle()
    assert last(w).reason == expected
    assert not is_true(w.status, ConditionType.FAILED)


def test_a_pod_of_whose_end_a_tainted_node_never_told_was_lost_with_it() -> None:
    w = in_training()
    w.change_pod(phase="Failed", disruption="DeletionByTaintManager", disrupted="deleting due to NoExecute taint")
    w.settle()
    assert last(w).reason == "NodeLost"


def test_a_rank_that_dies_while_its_node_is_drained_does_not_count() -> None:
    w = in_training(recovery={"maxFailures": 0})
    w.change_pod(disruption="EvictionByEvictionAPI", disrupted="Eviction API: evicting")
    w.end_pod(44, failure(Stage.TRAIN, "RankFailure", "rank 1 died"))
    w.settle()
    assert last(w).reason == "Preempted"
    assert not is_true(w.status, ConditionType.FAILED)


@pytest.mark.parametrize(("suspended", "expected"), [(True, "Preempted"), (False, "Interrupted")])
def test_a_pod_that_vanished_was_preempted_if_its_job_is_suspended(suspended: bool, expected: str) -> None:
    w = in_training()
    job = w.live_job()
    assert job is not None
    w.jobs[job.name] = replace(job, suspended=suspended)
    w.pods = {n: p for n, p in w.pods.items() if p.ended}
    w.settle()
    assert last(w).reason == expected


def test_a_pod_that_ended_while_the_queue_suspended_its_job_was_preempted() -> None:
    w = in_training()
    job = w.live_job()
    assert job is not None
    w.jobs[job.name] = replace(job, suspended=True)
    w.end_pod(60, failure(Stage.TRAIN, "Interrupted", "told to stop"))
    w.settle()
    assert last(w).reason == "Preempted"


def test_preemption_and_resumption_are_told_as_a_story() -> None:
    w = in_training()
    came_to(w, 402, resumed_from_step=0, checkpoint_step=402)
    w.change_pod(disruption="EvictionByEvictionAPI", disrupted="Eviction API: evicting")
    w.end_pod(60)
    again(w)
    came_to(w, 403, resumed_from_step=402)
    w.settle()
    told = [(e.type, e.reason, e.message) for e in w.events[2:]]
    assert told == [
        (
            EventType.NORMAL,
            "Preempted",
            "node drained (Eviction API: evicting) at step 402; checkpoint saved at step 402",
        ),
        (EventType.NORMAL, "Started", "attempt 2 on node gpu-7"),
        (EventType.NORMAL, "Resumed", "attempt 2 on node gpu-7 from step 402; nothing recomputed"),
    ]
    assert [r.reason for r in w.status.recoveries] == ["Preempted", "Resumed"]


def test_steps_that_are_computed_again_are_counted() -> None:
    w = in_training()
    came_to(w, 410)
    w.end_pod(137)
    again(w)
    came_to(w, 400, resumed_from_step=400)
    w.settle()
    assert w.events[-1].message == "attempt 2 on node gpu-7 from step 400; 10 steps computed again"


def test_how_far_an_execution_came_is_kept_when_the_next_posts_before_anybody_looked() -> None:
    w = in_training()
    earlier = {"execution_id": execution(w), "step": 402, "checkpoint_step": 400}
    w.end_pod(143)
    w.tick(10)
    w.start_pod()
    w.run_pod()
    came_to(w, 401, resumed_from_step=400, earlier=[earlier])
    w.settle()
    first, second = [a for a in w.status.attempts if a.stage == "train"]
    assert (first.last_step, first.checkpoint_step) == (402, 400)
    assert (second.resumed_from_step, second.last_step) == (400, None), "while it runs, progress tells"


def test_progress_alone_changes_no_attempt() -> None:
    w = in_training()
    came_to(w, 1, resumed_from_step=0)
    w.settle()
    came_to(w, 2, resumed_from_step=0, checkpoint_step=2)
    assert w.plan().idle


@pytest.mark.parametrize("code", [60, 130, 137, 143])
def test_interruptions_that_get_farther_never_fail_a_job(code: int) -> None:
    w = in_training(recovery={"maxFailures": 0})
    for step in range(1, MAX_FRUITLESS + 5):
        came_to(w, step)
        w.end_pod(code)
        again(w)
    assert w.status.phase is Phase.TRAINING


def test_preemptions_that_an_earlier_version_wrote_down_are_no_failures_after_an_upgrade() -> None:
    w = in_training(recovery={"maxFailures": 2})
    gone = {"outcome": "Failed", "reason": "PodGone", "message": "The pod was deleted before its end was seen."}
    times = {"startedAt": "2026-03-01T09:00:00Z", "finishedAt": "2026-03-01T10:00:00Z"}
    earlier = [{"executionId": f"old-{n}", "stage": "train", "pod": f"p{n}", **gone, **times} for n in range(3)]
    raw = w.status.to_json_dict()
    w.status = parse_status({**raw, "attempts": [*earlier, *w.status.to_json_dict()["attempts"]]})
    w.settle()
    assert w.status.phase is Phase.TRAINING
    assert [a.reason for a in w.status.attempts[:3]] == ["PodGone"] * 3


@pytest.mark.parametrize(("seconds", "fails"), [(3600, False), (60, True)])
def test_interruptions_of_which_no_step_is_known_end_the_job_only_if_they_were_short(seconds: int, fails: bool) -> None:
    w = in_training()
    for _ in range(MAX_FRUITLESS + 1):
        w.tick(seconds)
        w.end_pod(137)
        again(w)
    assert (w.status.phase is Phase.FAILED) == fails


def test_long_interruptions_that_are_known_to_have_got_no_farther_end_the_job() -> None:
    w = in_training()
    for _ in range(MAX_FRUITLESS):
        came_to(w, None, resumed_from_step=0)
        w.tick(3600)
        w.end_pod(137)
        again(w)
    assert w.status.phase is Phase.FAILED


@pytest.mark.parametrize("vanishes", [False, True])
def test_an_interrupted_pod_tells_with_its_last_words_how_far_it_came(vanishes: bool) -> None:
    w = in_training()
    came_to(w, 400, checkpoint_step=390)
    words = failure(Stage.TRAIN, "Interrupted", "told to stop")
    words = words.model_copy(update={"result": {"step": 402, "checkpointStep": 402}})
    if vanishes:
        came_to(w, 400, checkpoint_step=390, report=words)
        w.pods = {n: p for n, p in w.pods.items() if p.ended}
    else:
        w.end_pod(60, words)
    again(w)
    came_to(w, 403, resumed_from_step=402)
    w.settle()
    first = next(a for a in w.status.attempts if a.stage == "train")
    assert (first.last_step, first.checkpoint_step) == (402, 402)
    assert "checkpoint saved at step 402" in w.status.recoveries[0].message


@pytest.mark.parametrize("result", [{"step": "402"}, {"step": -1}, {"step": True}, {"step": 1.5}, {}, None])
def test_last_words_that_tell_no_step_tell_none(result: dict[str, object] | None) -> None:
    w = in_training()
    words = failure(Stage.TRAIN, "Interrupted", "told to stop").model_copy(update={"result": result})
    w.end_pod(60, words)
    w.settle()
    assert (last(w).reason, last(w).last_step) == ("Interrupted", None)


def test_interruptions_that_get_nowhere_end_the_job() -> None:
    w = in_training()
    for _ in range(MAX_FRUITLESS):
        assert w.status.phase is Phase.TRAINING
        came_to(w, 5)
        w.end_pod(137)
        again(w)
    came_to(w, 5)
    w.end_pod(137)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "Interrupted"
    assert "none got farther" in message(w, ConditionType.FAILED)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"terminated_reason": "OOMKilled"}, "HostOutOfMemory"), ({"pod_reason": "Evicted"}, "Evicted")],
)
def test_what_the_job_ignores_and_still_is_its_own_fault_is_counted(fields: dict[str, object], expected: str) -> None:
    w = in_training(recovery={"maxFailures": 1})
    disruption = {"disruption": "TerminationByKubelet"} if expected == "Evicted" else {}
    w.change_pod(**fields, **disruption)
    w.end_pod(137)
    again(w)
    assert w.status.phase is Phase.TRAINING
    w.change_pod(**fields, **disruption)
    w.end_pod(137)
    w.settle()
    assert reason(w, ConditionType.FAILED) == expected
    assert "2 executions of train have failed; recovery.maxFailures is 1" in message(w, ConditionType.FAILED)
    assert w.live_job() is None, "the Job would have gone on"


def refused(w: World, times: int) -> None:
    for _ in range(times):
        w.settle()
        w.tick(10)
        w.start_pod()
        w.refuse_pod()
    w.settle()


def test_pods_that_a_node_refused_are_no_failures_and_their_job_is_made_anew_after_a_pause() -> None:
    w = world(recovery={"maxFailures": 1})
    w.pass_stage()
    refused(w, 2)
    old = w.job(Stage.TRAIN)
    assert old is not None
    assert old.failed_reason == "BackoffLimitExceeded"
    assert not old.deleting
    assert w.status.message == (
        "Node gpu-7 refused the pod (UnexpectedAdmissionError: Pod was rejected: Allocate failed due to no healthy devices "
        "present). Its Job is created anew at 2026-03-01T12:00:50Z."
    )
    assert [(a.reason, a.started_at) for a in w.status.attempts[1:]] == [("Unschedulable", None)] * 2
    assert "Started" not in [e.reason for e in w.events]
    assert w.settle().requeue_after == pytest.approx(20.05)
    w.tick(20)
    w.settle()
    w.collect()
    w.settle()
    job = w.live_job()
    assert job is not None
    assert (job.stage, job.uid != old.uid) == (Stage.TRAIN, True), "nothing has run that prepare could look for"
    w.pass_stage()
    w.pass_stage()
    w.settle()
    assert w.status.phase is Phase.SUCCEEDED


def test_nodes_that_refuse_every_pod_end_the_job_at_last() -> None:
    w = world(recovery={"maxFailures": 4})
    w.pass_stage()
    for _ in range(MAX_FRUITLESS):
        refused(w, 1)
        if w.live_job() is None:
            w.tick(600)
            w.settle()
            w.collect()
    assert reason(w, ConditionType.FAILED) == "Unschedulable"
    assert "Allocate failed" in message(w, ConditionType.FAILED)


def test_a_refused_pod_takes_no_failure_from_a_jobs_budget() -> None:
    w = world(recovery={"maxFailures": 1})
    w.pass_stage()
    refused(w, 1)
    again(w)
    w.end_pod(44, failure(Stage.TRAIN, "RankFailure", "rank 1 died"))
    w.settle()
    assert w.status.phase is not Phase.FAILED
    w.tick(600)
    for _ in range(2):  # the training Job, then prepare's, which looks for what was trained
        w.settle()
        w.collect()
    w.pass_stage()
    again(w)
    w.end_pod(44, failure(Stage.TRAIN, "RankFailure", "rank 1 died"))
    w.settle()
    assert reason(w, ConditionType.FAILED) == "RankFailure"
    assert "2 executions of train have failed; recovery.maxFailures is 1" in message(w, ConditionType.FAILED)


def test_a_job_that_failed_and_then_succeeded_lists_its_attempts() -> None:
    w = in_training()
    w.end_pod(44, failure(Stage.TRAIN, "RankFailure", "rank 1 died"))
    w.tick(10)
    w.pass_stage()
    w.pass_stage()
    w.settle()
    assert w.status.phase is Phase.SUCCEEDED
    assert [(a.stage, a.outcome, a.reason) for a in w.status.attempts] == [
        ("prepare", "Succeeded", "Succeeded"),
        ("train", "Failed", "RankFailure"),
        ("train", "Succeeded", "Succeeded"),
        ("publish", "Succeeded", "Succeeded"),
    ]


def give_back(w: World) -> None:
    w.tick(10)
    w.end_pod(61, failure(Stage.TRAIN, "StorageUnavailable", "http://s3: connection refused"))
    w.settle()


def test_a_training_pod_that_gives_its_gpu_back_sends_the_job_to_prepare() -> None:
    w = in_training()
    old = {j.uid for j in w.jobs.values()}
    give_back(w)
    assert not is_true(w.status, ConditionType.PREPARED)
    assert reason(w, ConditionType.PREPARED) == "StorageUnavailable"
    assert "connection refused" in message(w, ConditionType.PREPARED)
    assert all(j.deleting for j in w.jobs.values())
    w.collect()
    w.settle()
    assert [j.stage for j in w.jobs.values()] == [Stage.PREPARE]
    assert w.status.phase is Phase.PREPARING
    w.tick(10)
    w.pass_stage()
    w.settle()
    job = w.live_job()
    assert job is not None
    assert job.stage is Stage.TRAIN
    assert job.uid not in old
    assert is_true(w.status, ConditionType.PREPARED)
    assert ("StorageUnavailable", "Failed") in [(a.reason, a.outcome) for a in w.status.attempts]


def test_the_return_is_written_down_before_the_jobs_go() -> None:
    w = in_training()
    w.end_pod(61, failure(Stage.TRAIN, "StorageUnavailable", "gone"))
    decided = w.plan()
    assert not decided.deletes
    w.apply(decided)
    assert {d.name.rsplit("-", 1)[1] for d in w.plan().deletes} == {"train", "prepare"}


def test_a_gpu_is_given_back_also_where_the_operator_died_before_it_told_that_prepare_was_done() -> None:
    w = World(in_training().spec)
    w.pass_stage()
    w.apply(w.plan())  # creates the training Job, and dies before its status is written
    w.start_pod()
    w.run_pod()
    w.tick(10)
    w.end_pod(61, failure(Stage.TRAIN, "StorageUnavailable", "gone"))
    w.settle()
    assert find(w.status, ConditionType.PREPARED) is None
    assert {j.stage for j in w.jobs.values() if j.deleting} == {Stage.PREPARE, Stage.TRAIN}
    w.collect()
    w.settle()
    assert [j.stage for j in w.jobs.values()] == [Stage.PREPARE]
    assert last(w).reason == "StorageUnavailable"


def test_returns_are_bounded() -> None:
    w = in_training()
    for _ in range(MAX_RETURNS):
        give_back(w)
        w.collect()
        w.tick(10)
        w.pass_stage()
        again(w)
        assert w.status.phase is Phase.TRAINING
    give_back(w)
    assert reason(w, ConditionType.FAILED) == "StorageUnavailable"
    assert "gave its GPU back 4 times" in message(w, ConditionType.FAILED)


def test_returns_from_farther_on_do_not_add_up() -> None:
    w = in_training()
    for step in range(1, MAX_RETURNS + 4):
        came_to(w, step * 10)
        give_back(w)
        w.collect()
        w.tick(10)
        w.pass_stage()
        again(w)
    assert w.status.phase is Phase.TRAINING


@pytest.mark.parametrize("trained", [True, False])
def test_a_cpu_pod_looks_for_the_result_when_a_training_job_vanished_after_it_had_run(trained: bool) -> None:
    w = in_training()
    w.jobs = {n: j for n, j in w.jobs.items() if j.stage is Stage.PREPARE}
    w.pods = {n: p for n, p in w.pods.items() if p.stage is Stage.PREPARE}
    w.settle()
    assert reason(w, ConditionType.PREPARED) == "TrainingJobGone"
    assert [j.deleting for j in w.jobs.values()] == [True]
    w.collect()
    w.tick(10)
    w.pass_stage(trained)
    w.settle()
    job = w.live_job()
    assert job is not None
    assert job.stage is (Stage.PUBLISH if trained else Stage.TRAIN)


def oom(w: World, told: int | None = None) -> None:
    if told is not None:
        came_to(w, 3, peak_memory_bytes=told)
    w.change_pod(terminated_reason="OOMKilled")
    w.end_pod(137)
    w.settle()


def test_memory_grows_by_half_until_its_limit_and_then_the_job_fails() -> None:
    w = in_training(**MEMORY)
    for memory in ("6Gi", "8Gi"):
        oom(w)
        assert [j.stage for j in w.jobs.values() if j.deleting] == [Stage.TRAIN], "prepare need not run again"
        w.collect()
        w.settle()
        job = w.live_job()
        assert job is not None
        assert (job.stage, job.memory) == (Stage.TRAIN, memory)
        again(w)
    oom(w)
    assert reason(w, ConditionType.FAILED) == "HostOutOfMemory"
    assert [r.message for r in w.status.recoveries] == [
        "the training container exceeded its memory of 4Gi; the Job is created anew with 6Gi",
        "the training container exceeded its memory of 6Gi; the Job is created anew with 8Gi",
    ]


def test_memory_grows_from_what_was_had_however_often_it_did_not_suffice_while_nobody_looked() -> None:
    w = in_training(**MEMORY)
    for number in range(3):  # the Job goes on by itself, with the memory that it has
        if number:
            w.tick(10)
            w.start_pod()
            w.run_pod()
        w.change_pod(terminated_reason="OOMKilled")
        w.end_pod(137)
    for memory in ("6Gi", "8Gi"):
        w.settle()
        w.collect()
        w.settle()
        job = w.live_job()
        assert job is not None
        assert job.memory == memory
        again(w)
        w.change_pod(terminated_reason="OOMKilled")
        w.end_pod(137)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "HostOutOfMemory"
    assert "It had 8Gi" in message(w, ConditionType.FAILED)
    assert [a.memory for a in w.status.attempts if a.stage == "train"] == ["4Gi"] * 3 + ["6Gi", "8Gi"]


def test_memory_stays_grown_when_the_attempts_that_lacked_it_are_no_longer_listed() -> None:
    w = in_training(**MEMORY)
    oom(w)
    w.collect()
    again(w)
    for step in range(MAX_ATTEMPTS + 2):
        came_to(w, step + 1)
        w.end_pod(143)
        again(w)
    assert not [a for a in w.status.attempts if a.reason == "HostOutOfMemory"]
    w.jobs = {n: j for n, j in w.jobs.items() if j.stage is not Stage.TRAIN}  # and the Job is made anew
    w.pods = {n: p for n, p in w.pods.items() if p.stage is not Stage.TRAIN}
    w.settle()
    w.collect()
    w.pass_stage()
    w.settle()
    job = w.live_job()
    assert job is not None
    assert (job.stage, job.memory) == (Stage.TRAIN, "6Gi")


def test_memory_grows_where_the_trainer_itself_noticed_and_the_job_has_failed() -> None:
    w = in_training(**MEMORY)
    w.end_pod(41, failure(Stage.TRAIN, "HostOutOfMemory", "a worker was killed"))
    w.settle()
    w.collect()
    w.settle()
    job = w.live_job()
    assert job is not None
    assert job.memory == "6Gi"


def test_the_growth_is_written_down_before_the_job_goes_and_tells_the_peak() -> None:
    w = in_training(**MEMORY)
    came_to(w, 3, peak_memory_bytes=4_187_593_114)
    w.change_pod(terminated_reason="OOMKilled")
    w.end_pod(137)
    decided = w.plan()
    assert not decided.deletes
    w.apply(decided)
    assert [d.name.rsplit("-", 1)[1] for d in w.plan().deletes] == ["train"]
    assert (
        "4Gi (it held 3.9 GiB when it last told); the Job is created anew with 6Gi" in w.status.recoveries[-1].message
    )


def test_without_a_limit_to_grow_to_the_failure_names_the_peak() -> None:
    w = in_training(compute={"memory": "4Gi"}, recovery={"maxFailures": 0})
    oom(w, 4_187_593_114)
    assert "It had 4Gi (it held 3.9 GiB when it last told)." in message(w, ConditionType.FAILED)
    assert "recovery.outOfMemory.maxMemory" in message(w, ConditionType.FAILED)


HALVED = Restart(
    at="2026-03-01T12:00:20Z",
    reason="OutOfMemory",
    message="Out of GPU memory at step 31; resumed from step 30 with micro-batch 2 × accumulation 8 instead of 4 × 4.",
)


def test_what_training_healed_by_itself_is_told_once_in_status_events_message_and_plan() -> None:
    w = in_training()
    split = Split(
        micro_batch_sequences=2, gradient_accumulation_steps=8, gradient_checkpointing=True, max_sequence_tokens=2048
    )
    for _ in range(2):
        came_to(w, 31, restarts=[HALVED], split=split)
        w.settle()
    assert [(r.reason, r.message) for r in w.status.recoveries] == [("OutOfMemory", HALVED.message)]
    assert next(e for e in w.events if e.reason == "OutOfMemory").type is EventType.WARNING
    assert len([e for e in w.events if e.reason == "OutOfMemory"]) == 1
    assert w.status.message == f"Trains on node gpu-7, attempt 1. {HALVED.message}"
    assert w.status.plan is not None
    assert (w.status.plan.micro_batch_sequences, w.status.plan.gradient_accumulation_steps) == (2, 8)
    w.pods = {n: p for n, p in w.pods.items() if p.stage is Stage.TRAIN}  # prepare's report is gone with its pod
    w.settle()
    assert w.status.plan.summary.count("micro-batch 2 × accumulation 8") == 1


def test_more_recoveries_than_status_holds_are_told_once_each() -> None:
    w = in_training()
    for number in range(MAX_RECOVERIES + 8):
        came_to(w, number + 1)
        w.end_pod(143)
        again(w)
    assert len(w.status.recoveries) == MAX_RECOVERIES
    assert len([e for e in w.events if e.reason == "Interrupted"]) == MAX_RECOVERIES + 8
    assert len(w.status.attempts) <= MAX_ATTEMPTS


def test_a_grace_period_that_is_too_short_is_warned_about_once() -> None:
    w = in_training()
    came_to(w, 10, checkpoint_seconds=88.0)
    w.settle()
    assert find(w.status, ConditionType.CHECKPOINT_AT_RISK) is None, "0.8 of what is left of 120 s"
    came_to(w, 20, checkpoint_seconds=88.5)
    w.settle()
    assert reason(w, ConditionType.CHECKPOINT_AT_RISK) == "GracePeriodTooShort"
    told = message(w, ConditionType.CHECKPOINT_AT_RISK)
    assert "took 88 s" in told
    assert "killed after 120 s" in told
    assert "recovery.terminationGracePeriodSeconds to at least 150" in told
    came_to(w, 30, checkpoint_seconds=111.0)
    assert w.plan().idle, "another measurement is no news"
    came_to(w, 40, checkpoint_seconds=50.0)
    w.settle()
    assert not is_true(w.status, ConditionType.CHECKPOINT_AT_RISK)
    came_to(w, 50, checkpoint_seconds=119.0)
    w.settle()
    assert len([e for e in w.events if e.reason == "GracePeriodTooShort"]) == 1


FULL = "StorageFull: s3://results takes no more data"


def test_checkpoints_that_cannot_be_stored_are_told_with_what_is_at_stake_until_they_can_be() -> None:
    w = in_training()
    came_to(w, 42, checkpoint_step=40, checkpoint_problem=FULL)
    w.settle()
    assert reason(w, ConditionType.CHECKPOINT_AT_RISK) == "CheckpointsFail"
    assert message(w, ConditionType.CHECKPOINT_AT_RISK) == (
        "Checkpoints cannot be stored: StorageFull: s3://results takes no more data. Training goes on, and what it computed since "
        "the checkpoint of step 40 is lost if its pod ends before one is stored. Free space in the bucket or raise its quota."
    )
    came_to(w, 43, checkpoint_step=40, checkpoint_problem=f"{FULL} (3 tries)")
    assert w.plan().idle, "other words for the same are no news"
    came_to(w, 44, checkpoint_step=40, checkpoint_problem="StorageUnavailable: connection refused")
    w.settle()
    assert "network path" in message(w, ConditionType.CHECKPOINT_AT_RISK)
    came_to(w, 50, checkpoint_step=50, checkpoint_seconds=2.0)
    w.settle()
    assert not is_true(w.status, ConditionType.CHECKPOINT_AT_RISK)
    assert reason(w, ConditionType.CHECKPOINT_AT_RISK) == "CheckpointsStored"
    came_to(w, 60, checkpoint_step=50, checkpoint_problem=FULL)
    w.settle()
    told = [e.type for e in w.events if e.reason == "CheckpointsFail"]
    assert told == [EventType.WARNING] * 2, "each time that it begins"


def test_without_any_checkpoint_everything_is_at_stake_and_training_that_ends_is_not() -> None:
    w = in_training()
    came_to(w, 3, checkpoint_problem="Strange: nothing known")
    w.settle()
    assert message(w, ConditionType.CHECKPOINT_AT_RISK).endswith(
        "what it computed so far, as there is no checkpoint yet, is lost if its pod ends before one is stored."
    )
    w.end_pod(0, success(Stage.TRAIN))
    w.settle()
    assert not is_true(w.status, ConditionType.CHECKPOINT_AT_RISK)


def test_a_deadline_stops_the_pod_by_deletion_and_leaves_it_its_grace_period() -> None:
    w = in_training(activeDeadlineSeconds=30)
    w.tick(31)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "DeadlineExceeded"
    pod = next(p for p in w.pods.values() if p.stage is Stage.TRAIN)
    assert pod.deleting
    assert not pod.ended, "it saves its checkpoint"
    w.collect()
    assert w.settle().idle
    assert not [p for p in w.pods.values() if p.stage is Stage.TRAIN]


def test_a_failure_right_before_a_suspension_is_written_down_and_counted() -> None:
    w = in_training(recovery={"maxFailures": 1})
    for _ in range(2):
        w.end_pod(44, failure(Stage.TRAIN, "RankFailure", "rank 1 died"))
        w.spec = w.spec.model_copy(update={"suspend": True})
        decided = w.plan()
        assert not decided.deletes
        assert decided.urgency is Urgency.NOW, "the pods go after it"
        w.settle()
        w.collect()
        w.settle()
        assert last(w).reason == "RankFailure"
        if w.status.phase is Phase.FAILED:
            break
        w.spec = w.spec.model_copy(update={"suspend": False})
        w.tick(10)
        w.pass_stage()
        w.settle()
        w.tick(10)
        w.start_pod()
        w.run_pod()
    assert reason(w, ConditionType.FAILED) == "RankFailure"


def test_an_execution_that_was_never_written_down_is_before_a_suspension_takes_its_pod() -> None:
    w = in_training()
    w.end_pod(143)
    w.settle()
    w.tick(10)
    w.start_pod()
    w.run_pod()
    running = execution(w)
    w.spec = w.spec.model_copy(update={"suspend": True})
    assert not w.plan().deletes
    w.settle()
    w.collect()
    w.settle()
    assert w.status.phase is Phase.SUSPENDED
    assert (last(w).execution_id, last(w).outcome) == (running, "Failed")


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.TRAIN, Stage.PUBLISH])
def test_a_suspension_in_any_phase_stops_the_pod_by_deletion_and_holds_nothing(stage: Stage) -> None:
    w = in_training() if stage is Stage.TRAIN else World(in_training().spec)
    if stage is Stage.PUBLISH:
        w.pass_stage()
        w.pass_stage()
    if stage is not Stage.TRAIN:
        w.settle()
        w.start_pod()
        w.run_pod()
        w.settle()
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    assert all(p.deleting for p in w.pods.values())
    w.collect()
    w.settle()
    assert w.status.phase is Phase.SUSPENDED
    assert not w.pods
    assert not w.jobs
    w.spec = w.spec.model_copy(update={"suspend": False})
    w.tick(1)
    w.settle()
    job = w.live_job()
    assert job is not None
    assert job.stage is Stage.PREPARE, "a CPU pod looks for what is there"


def test_a_job_that_waits_out_a_refusal_is_suspended_at_once() -> None:
    w = world(recovery={"maxFailures": 0})
    w.pass_stage()
    w.settle()
    w.start_pod()
    w.refuse_pod()
    w.settle()
    job = w.job(Stage.TRAIN)
    assert job is not None
    assert job.failed_at is not None, "made anew when the pause is over"
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    w.collect()
    w.settle()
    assert w.status.phase is Phase.SUSPENDED
    assert w.jobs == {}


@pytest.mark.parametrize("seen_running", [True, False])
def test_a_drained_pod_that_went_between_two_looks_is_told_by_how_it_ended(seen_running: bool) -> None:
    """It goes as soon as it has ended, and no look sees it in between."""
    w = in_training()
    if not seen_running:
        w.status = w.status.model_copy(update={"attempts": w.status.attempts[:1]})
    w.tick(30)
    w.change_pod(disruption="EvictionByEvictionAPI", disrupted="Eviction API: evicting")
    told = failure(Stage.TRAIN, "Interrupted", "told to stop (SIGTERM)")
    pod = w.pod()
    assert pod is not None
    w.end_pod(60, told.model_copy(update={"result": {"step": 7, "checkpointStep": 7}}))
    w.ended.append(w.pods.pop(pod.name))
    w.settle()
    last = w.status.attempts[-1]
    assert (last.outcome, last.reason, last.exit_code) == ("Failed", "Preempted", 60)
    assert "node drained" in (last.message or "")
    assert (last.last_step, last.checkpoint_step) == (7, 7)
    assert len(w.status.attempts) == 2
    assert w.settle().idle
