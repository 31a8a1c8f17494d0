"""While the training Job waits in its queue, the base model is fetched by a Job that nothing waits for."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import CACHE_MOUNT, ENV_ENDPOINT, LABEL_STAGE, PIPELINE, Stage
from finetune_api.progress import StageReport
from finetune_api.status import Phase
from finetune_cluster.steps import Call, Running, Step, Terminated
from finetune_cluster.steps import Pod as RawPod
from finetune_operator.apply import Applier
from finetune_operator.cache import Cache
from finetune_operator.client import Api, ApiError
from finetune_operator.manifests import KUEUE_QUEUE, Owner, stage_job
from finetune_operator.planning.model import Pod, Refusal, StageJob
from finetune_operator.settings import Settings
from finetune_operator.snapshots import Snapshots
from tests.operator.harness import Bench, stage_of, succeed_stage, until_set
from tests.operator.manifests import failure, finetunejob, prepare_report, success, termination_message
from tests.operator.world import START, UID, World, world

QUEUED = {
    "queue": {"name": "team", "cpuName": "cpus"},
    "model": {"uri": "s3://models/smol", "cache": {"claimName": "models"}},
}


def told(pending: bool) -> StageReport:
    """Prepare's good end, with the base in the cache or not."""
    report = prepare_report().model_copy(update={"fetch_pending": pending})
    return success(Stage.PREPARE).model_copy(update={"result": report.to_json_dict()})


def prepare(w: World, pending: bool = True) -> None:
    w.settle()
    w.start_pod()
    w.run_pod()
    w.settle()
    w.tick(10)
    w.end_pod(0, told(pending))


def in_queue(pending: bool = True) -> World:
    """The training Job has joined its queue, which has not admitted it."""
    w = world(**QUEUED)
    prepare(w, pending)
    w.apply(w.plan())
    change(w, Stage.TRAIN, suspended=True, queue="team")
    return w


def job(w: World, stage: Stage) -> StageJob:
    found = w.job(stage)
    assert found is not None
    return found


def change(w: World, stage: Stage, **fields: object) -> None:
    old = job(w, stage)
    w.jobs[old.name] = replace(old, **fields)  # type: ignore[arg-type]


def stages(w: World) -> list[Stage]:
    return [j.stage for j in w.jobs.values()]


def test_the_training_job_joins_its_queue_first_and_the_fetch_begins_while_it_waits() -> None:
    w = world(**QUEUED)
    prepare(w)
    assert w.plan().create_job is Stage.TRAIN
    w.apply(w.plan())
    change(w, Stage.TRAIN, suspended=True, queue="team")
    assert w.plan().create_job is Stage.FETCH, "an operator that starts anew finds the same"
    w.settle()
    assert stages(w) == [Stage.PREPARE, Stage.TRAIN, Stage.FETCH]
    assert w.status.phase is Phase.QUEUED
    assert w.status.message == "Queued in team: waits for 1 × nvidia.com/gpu. The base model is fetched meanwhile."
    w.tick(3600)
    assert w.settle().idle, "once"


def test_what_is_in_the_cache_is_not_fetched() -> None:
    w = in_queue(pending=False)
    w.settle()
    assert stages(w) == [Stage.PREPARE, Stage.TRAIN]


def test_a_pod_that_trains_already_fetches_itself() -> None:
    w = in_queue()
    change(w, Stage.TRAIN, suspended=False)
    w.start_pod()
    w.run_pod()
    w.settle()
    assert stages(w) == [Stage.PREPARE, Stage.TRAIN]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"complete_at": True}, "The base model was fetched meanwhile."),
        ({"failed_at": True, "failed_reason": "BackoffLimitExceeded"}, "could not be fetched meanwhile (Job story-3f9c2a11-fetch)"),
    ],
    ids=["it ends well", "it fails"],
)  # fmt: skip
def test_however_the_fetch_ends_the_job_goes_on_and_it_is_no_execution(end: dict[str, object], words: str) -> None:
    w = in_queue()
    w.settle()
    change(w, Stage.FETCH, **{k: w.now if v is True else v for k, v in end.items()})
    w.pods["f"] = Pod("f", "f", job(w, Stage.FETCH).uid, Stage.FETCH, w.now, phase="Failed", exit_code=16, started_at=w.now)  # fmt: skip
    w.ended.append(replace(w.pods["f"], name="g", uid="g"))
    w.settle()
    assert words in (w.status.message or "")
    w.tick(600)
    change(w, Stage.TRAIN, suspended=False)
    w.pass_stage()
    w.pass_stage()
    w.settle()
    assert w.status.phase is Phase.SUCCEEDED
    assert {a.stage for a in w.status.attempts} == set(PIPELINE)
    assert [s.stage for s in w.status.stages] == list(PIPELINE)


def test_a_fetch_that_goes_on_keeps_no_stage_back_and_ends_with_the_job() -> None:
    w = in_queue()
    w.settle()
    w.pods["f"] = Pod("f", "f", job(w, Stage.FETCH).uid, Stage.FETCH, w.now, phase="Running", started_at=w.now)
    change(w, Stage.TRAIN, suspended=False)
    job_uid = job(w, Stage.TRAIN).uid
    w.pods["t"] = Pod("t", "t", job_uid, Stage.TRAIN, w.now, phase="Running", node="n", started_at=w.now, bound_at=w.now)  # fmt: skip
    w.settle()
    assert w.status.phase is Phase.TRAINING
    w.tick(10)
    end = {"phase": "Succeeded", "finished_at": w.now, "exit_code": 0, "report": success(Stage.TRAIN)}
    w.pods["t"] = replace(w.pods["t"], **end)  # type: ignore[arg-type]
    change(w, Stage.TRAIN, complete_at=w.now)
    w.settle()
    publish = job(w, Stage.PUBLISH)
    w.pods["p"] = Pod("p", "p", publish.uid, Stage.PUBLISH, w.now, started_at=w.now)
    w.pods["p"] = replace(w.pods["p"], **{**end, "report": success(Stage.PUBLISH)})  # type: ignore[arg-type]
    change(w, Stage.PUBLISH, complete_at=w.now)
    w.settle()
    assert w.status.phase is Phase.SUCCEEDED
    assert job(w, Stage.FETCH).deleting


def test_suspending_stops_the_fetch_and_it_begins_again_with_the_job() -> None:
    w = in_queue()
    w.settle()
    w.spec = w.spec.model_copy(update={"suspend": True})
    w.settle()
    w.collect()
    w.settle()
    assert (w.status.phase, w.jobs) == (Phase.SUSPENDED, {})
    w.spec = w.spec.model_copy(update={"suspend": False})
    prepare(w)
    w.settle()
    assert stages(w) == [Stage.PREPARE, Stage.TRAIN, Stage.FETCH]


def test_a_job_that_gave_its_gpu_back_fetches_anew_before_it_asks_for_one_again() -> None:
    w = in_queue()
    w.settle()
    change(w, Stage.FETCH, failed_at=w.now)
    change(w, Stage.TRAIN, suspended=False)
    w.start_pod()
    w.run_pod()
    w.settle()
    away = FAILURES[Reason.HUB_UNAVAILABLE]
    assert away.exit_code is not None
    w.tick(600)
    w.end_pod(away.exit_code, failure(Stage.TRAIN, Reason.HUB_UNAVAILABLE, "the Hub is away"))
    w.settle()
    w.collect()
    w.settle()
    assert stages(w) == [Stage.PREPARE]
    prepare(w)
    w.settle()
    assert stages(w) == [Stage.PREPARE, Stage.TRAIN, Stage.FETCH]


def test_when_prepare_runs_again_and_the_model_is_missing_it_is_fetched_anew() -> None:
    w = in_queue()
    w.settle()
    first = job(w, Stage.FETCH)
    change(w, Stage.FETCH, complete_at=w.now)
    change(w, Stage.TRAIN, suspended=False)
    w.start_pod()
    w.run_pod()
    w.settle()
    w.tick(60)
    train = job(w, Stage.TRAIN)
    del w.jobs[train.name]
    w.pods = {name: pod for name, pod in w.pods.items() if pod.owner_uid != train.uid}
    w.settle()
    w.collect()
    w.tick(5)
    prepare(w)
    w.settle()
    w.collect()
    w.settle()
    assert stages(w) == [Stage.PREPARE, Stage.TRAIN, Stage.FETCH]
    assert job(w, Stage.FETCH).uid != first.uid
    w.tick(60)
    change(w, Stage.FETCH, complete_at=w.now)
    assert w.settle().idle, "once"


def test_a_fetch_that_may_not_be_created_is_tried_again_and_holds_nothing_up() -> None:
    w = in_queue()
    w.fetch_refusal = Refusal("exceeded quota", w.now + timedelta(seconds=5))
    decided = w.settle()
    assert stages(w) == [Stage.PREPARE, Stage.TRAIN]
    assert w.status.phase is Phase.QUEUED
    assert decided.requeue_after == pytest.approx(5.05)
    w.tick(5)
    assert w.plan().create_job is Stage.FETCH
    w.tick(600)
    change(w, Stage.TRAIN, suspended=False)
    w.start_pod()
    w.run_pod()
    w.settle()
    assert w.status.phase is Phase.TRAINING


def test_a_fetch_job_that_validation_refuses_is_not_asked_for_again_and_fails_nothing() -> None:
    w = in_queue()
    w.fetch_refusal = Refusal("spec.template: invalid", w.now, for_good=True)
    w.tick(60)
    w.settle()
    assert (w.status.phase, stages(w)) == (Phase.QUEUED, [Stage.PREPARE, Stage.TRAIN])


@pytest.mark.parametrize(("status", "fields"), [(422, ("spec",)), (403, ()), (500, ()), (409, ())])
async def test_a_no_to_the_fetch_job_is_no_answer_to_the_fine_tune_job(status: int, fields: tuple[str, ...]) -> None:
    class Server:
        clock = SimpleNamespace(now=lambda: START)

        async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            raise ApiError(status, "Reason", "no", "POST", path, fields)

        async def get(self, path: str) -> dict[str, Any]:
            return {"metadata": {"name": "somebody's"}}

    w = in_queue()
    view, api = w.observe().job, cast(Api, Server())
    snapshots = Snapshots(api, Settings())
    assert w.snapshot is not None
    snapshots._known[view.uid] = w.snapshot
    applier = Applier(api, Cache(), snapshots, Settings())
    assert not await applier.create(view, False, Stage.FETCH)
    answers = applier.answers(view.uid)
    assert (answers.refusal, answers.conflict) == (None, None)
    assert answers.fetch is not None
    assert (answers.fetch.for_good, answers.fetch.retry_at) == (status == 422, START + timedelta(seconds=1))


def test_a_fetch_without_a_pod_is_not_what_the_job_waits_for() -> None:
    w = in_queue()
    w.settle()
    w.tick(3600)
    w.pod_refusal = "exceeded quota"
    w.settle()
    assert [c.type for c in w.status.conditions if c.status == "True"] == ["Prepared"]


def test_the_fetch_jobs_pod_has_the_cache_and_reports_to_nobody() -> None:
    w = world(**QUEUED, trackers=[{"type": "MLflow", "endpointURL": "https://m", "secretRef": {"name": "mlflow"}}])
    w.make_snapshot()
    assert w.snapshot is not None
    body = stage_job(Owner("ns", "story", UID), w.snapshot, Stage.FETCH, Settings())
    [container] = body["spec"]["template"]["spec"]["containers"]
    assert (container["image"], container["args"]) == ("p", ["fetch"])
    assert ENV_ENDPOINT not in {e["name"] for e in container["env"]}, "status.progress is training's"
    assert CACHE_MOUNT in {m["mountPath"] for m in container["volumeMounts"]}
    assert "nvidia.com/gpu" not in str(body)
    assert "mlflow" not in str(body)
    assert body["metadata"]["labels"][KUEUE_QUEUE] == "cpus"
    assert body["metadata"]["labels"][LABEL_STAGE] == "fetch"


@pytest.mark.light
def test_on_a_real_api_server_the_fetch_runs_while_training_waits_and_the_job_ends_well(bench: Bench) -> None:
    fetched = threading.Event()

    def script(pod: RawPod) -> list[Step]:
        if stage_of(pod) is Stage.PREPARE:
            return [Running(), Terminated(0, message=termination_message(told(pending=True)))]
        if stage_of(pod) is Stage.TRAIN:
            return [until_set(fetched), *succeed_stage(pod)]
        if stage_of(pod) is Stage.FETCH:
            return [Running(), Call(lambda _: fetched.set()), *succeed_stage(pod)[1:]]
        return succeed_stage(pod)

    bench.start_operator()
    with bench.script(script) as kubelet:
        bench.apply(finetunejob("queued").set(queue={"name": "team"}, model=QUEUED["model"]).build())
        done = bench.until_finished("queued")
        assert kubelet.errors == []
    assert done["status"]["phase"] == "Succeeded"
    assert {a["stage"] for a in done["status"]["attempts"]} == set(PIPELINE)
    made = {j["metadata"]["labels"][LABEL_STAGE]: j["metadata"]["creationTimestamp"] for j in bench.stage_jobs()}
    assert made["train"] <= made["fetch"], "the queue is joined first"
