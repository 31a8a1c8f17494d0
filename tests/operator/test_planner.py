"""The planner, row by row: what is observed, and what must follow."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from finetune_api.names import PIPELINE, Stage
from finetune_api.status import AttemptStatus, ConditionType, Phase, ProgressStatus
from finetune_operator.apply import refusal
from finetune_operator.client import ApiError
from finetune_operator.events import plain_refusal
from finetune_operator.planning import plan
from finetune_operator.planning.attempts import MAX_ATTEMPTS
from finetune_operator.planning.conditions import attempt_rank, find, is_true
from finetune_operator.planning.messages import NO_GPU_USED
from finetune_operator.planning.model import Pod, Refusal, Urgency
from tests.operator.manifests import failure, planned_success, success, train_report
from tests.operator.world import START, World, world


def message(w: World, kind: ConditionType) -> str:
    found = find(w.status, kind)
    assert found is not None
    return found.message


def reason(w: World, kind: ConditionType) -> str:
    found = find(w.status, kind)
    assert found is not None
    return found.reason


def phase(w: World) -> Phase | None:
    return w.status.phase


def running_pod(w: World) -> Pod:
    """Let the current stage's pod run."""
    w.settle()
    w.start_pod()
    w.run_pod()
    pod = w.pod()
    assert pod is not None
    return pod


def in_training(**spec: object) -> World:
    w = world(**spec)
    w.pass_stage()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.settle()
    return w


def in_publishing(**spec: object) -> World:
    w = world(**spec)
    w.pass_stage()
    w.pass_stage()
    w.settle()
    return w


def test_a_new_job_gets_its_snapshot_and_its_first_job_before_any_status() -> None:
    decided = world().plan()
    assert (decided.create_snapshot, decided.create_job) == (True, Stage.PREPARE)


def test_the_first_status_is_written_at_once() -> None:
    w = world()
    w.apply(w.plan())
    decided = w.plan()
    assert decided.urgency is Urgency.NOW
    assert decided.status is not None
    assert decided.status.phase is Phase.PREPARING


def test_the_training_job_is_created_before_status_tells_that_prepare_is_done() -> None:
    w = world()
    w.pass_stage()
    assert w.plan().create_job is Stage.TRAIN


def test_every_phase_is_passed_in_order() -> None:
    w = world()
    seen = []

    def look() -> None:
        w.settle()
        assert w.status.phase is not None
        seen.append(w.status.phase)

    look()
    for stage in PIPELINE:
        w.start_pod()
        look()
        w.run_pod()
        look()
        w.end_pod(0, success(stage))
        look()
    assert list(dict.fromkeys(seen)) == [
        Phase.PREPARING,
        Phase.QUEUED,
        Phase.TRAINING,
        Phase.PUBLISHING,
        Phase.SUCCEEDED,
    ]


def test_a_training_pod_that_is_done_is_not_queued_while_its_job_is_not_complete_yet() -> None:
    w = world()
    w.pass_stage()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.settle()
    assert w.status.phase is Phase.TRAINING
    w.change_pod(phase="Succeeded", finished_at=w.now, exit_code=0)
    w.settle()
    assert w.status.phase is Phase.TRAINING
    assert w.status.message == "The training pod is done."


def test_events_tell_the_story_in_order() -> None:
    w = in_publishing()
    w.pass_stage()
    w.settle()
    assert [e.reason for e in w.events] == ["Prepared", "Started", "Trained", "Succeeded"]


def test_a_failure_before_training_says_that_no_gpu_was_used() -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(
        11, failure(Stage.PREPARE, "InvalidData", "3 of 5,120 rows cannot be used (limit 0). train.jsonl:17 is bad")
    )
    w.settle()
    assert message(w, ConditionType.FAILED) == (
        "InvalidData: 3 of 5,120 rows cannot be used (limit 0). train.jsonl:17 is bad. "
        "Fix the rows, or set data.checks.maxBadRows. No GPU was used."
    )


def test_a_failure_in_training_does_not_claim_that_no_gpu_was_used() -> None:
    w = in_training()
    w.end_pod(22, failure(Stage.TRAIN, "NonFiniteLoss", "loss is NaN at step 3"))
    w.settle()
    assert (
        message(w, ConditionType.FAILED)
        == "NonFiniteLoss: loss is NaN at step 3. Lower training.optimizer.learningRate."
    )


def test_a_pod_that_waited_on_a_node_for_its_image_held_a_gpu_and_nothing_else_is_claimed() -> None:
    w = world(pendingTimeoutSeconds=60)
    w.pass_stage()
    w.settle()
    w.start_pod()
    w.change_pod(node="gpu-7", waiting_reason="ErrImagePull", waiting_message="connection refused")
    w.settle()
    assert w.status.gpu_held
    w.pods, w.jobs = {}, {}  # somebody deletes both; the image of the next pod cannot be pulled either
    w.settle()
    w.start_pod()
    w.change_pod(waiting_reason="ErrImagePull", waiting_message="connection refused")
    w.settle()
    w.tick(60)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "PendingTimeout"
    assert NO_GPU_USED not in message(w, ConditionType.FAILED)


def test_a_run_without_gpus_used_none_however_it_fails() -> None:
    w = in_training(training={"useCpu": True}, compute={"gpusPerNode": 0})
    w.end_pod(22, failure(Stage.TRAIN, "NonFiniteLoss", "loss is NaN at step 3"))
    w.settle()
    assert message(w, ConditionType.FAILED).endswith(NO_GPU_USED)


@pytest.mark.parametrize(
    ("stages_before", "advice"),
    [(0, "cpuStages.limits.memory"), (1, "Raise compute.memory, or let it grow"), (2, "cpuStages.limits.memory")],
    ids=PIPELINE,
)
def test_advice_names_what_the_stages_own_resources_come_from(stages_before: int, advice: str) -> None:
    w = world(recovery={"maxFailures": 0})
    for _ in range(stages_before):
        w.pass_stage()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.change_pod(terminated_reason="OOMKilled")
    w.end_pod(137)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "HostOutOfMemory"
    assert advice in message(w, ConditionType.FAILED)


def test_a_message_that_gives_the_advice_itself_does_not_give_it_twice() -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(11, failure(Stage.PREPARE, "InvalidData", "bad. Fix the rows, or set data.checks.maxBadRows."))
    w.settle()
    assert message(w, ConditionType.FAILED).count("maxBadRows") == 1


def test_a_reason_that_is_not_a_condition_reason_becomes_unknown() -> None:
    w = world(recovery={"maxFailures": 0})
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(1, failure(Stage.PREPARE, "not a reason", "strange"))
    w.settle()
    assert reason(w, ConditionType.FAILED) == "Unknown"


def test_a_failed_jobs_exit_code_is_found_in_its_condition_when_the_pods_are_gone() -> None:
    w = world()
    w.settle()
    job = w.live_job()
    assert job is not None
    words = "Container prepare for pod ns/x failed with exit code 16 matching FailJob rule at index 1"
    w.jobs[job.name] = replace(job, failed_at=w.now, failed_reason="PodFailurePolicy", failed_message=words)
    assert w.settle().requeue_after is not None, "its pod may still come into sight"
    w.tick(6)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "AccessDenied"


def test_a_finished_job_lets_nothing_run_on() -> None:
    w = in_training(activeDeadlineSeconds=30)
    w.tick(31)
    decided = w.plan()
    assert decided.status is not None
    assert not decided.deletes, "the end is recorded first, then the pods go"
    w.apply(decided)
    assert [d.name.rsplit("-", 1)[1] for d in w.plan().deletes] == ["train"]


def test_the_deadline_counts_running_time_only() -> None:
    w = world(activeDeadlineSeconds=15)
    w.pass_stage()  # runs 10 s
    w.settle()
    w.start_pod()
    w.settle()
    w.tick(3600)
    assert w.settle().requeue_after is None, "a pod that does not run costs nothing"
    w.run_pod()
    decided = w.settle()
    assert decided.requeue_after == pytest.approx(5.05)
    w.tick(5)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "DeadlineExceeded"
    assert w.status.active_seconds == 15


@pytest.mark.parametrize("skew", [-600, 600])
def test_running_time_is_not_what_a_nodes_wrong_clock_makes_of_it(skew: float) -> None:
    w = world(activeDeadlineSeconds=300)
    w.node_skew = skew
    w.pass_stage()  # runs 10 s
    w.settle()
    w.tick(20)
    w.start_pod()
    w.run_pod()
    assert w.settle().requeue_after == pytest.approx(290.05)
    w.tick(100)
    assert w.settle().requeue_after == pytest.approx(190.05)
    w.end_pod(143)
    w.settle()
    assert w.status.active_seconds == 110
    assert [a.started_at for a in w.status.attempts] == ["2026-03-01T12:00:00Z", "2026-03-01T12:00:30Z"]
    w.tick(10)
    w.start_pod()
    w.run_pod()
    w.settle()
    w.tick(180)
    w.settle()
    assert phase(w) is Phase.TRAINING
    w.tick(10)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "DeadlineExceeded"


def test_a_pod_that_waited_for_a_slow_nodes_place_did_not_run_before_it_was_bound() -> None:
    w = world(activeDeadlineSeconds=300)
    w.pass_stage()
    w.settle()
    w.start_pod()
    w.tick(3600)
    w.node_skew = -600
    w.run_pod()
    w.change_pod(bound_at=w.now)
    assert w.settle().requeue_after == pytest.approx(290.05)


def test_attempts_stand_in_the_order_in_which_their_pods_were_made_whatever_their_nodes_clocks_show() -> None:
    w = in_training()
    for skew, node in ((600, "fast"), (-600, "slow")):
        w.end_pod(143)
        w.tick(10)
        w.start_pod()
        w.node_skew = skew
        w.run_pod()
        w.change_pod(node=node)
    w.settle()
    assert [a.node for a in w.status.attempts if a.stage == "train"] == ["gpu-7", "fast", "slow"]
    first, second = w.status.attempts[-2:]
    assert first.finished_at is not None
    assert second.started_at is not None
    assert first.finished_at <= second.started_at


def test_more_executions_than_status_holds_are_counted_once_each() -> None:
    w = in_training()
    for step in range(MAX_ATTEMPTS + 6):
        w.tick(10)
        pod = w.pod()
        assert pod is not None
        w.post(ProgressStatus(execution_id=pod.uid, stage="train", step=step + 1))
        w.end_pod(143)
        w.start_pod()
        w.run_pod()
        w.settle()
    spent = w.status.active_seconds
    assert spent == 10 + 10 * (MAX_ATTEMPTS + 6), "prepare's 10 s, too"
    assert len(w.status.attempts) == MAX_ATTEMPTS
    assert len(w.pods) > MAX_ATTEMPTS, "all pods are still there"
    for _ in range(3):
        assert w.settle().idle
    assert w.status.active_seconds == spent


def test_when_all_is_done_no_attempt_runs_although_its_pods_last_event_was_lost() -> None:
    w = in_publishing()
    w.start_pod()
    w.run_pod()
    w.settle()
    pod = w.pod()
    assert pod is not None
    w.end_pod(0, success(Stage.PUBLISH))
    ended = w.pods[pod.name]
    # The result came as a post; of the pod only its beginning is known.
    w.pods[pod.name] = pod
    w.status = w.status.model_copy(
        update={"progress": ProgressStatus(stage="publish", execution_id=pod.uid, sequence=1, report=ended.report)}
    )
    w.settle()
    assert w.status.phase is Phase.SUCCEEDED
    assert [a.outcome for a in w.status.attempts] == ["Succeeded"] * 3
    assert w.status.attempts[-1].finished_at is not None


def test_attempts_that_start_in_one_second_stand_in_the_order_of_their_stages() -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.pods = {name: replace(pod, uid="z" + pod.uid) for name, pod in w.pods.items()}  # the later one's uid sorts first
    w.run_pod()
    w.settle()
    w.end_pod(0, success(Stage.PREPARE))
    w.settle()
    w.start_pod()
    w.run_pod()
    w.settle()
    assert [a.stage for a in w.status.attempts] == ["prepare", "train"]
    assert len({a.started_at for a in w.status.attempts}) == 1
    assert w.settle().idle


def test_of_attempts_that_start_in_one_second_the_one_that_ended_first_was_first() -> None:
    """Training that was suspended as soon as it began, and the prepare stage of the resumption."""
    now, later = "2026-03-01T12:00:00Z", "2026-03-01T12:00:01Z"
    stopped = AttemptStatus(stage="train", execution_id="b", pod="y", outcome="Failed", started_at=now, finished_at=now)
    again = AttemptStatus(stage="prepare", execution_id="a", pod="x", outcome="Running", started_at=now)
    for prepare in (again, again.model_copy(update={"outcome": "Succeeded", "finished_at": later})):
        assert sorted([prepare, stopped], key=attempt_rank) == [stopped, prepare]


def test_the_time_of_a_pod_that_was_lost_with_its_node_counts() -> None:
    w = in_training(activeDeadlineSeconds=3600)
    w.tick(100)
    w.change_pod(phase="Failed", pod_reason="NodeLost", disrupted="the node is unreachable")
    w.settle()
    assert w.status.attempts[-1].outcome == "Failed"
    assert w.status.active_seconds == 110, "prepare's 10 s and the 100 s of training"


def test_one_wait_longer_than_allowed_fails_with_what_was_missing() -> None:
    w = in_training()
    w = world(pendingTimeoutSeconds=60)
    w.pass_stage()
    w.settle()
    w.start_pod()
    w.change_pod(unschedulable="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", unschedulable_since=w.now)
    decided = w.settle()
    assert decided.requeue_after == pytest.approx(60.05)
    assert reason(w, ConditionType.WAITING) == "Unschedulable"
    assert message(w, ConditionType.WAITING) == (
        "no node has room for 1 × nvidia.com/gpu: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu. "
        "Since 2026-03-01T12:00:10Z, and the job fails if it still is so at 2026-03-01T12:01:10Z (pendingTimeoutSeconds is 60). "
        "Free or add the resource that the message names, or ask for less."
    )
    w.tick(30)
    assert w.plan().idle, "the time that passes is not written down"
    w.tick(-30)
    w.tick(60)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "PendingTimeout"
    assert message(w, ConditionType.FAILED).startswith(
        "PendingTimeout: waited 1m00s (pendingTimeoutSeconds is 60) and still Unschedulable: no node has room"
    )
    assert message(w, ConditionType.FAILED).endswith("No GPU was used.")


def test_another_thing_that_is_missing_has_a_clock_of_its_own() -> None:
    w = world(pendingTimeoutSeconds=60)
    w.settle()
    w.start_pod()
    w.change_pod(unschedulable="no room", unschedulable_since=w.now)
    w.settle()
    w.tick(50)
    w.change_pod(unschedulable="", node="n", waiting_reason="ErrImagePull", waiting_message="connection refused")
    w.settle()
    w.tick(50)
    w.settle()
    assert w.status.phase is Phase.PREPARING
    assert reason(w, ConditionType.WAITING) == "ImageUnavailable"
    assert w.status.waiting_since == "2026-03-01T12:00:50Z"


def test_a_wait_that_a_pod_tells_comes_and_goes_with_its_posts() -> None:
    w = world()
    pod = running_pod(w)
    w.post(ProgressStatus(execution_id=pod.uid, waiting_reason="SecretMissing", waiting_message="Secret hf-token"))
    w.settle()
    assert reason(w, ConditionType.WAITING) == "SecretMissing"
    w.post(ProgressStatus(execution_id=pod.uid))
    w.settle()
    assert not is_true(w.status, ConditionType.WAITING)


def test_a_wait_that_an_earlier_pod_told_does_not_count() -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.post(ProgressStatus(execution_id="another", waiting_reason="SecretMissing", waiting_message="x"))
    w.settle()
    assert find(w.status, ConditionType.WAITING) is None


@pytest.mark.parametrize("job_too", [False, True], ids=["the pod", "its Job, too"])
def test_a_deleted_pod_whose_node_does_not_confirm_its_end_is_waited_for_and_named(job_too: bool) -> None:
    w = in_training(pendingTimeoutSeconds=600)
    job = w.live_job()
    assert job is not None
    if job_too:
        w.jobs[job.name] = replace(job, deleting=True)
    w.change_pod(deleting=True, deletion_due=w.now + timedelta(seconds=120))
    assert w.settle().requeue_after == pytest.approx(150.05)
    w.tick(149)
    w.settle()
    assert not is_true(w.status, ConditionType.WAITING)
    w.tick(1)
    decided = w.settle()
    assert reason(w, ConditionType.WAITING) == "NodeLost"
    assert "node gpu-7 does not confirm it" in message(w, ConditionType.WAITING)
    assert "delete its Node object" in message(w, ConditionType.WAITING)
    assert decided.requeue_after == pytest.approx(570.05), "since the end of its grace period"
    w.collect()
    w.settle()
    w.start_pod()
    w.settle()
    assert not is_true(w.status, ConditionType.WAITING)


def test_a_suspension_that_waits_for_a_lost_node_names_it() -> None:
    w = in_training()
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    pod = next(p for p in w.pods.values() if p.stage is Stage.TRAIN)
    w.pods[pod.name] = replace(pod, deletion_due=w.now + timedelta(seconds=120))
    assert w.settle().requeue_after == pytest.approx(150.05)
    w.tick(150)
    w.settle()
    assert w.status.message is not None
    assert w.status.message.startswith("Suspending: waits for the pods to stop. NodeLost: the train pod")
    w.collect()
    w.settle()
    assert phase(w) is Phase.SUSPENDED


def test_a_refused_create_is_not_repeated_before_its_time() -> None:
    w = world()
    w.refusal = Refusal("exceeded quota", w.now + timedelta(seconds=8))
    decided = w.plan()
    assert decided.create_job is None
    assert decided.requeue_after == pytest.approx(8.05)
    assert decided.status is not None
    assert decided.status.phase is Phase.PENDING
    w.settle()
    w.tick(8)
    assert w.plan().create_job is Stage.PREPARE


def test_an_object_that_validation_refuses_fails_the_job_in_the_servers_words() -> None:
    w = world()
    words = 'Job.batch "story-3f9c2a11-prepare" is invalid: spec.template.labels: Invalid value: "a b"'
    w.refusal = Refusal(words, w.now + timedelta(seconds=1), for_good=True)
    w.settle()
    assert message(w, ConditionType.FAILED) == (
        f"InvalidConfig: {words}. Change the field that the message names. No GPU was used."
    )


def api_error(status: int, message: str, *fields: str) -> ApiError:
    return ApiError(status, "Why", message, "POST", "/apis/batch/v1/namespaces/ns/jobs", fields)


@pytest.mark.parametrize(
    ("problem", "words", "for_good"),
    [
        (api_error(403, "exceeded quota"), "exceeded quota", False),
        (api_error(422, "is invalid: spec.x", "spec.x"), "is invalid: spec.x", True),
        (api_error(422, "ValidatingAdmissionPolicy denied request"), "ValidatingAdmissionPolicy denied request", False),
        (
            api_error(500, "failed calling webhook"),
            "the API server answered 500 (Why): failed calling webhook",
            False,
        ),
        (api_error(0, ""), "the API server answered nothing (Why): Why", False),
    ],
)
def test_what_refuses_an_object_is_told_and_only_validation_is_for_good(
    problem: ApiError, words: str, for_good: bool
) -> None:
    assert refusal(problem, START) == Refusal(words, START, for_good)


def test_a_job_that_gets_no_pod_waits_for_what_refuses_it_until_the_timeout() -> None:
    w = world(pendingTimeoutSeconds=60)
    decided = w.settle()
    assert decided.requeue_after == pytest.approx(10.05), "nothing will tell that a pod is missing"
    w.tick(10)
    w.settle()
    job = w.live_job()
    assert job is not None
    assert reason(w, ConditionType.WAITING) == "AdmissionRefused"
    assert f"kubectl describe job {job.name} -n ns" in message(w, ConditionType.WAITING)
    w.pod_refusal = "exceeded quota: gpus, requested: pods=1, used: pods=3, limited: pods=3"
    decided = w.settle()
    assert "the prepare pod cannot be created: exceeded quota: gpus" in message(w, ConditionType.WAITING)
    assert decided.requeue_after == pytest.approx(50.05)
    w.tick(50)
    w.settle()
    assert reason(w, ConditionType.FAILED) == "PendingTimeout"
    assert "exceeded quota: gpus" in message(w, ConditionType.FAILED)


def test_a_job_that_gets_its_pod_at_last_waits_no_more() -> None:
    w = world()
    w.settle()
    w.tick(10)
    w.settle()
    assert is_true(w.status, ConditionType.WAITING)
    w.start_pod()
    w.settle()
    assert not is_true(w.status, ConditionType.WAITING)


@pytest.mark.parametrize(
    ("why", "fields"),
    [
        ("the Job controller counts one", {"active": 1}),
        ("it was resumed a moment ago", {"started_at": START + timedelta(seconds=3600)}),
        ("it is queued", {"suspended": True}),
    ],
)
def test_a_job_without_a_visible_pod_is_not_refused_when(why: str, fields: dict[str, object]) -> None:
    w = world()
    w.settle()
    w.tick(3600)
    job = w.live_job()
    assert job is not None
    w.jobs[job.name] = replace(job, **fields)  # type: ignore[arg-type]
    w.settle()
    assert not is_true(w.status, ConditionType.WAITING), why


def test_the_pause_before_a_failed_pod_is_replaced_is_no_refusal() -> None:
    w = world()
    w.settle()
    for _ in range(2):
        w.start_pod()
        w.run_pod()
        w.change_pod(phase="Failed", finished_at=w.now, exit_code=1)
    w.tick(29)
    w.settle()
    assert not is_true(w.status, ConditionType.WAITING), "20 s of pause and 10 s of grace"
    w.tick(1)
    w.settle()
    assert reason(w, ConditionType.WAITING) == "AdmissionRefused"


def test_words_about_a_pod_that_was_never_there_do_not_name_it() -> None:
    told = 'Error creating: pods "story-3f9c2a11-train-x7k2p" is forbidden: exceeded quota: gpus'
    assert plain_refusal(told) == "exceeded quota: gpus"


def test_suspending_deletes_finished_jobs_too_and_forgets_the_milestones() -> None:
    w = in_training()
    w.spec = w.spec.model_copy(update={"suspend": True})
    assert {d.name.rsplit("-", 1)[1] for d in w.plan().deletes} == {"prepare", "train"}
    w.settle()
    assert phase(w) is Phase.TRAINING, "as long as a pod is left"
    w.collect()
    w.settle()
    assert phase(w) is Phase.SUSPENDED
    assert not is_true(w.status, ConditionType.PREPARED)


def test_a_job_is_not_made_anew_before_the_old_ones_pods_are_gone() -> None:
    w = in_training()
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    w.spec = w.spec.model_copy(update={"suspend": False})
    assert w.plan().create_job is None
    w.collect()
    assert w.plan().create_job is Stage.PREPARE


@pytest.mark.parametrize(
    ("saved", "words"), [(402, "goes on from the checkpoint of step 402"), (None, "training begins anew")]
)
def test_a_resumed_job_says_where_training_goes_on(saved: int | None, words: str) -> None:
    w = in_training()
    pod = w.pod()
    assert pod is not None
    w.post(ProgressStatus(execution_id=pod.uid, stage="train", step=402, checkpoint_step=saved))
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    w.collect()
    w.settle()
    w.spec = w.spec.model_copy(update={"suspend": False})
    w.settle()
    assert w.live_job() is not None
    assert w.events[-1].reason == "Resumed"
    assert words in w.events[-1].message


def test_success_wins_over_a_late_suspend() -> None:
    w = in_publishing()
    w.pass_stage()
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    assert w.status.phase is Phase.SUCCEEDED


def test_a_lost_report_is_written_down_before_the_job_goes() -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(0, None)
    assert w.settle().requeue_after is not None, "it may still come"
    w.tick(6)
    decided = w.plan()
    assert not decided.deletes
    assert decided.urgency is Urgency.NOW
    w.apply(decided)
    assert w.plan().deletes


def test_lost_reports_are_bounded() -> None:
    w = world()
    for _ in range(4):
        w.settle()
        w.start_pod()
        w.run_pod()
        w.end_pod(0, None)
        w.settle()
        w.tick(6)
        w.settle()
        w.collect()
    assert "each time its report was lost" in message(w, ConditionType.FAILED)


def test_a_report_that_only_the_final_post_brought_counts() -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.settle()
    pod = w.pod()
    assert pod is not None
    w.post(ProgressStatus(execution_id=pod.uid, report=success(Stage.PREPARE)))
    w.end_pod(0, None)
    w.settle()
    job = w.live_job()
    assert job is not None
    assert job.stage is Stage.TRAIN


def test_the_training_job_alone_proves_that_prepare_is_done() -> None:
    w = in_training()
    w.status = w.status.model_copy(update={"conditions": [], "phase": None})
    w.jobs = {n: j for n, j in w.jobs.items() if j.stage is Stage.TRAIN}
    w.pods = {n: p for n, p in w.pods.items() if p.stage is Stage.TRAIN}
    assert w.settle().create_job is None
    assert is_true(w.status, ConditionType.PREPARED)


def test_status_alone_proves_that_prepare_is_done() -> None:
    w = world()
    w.pass_stage()
    w.settle()
    w.jobs, w.pods = {}, {}
    assert w.plan().create_job is Stage.TRAIN


def test_a_job_being_deleted_is_left_to_the_garbage_collector() -> None:
    w = in_training()
    w.deleting = True
    assert w.plan().idle


def test_time_to_live_counts_from_completion() -> None:
    w = in_publishing(ttlSecondsAfterFinished=30)
    w.pass_stage()
    assert w.settle().requeue_after == 30
    w.tick(30)
    assert w.plan().delete_self


def test_a_finished_job_whose_time_to_live_is_edited_says_so_and_changes_in_nothing_else() -> None:
    w = in_publishing()
    w.pass_stage()
    w.settle()
    end = w.status
    told = len(w.events)
    w.spec = w.spec.model_copy(update={"ttl_seconds_after_finished": 60})
    w.generation += 1
    w.tick(30)
    assert w.settle().requeue_after == 30
    assert w.status == end.model_copy(update={"observed_generation": w.generation})
    assert len(w.events) == told
    w.tick(30)
    assert w.plan().delete_self


def test_a_spec_that_cannot_be_read_fails_the_job() -> None:
    w = world()
    observation = w.observe()
    view = replace(observation.job, spec=None, spec_error="spec.method: unknown")
    decided = plan(replace(observation, job=view))
    assert decided.status is not None
    assert decided.status.phase is Phase.FAILED


def test_bookkeeping_alone_is_not_urgent() -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.run_pod()
    decided = w.plan()
    assert decided.status is not None
    assert decided.urgency is Urgency.LATER


def test_another_word_is_no_transition() -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.change_pod(waiting_reason="ErrImagePull", waiting_message="connection refused")
    w.settle()
    before = find(w.status, ConditionType.WAITING)
    w.tick(30)
    w.change_pod(waiting_reason="ImagePullBackOff", waiting_message="back-off")
    w.settle()
    after = find(w.status, ConditionType.WAITING)
    assert before is not None
    assert after is not None
    assert after.message != before.message
    assert after.last_transition_time == before.last_transition_time


def test_a_pod_whose_job_is_gone_holds_the_next_one_back() -> None:
    w = in_training()
    w.jobs = {}
    assert w.plan().create_job is None
    w.pods = {}
    assert w.plan().create_job is Stage.PREPARE


def test_ended_pods_whose_job_was_deleted_without_them_hold_nothing_back() -> None:
    w = in_training()
    w.end_pod(143)
    w.jobs = {}
    w.pods = {n: replace(p, owner_uid="") for n, p in w.pods.items()}
    w.settle()
    job = w.live_job()
    assert job is not None
    assert job.stage is Stage.PREPARE, "a CPU pod looks for training's result"
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    w.collect()
    w.settle()
    assert phase(w) is Phase.SUSPENDED


def test_times_of_conditions_move_only_when_they_flip() -> None:
    w = in_training()
    before = find(w.status, ConditionType.PREPARED)
    w.tick(100)
    w.end_pod(0, None)
    w.settle()
    w.tick(6)
    w.settle()
    assert find(w.status, ConditionType.PREPARED) == before
    assert w.now > START


@pytest.mark.parametrize("suspend", [False, True])
def test_a_plan_alone_ends_with_prepare(suspend: bool) -> None:
    w = world(planOnly=True)
    w.pass_stage()
    w.spec = w.spec.model_copy(update={"suspend": suspend})
    w.settle()
    assert (phase(w), reason(w, ConditionType.COMPLETE)) == (Phase.SUCCEEDED, "Planned")
    assert is_true(w.status, ConditionType.PREPARED)
    assert not is_true(w.status, ConditionType.TRAINED)
    assert {j.stage for j in w.jobs.values()} == {Stage.PREPARE}
    assert [e.reason for e in w.events] == ["Prepared", "Planned"]


def test_a_plan_alone_whose_report_is_lost_is_made_again() -> None:
    w = world(planOnly=True)
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(0, None)
    w.settle()
    w.tick(60)
    w.settle()
    w.collect()
    assert phase(w) is Phase.PREPARING
    w.pass_stage()
    w.settle()
    assert reason(w, ConditionType.COMPLETE) == "Planned"


def test_a_plan_that_does_not_fit_fails() -> None:
    w = world(planOnly=True)
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(26, failure(Stage.PREPARE, "DoesNotFit", "it needs 30 GiB"))
    w.settle()
    assert reason(w, ConditionType.FAILED) == "DoesNotFit"
    assert message(w, ConditionType.FAILED).endswith(NO_GPU_USED)


def test_a_result_that_only_a_post_tells_is_written_down_before_the_next_stage_can_replace_it() -> None:
    w = world()
    pod = running_pod(w)
    report = success(Stage.PREPARE)
    w.post(ProgressStatus(execution_id=pod.uid, stage="prepare", report=report))
    w.end_pod(0, None)
    told = w.plan()
    assert (told.create_job, told.urgency) == (None, Urgency.NOW)
    w.apply(told)
    assert w.plan().create_job is Stage.TRAIN
    pod = running_pod(w)
    w.post(ProgressStatus(execution_id=pod.uid, stage="train", step=1))
    w.settle()
    assert w.status.data is not None
    assert w.status.plan is not None
    assert w.status.plan.total_steps == 640


def test_a_result_that_its_pod_tells_costs_no_write_of_its_own() -> None:
    w = world()
    w.pass_stage()
    assert w.plan().create_job is Stage.TRAIN


def test_gpu_time_is_counted_from_binding_to_end_for_every_pod_and_compared_with_training() -> None:
    w = world(compute={"gpusPerNode": 2})
    w.pass_stage()
    w.settle()
    assert w.status.gpu_time is None, "prepare holds none"
    for code, seconds in ((143, 60), (0, 300)):
        w.start_pod()
        w.change_pod(bound_at=w.now)
        w.tick(5)  # its image is pulled
        w.run_pod()
        w.settle()
        w.tick(seconds)
        w.end_pod(code, success(Stage.TRAIN) if code == 0 else None)
        w.settle()
    told = w.status.gpu_time
    assert told is not None
    assert told.held_seconds == 2 * (65 + 305)
    seconds = train_report().metrics.train_seconds
    assert told.training_seconds == round(2 * seconds)
    assert told.utilization == round(min(1.0, told.training_seconds / told.held_seconds), 3)
    w.pass_stage()
    w.settle()
    assert phase(w) is Phase.SUCCEEDED
    assert w.status.gpu_time == told, "publish holds none"


def test_gpus_that_the_plan_chose_are_asked_for_and_counted() -> None:
    w = world(compute={"gpusPerNode": "Auto"})
    w.settle()
    assert w.status.plan is not None
    assert w.status.plan.gpus_per_node is None
    assert "on as many nvidia.com/gpu as the plan needs" in w.status.plan.summary
    w.start_pod()
    w.run_pod()
    w.end_pod(0, planned_success(3))
    assert w.plan().allotment.gpus_per_node == 3
    w.settle()
    assert w.status.plan.gpus_per_node == 3
    assert w.status.message == "Starting the training pod with 3 × nvidia.com/gpu."
    w.start_pod()
    w.change_pod(bound_at=w.now)
    w.run_pod()
    w.tick(10)
    w.end_pod(1)
    w.settle()
    assert w.status.gpu_time is not None
    assert w.status.gpu_time.held_seconds == 3 * 10


def test_a_failed_job_counts_what_its_last_pod_held() -> None:
    w = in_training(activeDeadlineSeconds=100)
    w.tick(100)
    w.settle()
    assert phase(w) is Phase.FAILED
    told = w.status.gpu_time
    assert told is not None
    assert (told.held_seconds, told.training_seconds) == (100, None)
    assert told.summary == "GPUs held for 100 GPU-seconds."


def test_a_job_without_gpus_holds_none() -> None:
    w = in_publishing(compute={"gpusPerNode": 0}, training={"useCpu": True})
    w.pass_stage()
    w.settle()
    assert phase(w) is Phase.SUCCEEDED
    assert w.status.gpu_time is None
