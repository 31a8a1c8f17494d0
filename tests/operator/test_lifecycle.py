"""Suspend and resume, delete, deadline, time to live, conflicts, lost reports: on a real API server with scripted pods."""

from __future__ import annotations

import threading

import pytest

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import Stage
from finetune_cluster.steps import Pod, Running, Step, Terminated, run_forever
from tests.operator.harness import (
    Bench,
    condition,
    finetunejobs_of,
    is_true,
    jobs_of,
    pods_of,
    stage_of,
    succeed_stage,
    until_set,
)
from tests.operator.manifests import failure, finetunejob, success, termination_message

pytestmark = pytest.mark.light


def train_forever(pod: Pod) -> list[Step]:
    return run_forever() if stage_of(pod) is Stage.TRAIN else succeed_stage(pod)


def test_a_suspended_job_holds_no_pods_and_resumes_from_prepare(bench: Bench) -> None:
    bench.start_operator()
    hold = threading.Event()

    def script(pod: Pod) -> list[Step]:
        return run_forever() if stage_of(pod) is Stage.TRAIN and not hold.is_set() else succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("pause").build())
        bench.until_phase("pause", "Training")
        bench.merge("pause", {"suspend": True})
        suspended = bench.until_phase("pause", "Suspended")
        assert is_true(suspended, "Suspended")
        assert not is_true(suspended, "Prepared")
        assert bench.pods() == []
        assert bench.stage_jobs() == []
        hold.set()
        bench.merge("pause", {"suspend": False})
        done = bench.until_finished("pause")
    assert is_true(done, "Complete")
    assert condition(done, "Suspended")["status"] == "False"
    stages = [a["stage"] for a in done["status"]["attempts"]]
    assert stages == ["prepare", "train", "prepare", "train", "publish"]
    told = dict(bench.told("pause", "Prepared", "Started", "Suspended", "Resumed", "Trained"))
    assert "training begins anew" in told["Resumed"]


def test_training_that_gives_its_gpu_back_goes_on_after_prepare_has_waited_without_one(bench: Bench) -> None:
    """The store was away for longer than a GPU may be held for it."""
    bench.start_operator()
    away = failure(Stage.TRAIN, Reason.STORAGE_UNAVAILABLE, "the store is away")
    gave_back = threading.Event()

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is not Stage.TRAIN or gave_back.is_set():
            return succeed_stage(pod)
        gave_back.set()
        return [Running(), Terminated(FAILURES[Reason.STORAGE_UNAVAILABLE].exit_code or 0, termination_message(away))]

    with bench.script(script):
        bench.apply(finetunejob("back").max_failures(0).build())
        done = bench.until_finished("back")
    assert is_true(done, "Complete"), "it counts against nothing"
    attempts = [(a["stage"], a["outcome"], a.get("reason")) for a in done["status"]["attempts"]]
    assert attempts == [
        ("prepare", "Succeeded", "Succeeded"),
        ("train", "Failed", "StorageUnavailable"),
        ("prepare", "Succeeded", "Succeeded"),
        ("train", "Succeeded", "Succeeded"),
        ("publish", "Succeeded", "Succeeded"),
    ]


def test_a_job_created_suspended_creates_nothing(bench: Bench) -> None:
    bench.start_operator()
    bench.apply(finetunejob("later").suspended().build())
    bench.until_phase("later", "Suspended")
    assert bench.stage_jobs() == []
    with bench.script():
        bench.merge("later", {"suspend": False})
        assert is_true(bench.until_finished("later"), "Complete")


def test_a_deleted_job_takes_its_children_along_and_its_name_can_be_used_at_once(bench: Bench) -> None:
    bench.start_operator()
    with bench.script(train_forever):
        first = bench.apply(finetunejob("again").build())
        bench.until_phase("again", "Training")
        bench.api.delete(f"{finetunejobs_of(bench.namespace)}/again")
        second = bench.apply(finetunejob("again").build())
        bench.until_phase("again", "Training")
        selector = {"labelSelector": f"finetune.dev/job-uid={first['metadata']['uid']}"}
        bench.until_gone(jobs_of(bench.namespace), query=selector)
        bench.until_gone(pods_of(bench.namespace), query=selector)
    owners = {j["metadata"]["ownerReferences"][0]["uid"] for j in bench.stage_jobs()}
    assert owners == {second["metadata"]["uid"]}


def test_a_deadline_stops_the_pods_and_names_itself(bench: Bench) -> None:
    bench.start_operator()
    with bench.script(train_forever):
        bench.apply(finetunejob("late").deadline(3).build())
        failed = bench.until_finished("late")
        assert condition(failed, "Failed")["reason"] == "DeadlineExceeded"
        assert "activeDeadlineSeconds is 3" in condition(failed, "Failed")["message"]
        train = f"{bench.job('late')['metadata']['uid']}"
        selector = {"labelSelector": f"finetune.dev/job-uid={train},finetune.dev/stage=train"}
        bench.until_gone(pods_of(bench.namespace), query=selector)
        bench.until_gone(jobs_of(bench.namespace), query=selector)
    assert failed["status"]["activeSeconds"] >= 3
    assert all(a["outcome"] != "Running" for a in failed["status"]["attempts"])


def test_a_finished_job_is_deleted_after_its_time_to_live(bench: Bench) -> None:
    bench.start_operator()
    with bench.script():
        bench.apply(finetunejob("brief").ttl(2).build())
        assert is_true(bench.until_finished("brief"), "Complete")
        bench.until_gone(finetunejobs_of(bench.namespace))


def test_a_finished_job_is_not_touched_when_its_children_vanish(bench: Bench) -> None:
    bench.start_operator(FINETUNE_RESYNC_SECONDS="1")
    with bench.script():
        bench.apply(finetunejob("over").build())
        done = bench.until_finished("over")
        for job in bench.stage_jobs():
            bench.api.delete(f"{jobs_of(bench.namespace)}/{job['metadata']['name']}", propagationPolicy="Foreground")
        bench.until_gone(jobs_of(bench.namespace))
        # The next job is handled after the deletions were seen: then nothing may have come back.
        bench.apply(finetunejob("next").build())
        bench.until_finished("next")
    assert {j["metadata"]["labels"]["finetune.dev/job-name"] for j in bench.stage_jobs()} == {"next"}
    assert bench.job("over")["metadata"]["resourceVersion"] == done["metadata"]["resourceVersion"]


@pytest.mark.parametrize("kind", ["Job", "ConfigMap"])
def test_a_foreign_object_under_a_needed_name_fails_the_job_and_is_left_alone(bench: Bench, kind: str) -> None:
    created = bench.apply(finetunejob("taken").build())
    prefix = f"taken-{created['metadata']['uid'][:8]}"
    if kind == "Job":
        container = {"name": "other", "image": "other/image"}
        template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
        path = jobs_of(bench.namespace)
        body = {"metadata": {"name": f"{prefix}-prepare"}, "spec": {"suspend": True, "template": template}}
    else:
        path = f"/api/v1/namespaces/{bench.namespace}/configmaps"
        body = {"metadata": {"name": f"{prefix}-snapshot"}, "data": {"mine": "yes"}}
    foreign = bench.api.create(path, body)
    bench.start_operator()
    failed = bench.until_finished("taken")
    assert condition(failed, "Failed")["reason"] == "NameConflict"
    assert foreign["metadata"]["name"] in condition(failed, "Failed")["message"]
    assert condition(failed, "Failed")["message"].endswith("No GPU was used.")
    still = bench.api.get(f"{path}/{foreign['metadata']['name']}")
    assert still["metadata"]["uid"] == foreign["metadata"]["uid"]


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.PUBLISH])
def test_a_stage_whose_report_is_lost_runs_again(bench: Bench, stage: Stage) -> None:
    bench.start_operator()
    runs: list[str] = []

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is stage:
            runs.append(pod["metadata"]["name"])
            if len(runs) == 1:
                return [Running(), Terminated(0, "")]
        return succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("mute").build())
        done = bench.until_finished("mute", 60)
    assert is_true(done, "Complete")
    assert len(runs) == 2
    assert [a.get("reason") for a in done["status"]["attempts"] if a["stage"] == stage] == ["ReportLost", "Succeeded"]


def test_training_whose_report_is_lost_is_not_repeated(bench: Bench) -> None:
    bench.start_operator()

    def script(pod: Pod) -> list[Step]:
        return [Running(), Terminated(0, "")] if stage_of(pod) is Stage.TRAIN else succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("quiet").build())
        done = bench.until_finished("quiet")
    assert is_true(done, "Complete")
    assert [a["stage"] for a in done["status"]["attempts"]] == ["prepare", "train", "publish"]
    assert done["status"]["metrics"]["heldOutLoss"] == 0.861


def test_training_is_skipped_when_prepare_finds_its_result(bench: Bench) -> None:
    bench.start_operator()

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.PREPARE:
            return [Running(), Terminated(0, termination_message(success(Stage.PREPARE, trained=True)))]
        return succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("reuse").build())
        done = bench.until_finished("reuse")
    assert is_true(done, "Complete")
    assert condition(done, "Trained")["reason"] == "AlreadyTrained"
    assert not any(j["metadata"]["name"].endswith("-train") for j in bench.stage_jobs())


def test_a_training_job_that_kueue_suspends_is_queued_and_never_reverted(bench: Bench) -> None:
    bench.start_operator()
    finish = threading.Event()

    def script(pod: Pod) -> list[Step]:
        return run_forever() if stage_of(pod) is Stage.TRAIN and not finish.is_set() else succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("shared").set(queue={"name": "team-a"}).build())
        training = bench.until_phase("shared", "Training")
        path = f"{jobs_of(bench.namespace)}/shared-{training['metadata']['uid'][:8]}-train"
        labels = bench.api.get(path)["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] == "team-a"
        bench.api.merge(path, {"spec": {"suspend": True}})
        queued = bench.until_phase("shared", "Queued")
        assert "team-a" in queued["status"]["message"]
        assert bench.api.get(path)["spec"]["suspend"] is True
        finish.set()
        bench.api.merge(path, {"spec": {"suspend": False}})
        assert is_true(bench.until_finished("shared"), "Complete")


def test_a_job_deleted_by_hand_is_made_anew(bench: Bench) -> None:
    bench.start_operator()
    finish = threading.Event()

    def script(pod: Pod) -> list[Step]:
        return run_forever() if stage_of(pod) is Stage.TRAIN and not finish.is_set() else succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("hands").build())
        training = bench.until_phase("hands", "Training")
        name = f"hands-{training['metadata']['uid'][:8]}-train"
        finish.set()
        bench.api.delete(f"{jobs_of(bench.namespace)}/{name}", propagationPolicy="Background")
        assert is_true(bench.until_finished("hands"), "Complete")


def test_the_run_is_frozen_when_an_upgrade_comes_between_two_stages(bench: Bench) -> None:
    old = bench.start_operator(FINETUNE_TRAINER_IMAGE="trainer:old", FINETUNE_PREPARE_IMAGE="prepare:old")
    go = threading.Event()

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.PREPARE:
            return [Running(), until_set(go), *succeed_stage(pod)[1:]]
        return succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("frozen").build())
        bench.until_phase("frozen", "Preparing")
        old.stop()
        bench.start_operator(FINETUNE_TRAINER_IMAGE="trainer:new", FINETUNE_PREPARE_IMAGE="prepare:new")
        go.set()
        bench.until_finished("frozen")
    images = {j["spec"]["template"]["spec"]["containers"][0]["image"] for j in bench.stage_jobs()}
    assert images == {"prepare:old", "trainer:old"}
