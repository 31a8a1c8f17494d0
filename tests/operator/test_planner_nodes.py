"""Several pods that train together: the first one speaks for all, and what befalls another is told, counted and waited for."""

from __future__ import annotations

from dataclasses import replace

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import Stage
from finetune_api.status import AttemptStatus, ConditionType, Phase
from finetune_operator.planning import conditions
from finetune_operator.planning.budget import returns
from finetune_operator.planning.gpu_time import MAX_HOLDERS
from finetune_operator.planning.model import Pod
from tests.operator.manifests import failure, success
from tests.operator.world import World, world

NODES = {"nodes": 2, "gpusPerNode": 3}


def training() -> World:
    """The first pod runs, and another one is there."""
    w = world(compute=NODES)
    w.pass_stage()
    w.settle()
    w.start_pod()
    w.change_pod(bound_at=w.now)
    w.run_pod()
    job = w.live_job()
    assert job is not None
    w.pods["peer"] = Pod("peer", "peer-uid", job.uid, Stage.TRAIN, w.now, index=1)
    return w


def change_peer(w: World, **fields: object) -> None:
    w.pods["peer"] = replace(w.pods["peer"], **fields)  # type: ignore[arg-type]


def attempts(w: World) -> list[tuple[str, str]]:
    return [(a.stage, a.outcome) for a in w.status.attempts]


def test_the_first_pod_is_the_execution_and_its_gpus_count_on_every_node() -> None:
    w = training()
    change_peer(w, phase="Running", node="gpu-8", started_at=w.now, bound_at=w.now)
    w.settle()
    assert w.status.phase is Phase.TRAINING
    assert attempts(w) == [("prepare", "Succeeded"), ("train", "Running")]
    assert w.status.plan is not None
    assert "on 3 × nvidia.com/gpu on each of 2 nodes" in w.status.plan.summary
    w.tick(100)
    change_peer(w, phase="Succeeded", finished_at=w.now, exit_code=0)
    w.end_pod(0, success(Stage.TRAIN))
    w.settle()
    assert w.status.gpu_time is not None
    assert w.status.gpu_time.held_seconds == 2 * 3 * 100
    w.pass_stage()
    w.settle()
    assert w.status.phase is Phase.SUCCEEDED


def test_a_pod_without_a_place_is_what_the_job_waits_for() -> None:
    w = training()
    change_peer(w, unschedulable="0/2 nodes are available", unschedulable_since=w.now)
    w.settle()
    told = conditions.find(w.status, ConditionType.WAITING)
    assert told is not None
    assert (told.status, told.reason) == ("True", Reason.UNSCHEDULABLE)
    assert "3 × nvidia.com/gpu on each of 2 nodes" in told.message


def test_another_pods_interruption_is_no_execution_and_keeps_the_next_one_waiting() -> None:
    w = training()
    w.settle()
    change_peer(w, phase="Failed", node="gpu-8", started_at=w.now, finished_at=w.now, exit_code=60)
    w.settle()
    assert attempts(w) == [("prepare", "Succeeded"), ("train", "Running")]
    change_peer(w, phase="Running", finished_at=None, exit_code=None)
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    for pod in [p for p in w.pods.values() if p.name != "peer"]:
        del w.pods[pod.name]
    w.jobs.clear()
    w.spec = w.spec.model_copy(update={"suspend": False})
    assert w.plan().create_job is None, "one of the last execution's pods still runs"
    del w.pods["peer"]
    assert w.plan().create_job is Stage.PREPARE


def test_another_pods_own_end_is_told_and_its_gpus_are_counted_until_then() -> None:
    w = training()
    began = w.now
    change_peer(w, phase="Running", node="gpu-8", started_at=began, bound_at=began)
    w.settle()
    w.tick(1000)
    change_peer(w, phase="Failed", finished_at=w.now, exit_code=137, terminated_reason="OOMKilled")
    w.settle()
    [told] = [a for a in w.status.attempts if a.index]
    assert (told.pod, told.index, told.reason) == ("peer", 1, Reason.HOST_OUT_OF_MEMORY)
    assert held(w) == 3 * 1000, "the first pod still runs"
    w.tick(10)
    w.end_pod(0, success(Stage.TRAIN))
    w.settle()
    assert held(w) == 3 * (1000 + 1010)
    prepared = 10
    assert w.status.active_seconds == prepared + 1010


def held(w: World) -> int:
    return w.status.gpu_time.held_seconds if w.status.gpu_time is not None else 0


def test_every_pod_is_counted_for_its_own_time_also_where_its_end_was_not_seen() -> None:
    w = training()
    w.settle()
    w.tick(100)  # the peer finds a place later
    change_peer(w, node="gpu-8", bound_at=w.now)
    w.settle()
    w.tick(30)  # its image is pulled
    change_peer(w, phase="Running", started_at=w.now)
    w.settle()
    w.tick(170)
    del w.pods["peer"]  # it is lost with its node, and nothing tells how
    w.settle()
    assert held(w) == 3 * 200
    assert attempts(w) == [("prepare", "Succeeded"), ("train", "Running")]
    w.tick(60)
    job = w.live_job()
    assert job is not None
    w.pods["peer"] = Pod("peer", "peer-2", job.uid, Stage.TRAIN, w.now, index=1, node="gpu-9", bound_at=w.now)
    w.settle()
    assert held(w) == 3 * 200, "counted once"
    w.tick(40)
    change_peer(w, phase="Running", started_at=w.now)
    w.tick(100)
    w.end_pod(0, success(Stage.TRAIN))  # before its peer
    w.settle()
    w.tick(5)
    change_peer(w, phase="Failed", finished_at=w.now, exit_code=60)
    w.settle()
    first = 100 + 200 + 60 + 140
    assert held(w) == 3 * (first + 200 + 145)
    w.pass_stage()
    w.settle()
    assert w.status.phase is Phase.SUCCEEDED
    assert held(w) == 3 * (first + 200 + 145)
    assert w.status.gpu_holders == []


def test_a_pod_that_was_bound_and_ended_while_the_operator_was_away_is_counted_from_what_it_tells() -> None:
    w = training()
    w.settle()
    w.tick(500)
    before = w.now
    change_peer(w, node="gpu-8", bound_at=w.now)
    w.tick(20)
    ended = {"phase": "Failed", "started_at": before, "finished_at": w.now, "exit_code": 60}
    w.ended.append(replace(w.pods.pop("peer"), **ended))  # type: ignore[arg-type]
    w.tick(3600)
    for _ in range(2):
        w.settle()
        assert held(w) == 3 * 20
    w.ended.clear()  # an operator that starts anew has not seen it
    w.settle()
    assert held(w) == 3 * 20


def test_pods_that_hold_nothing_are_not_counted() -> None:
    w = training()
    change_peer(w, phase="Failed", node="gpu-8", bound_at=w.now, pod_reason="OutOfcpu")
    w.tick(100)
    w.settle()
    assert held(w) == 0


def test_more_pods_than_status_holds_are_counted_once_each() -> None:
    w = training()
    job = w.live_job()
    assert job is not None
    count = MAX_HOLDERS + 20
    for number in range(count):
        w.tick(10)
        ended = Pod(f"p{number}", f"p{number}", job.uid, Stage.TRAIN, w.now, index=1, node="n", bound_at=w.now)
        w.pods[ended.name] = replace(ended, phase="Failed", started_at=w.now, exit_code=60, finished_at=w.now)
        w.tick(10)
        w.pods[ended.name] = replace(w.pods[ended.name], finished_at=w.now)
        w.settle()
    assert held(w) == 3 * 10 * count
    assert len(w.status.gpu_holders) == MAX_HOLDERS


def test_what_an_earlier_version_counted_by_its_attempt_is_not_counted_again() -> None:
    w = training()
    w.settle()
    w.tick(100)
    w.end_pod(0, success(Stage.TRAIN))
    w.settle()
    before = held(w)
    assert before == 3 * 100
    w.status = w.status.model_copy(update={"gpu_holders": []})
    w.settle()
    assert held(w) == before


def test_several_pods_that_give_their_gpus_back_at_once_are_one_return() -> None:
    back = {"stage": "train", "pod": "p", "outcome": "Failed", "reason": Reason.PODS_MISSING}
    attempts = [AttemptStatus(execution_id=str(n), index=n or None, **back) for n in range(6)]
    prepare = AttemptStatus(execution_id="prepare", stage="prepare", pod="p", outcome="Succeeded")
    assert returns(attempts) == 1
    assert returns([*attempts, prepare, *attempts]) == 2


def test_a_pod_that_gave_its_gpus_back_sends_the_job_back_to_prepare_and_is_counted() -> None:
    w = training()
    w.settle()
    code = FAILURES[Reason.PODS_MISSING].exit_code
    said = failure(Stage.TRAIN, Reason.PODS_MISSING, "the first pod cannot be reached")
    del w.pods[next(p for p in w.pods if w.pods[p].stage is Stage.TRAIN and p != "peer")]
    change_peer(w, phase="Failed", node="gpu-8", started_at=w.now, finished_at=w.now, exit_code=code, report=said)
    job = w.live_job()
    assert job is not None
    words = f"Container train for pod ns/peer failed with exit code {code} matching FailJob rule at index 1"
    w.jobs[job.name] = replace(job, failed_at=w.now, failed_reason="PodFailurePolicy", failed_message=words)
    w.settle()
    assert "gave its GPU back" in (w.status.message or "")
    assert [a.reason for a in w.status.attempts if a.pod == "peer"] == [Reason.PODS_MISSING]
    w.collect()
    w.settle()
    assert [j.stage for j in w.jobs.values()] == [Stage.PREPARE]
