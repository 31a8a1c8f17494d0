"""The progress endpoint: who may post, what becomes of it, and how often it is written."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import Stage
from finetune_api.progress import ProgressPost, Split
from finetune_api.status import ProgressStatus
from finetune_cluster.steps import Call, Pod, Running, Step, Terminated, run_forever
from finetune_operator.planning.clock import human_duration
from finetune_operator.progress.protocol import fold, from_kubeflow, merge
from tests.operator.harness import (
    ROOT,
    SECONDS,
    Bench,
    Recorder,
    condition,
    finetunejobs_of,
    gpu_pods,
    is_true,
    jobs_of,
    pods_of,
    stage_of,
    succeed_stage,
    until_set,
)
from tests.operator.manifests import finetunejob, success
from tests.operator.poster import Poster
from tests.operator.world import START

Raw = dict[str, Any]


def train_forever(pod: Pod) -> list[Step]:
    return run_forever() if stage_of(pod) is Stage.TRAIN else succeed_stage(pod)


def training_pod(bench: Bench, name: str) -> Raw:
    bench.until_phase(name, "Training")
    [pod] = [
        p
        for p in bench.pods()
        if stage_of(p) is Stage.TRAIN and p["metadata"]["labels"]["finetune.dev/job-name"] == name
    ]
    return pod


@pytest.mark.light
def test_a_post_shows_in_status_as_people_read_it(bench: Bench) -> None:
    operator = bench.start_operator(FINETUNE_PROGRESS_INTERVAL_SECONDS="1")
    with bench.script(train_forever):
        bench.apply(finetunejob("live").build())
        poster = Poster(bench, operator, training_pod(bench, "live"), "live")
        transfers = {
            "download": {"completedBytes": 9, "totalBytes": 9},
            "merge": {"completedBytes": 3, "totalBytes": 10},
            "upload": {"completedBytes": 4},
        }
        figures = {"epoch": 0.55, "learningRate": 0.0002, "heldOutLoss": 0.86104}
        answer = poster.post(
            activity="Training",
            step=118,
            totalSteps=640,
            loss=1.31249,
            etaSeconds=840.0,
            tokensPerSecond=1051.26,
            **figures,
            **transfers,
        )
        assert answer.status_code == 200, answer.text
        seen = bench.until("live", lambda j: bool(j["status"].get("progress", {}).get("summary")), "progress")
    progress = seen["status"]["progress"]
    assert (progress["summary"], progress["loss"], progress["eta"]) == ("118/640", 1.3125, "14m")
    assert (progress["stage"], progress["activity"], progress["step"]) == ("train", "Training", 118)
    assert (progress["epoch"], progress["learningRate"], progress["tokensPerSecond"]) == (0.55, 0.0002, 1051.3)
    assert progress["heldOutLoss"] == 0.861
    assert {name: progress[name] for name in transfers} == transfers
    managers = {f["manager"] for f in seen["metadata"]["managedFields"] if f.get("subresource") == "status"}
    assert managers == {"finetune-operator", "finetune-operator-progress"}


@pytest.mark.light
def test_only_a_pod_of_the_job_may_post_for_it(bench: Bench) -> None:
    operator = bench.start_operator()
    with bench.script(train_forever):
        bench.apply(finetunejob("mine").build())
        bench.apply(finetunejob("other").build())
        mine = training_pod(bench, "mine")
        other = training_pod(bench, "other")
        poster = Poster(bench, operator, mine, "mine")
        assert poster.post(token="nonsense").status_code == 401
        assert poster.post(token=bench.token(mine, audience="another")).status_code == 401
        assert poster.post(token=bench.token(other)).status_code == 403
        assert Poster(bench, operator, mine, "other").post().status_code == 403
        assert Poster(bench, operator, mine, "nobody").post().status_code == 404
        # Without the label by which its Job would adopt it.
        labels = {k: v for k, v in mine["metadata"]["labels"].items() if not k.endswith("controller-uid")}
        forged = bench.api.create(
            pods_of(bench.namespace),
            {
                "metadata": {"name": "forged", "labels": labels},
                "spec": {"containers": [{"name": "c", "image": "i"}]},
            },
        )
        # A busy API server may take a moment to know of a pod whose token it is asked about.
        forger, end = Poster(bench, operator, forged, "mine"), time.monotonic() + 30
        while (answer := forger.post()).status_code == 401 and time.monotonic() < end:
            time.sleep(0.5)
        assert answer.status_code == 403
        lie = poster.raw({"executionId": other["metadata"]["uid"], "stage": "train", "sequence": 1})
        assert (lie.status_code, lie.json()["reason"]) == (403, "Forbidden")
        bad = poster.post(step=-1)
        assert bad.status_code == 422
        assert "step" in bad.json()["message"]
        assert (
            poster.http.post(
                f"{poster.url}/progress", content=b"{", headers={"Authorization": f"Bearer {poster.token}"}
            ).status_code
            == 422
        )
        big = poster.raw({"x": "y" * 100_000})
        assert big.status_code == 413
        assert "progress" not in bench.job("mine")["status"]
        assert poster.post(step=1, ofANewerTrainer=1).status_code == 200, "what a newer trainer says is not refused"


@pytest.mark.light
def test_progress_is_written_at_most_once_per_interval(bench: Bench) -> None:
    interval = 1.0
    operator = bench.start_operator(FINETUNE_PROGRESS_INTERVAL_SECONDS=str(interval))
    with bench.script(train_forever):
        bench.apply(finetunejob("chatty").build())
        poster = Poster(bench, operator, training_pod(bench, "chatty"), "chatty")
        recorder = Recorder(bench.cluster, finetunejobs_of(bench.namespace))
        begin = time.monotonic()
        for count in range(1, 5):
            end = time.monotonic() + SECONDS
            while not recorder.wait_for(lambda events, n=count: len(writes(events)) >= n, 0.02):
                assert poster.post(step=poster.sequence, totalSteps=1000, loss=1.0).status_code == 200
                assert time.monotonic() < end, f"no {count}. write"
        events = recorder.stop()
        spent = time.monotonic() - begin
    assert poster.sequence > 3 * len(writes(events))
    assert len(writes(events)) <= spent / interval + 2, "the first one is written at once"


def writes(events: list[tuple[str, Raw]]) -> set[str]:
    return {raw["metadata"]["resourceVersion"] for kind, raw in events if kind == "MODIFIED"}


@pytest.mark.light
@pytest.mark.parametrize("reason", [Reason.SECRET_MISSING, Reason.STORAGE_UNAVAILABLE, Reason.HUB_UNAVAILABLE])
def test_a_wait_that_a_pod_tells_shows_at_once_goes_at_once_and_costs_no_gpu(bench: Bench, reason: Reason) -> None:
    operator = bench.start_operator()
    mended = threading.Event()

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.PREPARE:
            return [Running(), until_set(mended), *succeed_stage(pod)[1:]]
        return succeed_stage(pod)

    pods = Recorder(bench.cluster, pods_of(bench.namespace))
    with bench.script(script):
        bench.apply(finetunejob("needs").build())
        pod = bench.api.wait(
            pods_of(bench.namespace), None, lambda p: p["status"]["phase"] == "Running", 60, "prepare runs"
        )
        poster = Poster(bench, operator, pod, "needs")
        poster.post(waiting={"reason": reason, "message": "s3.example.com or Secret s3 is not there"})
        waiting = bench.until_waiting("needs", reason, 15)
        assert "s3.example.com or Secret s3 is not there." in condition(waiting, "Waiting")["message"]
        assert FAILURES[reason].advice in condition(waiting, "Waiting")["message"]
        poster.post(activity="Checking")
        bench.until("needs", lambda j: condition(j, "Waiting").get("status") == "False", "the wait is over", 15)
        assert not gpu_pods(pods.so_far())
        mended.set()
        assert is_true(bench.until_finished("needs"), "Complete")
    assert len(gpu_pods(pods.stop())) == 1


@pytest.mark.light
def test_an_acknowledged_final_post_survives_a_lost_termination_message(bench: Bench) -> None:
    operator = bench.start_operator()
    answers: list[Raw] = []

    def script(pod: Pod) -> list[Step]:
        def post_final(_: Pod) -> None:
            report = success(stage_of(pod)).to_json_dict()
            answers.append(Poster(bench, operator, pod, "final").post(final=report).json())

        return [Running(), Call(lambda p: asyncio.to_thread(post_final, p)), Terminated(0, "")]

    with bench.script(script):
        bench.apply(finetunejob("final").build())
        done = bench.until_finished("final")
    assert is_true(done, "Complete")
    assert answers == [{"accepted": True, "recorded": True}] * 3
    assert [a["outcome"] for a in done["status"]["attempts"]] == ["Succeeded"] * 3
    assert done["status"]["metrics"]["heldOutLoss"] == 0.861


@pytest.mark.light
def test_a_job_costs_at_most_five_writes_up_to_its_training_job(bench: Bench) -> None:
    """Counted by resourceVersions, which order all writes, so that a slow machine does not count later ones."""
    # Longer than prepare takes on any machine: bookkeeping joins the writes that are needed anyway.
    operator = bench.start_operator(FINETUNE_PROGRESS_INTERVAL_SECONDS="120")

    def script(pod: Pod) -> list[Step]:
        def post(_: Pod) -> None:
            poster = Poster(bench, operator, pod, "thrifty")
            poster.post(activity="Checking")
            poster.post(activity="Tokenizing")
            assert poster.post(final=success(stage_of(pod)).to_json_dict()).json()["recorded"]

        running, *rest = succeed_stage(pod)
        return (
            [running, Call(lambda p: asyncio.to_thread(post, p)), *rest]
            if stage_of(pod) is Stage.PREPARE
            else [running, *rest]
        )

    paths = {
        "status": finetunejobs_of(bench.namespace),
        "jobs": jobs_of(bench.namespace),
        "snapshot": f"/api/v1/namespaces/{bench.namespace}/configmaps",
        "events": f"/api/v1/namespaces/{bench.namespace}/events",
    }
    recorders = {kind: Recorder(bench.cluster, path) for kind, path in paths.items()}
    with bench.script(script) as kubelet:
        bench.apply(finetunejob("thrifty").build())
        bench.until_finished("thrifty")
        assert kubelet.errors == []
    seen = {kind: recorder.stop() for kind, recorder in recorders.items()}

    def versions(kind: str, event: str, mine: Callable[[Raw], bool] = lambda _: True) -> list[int]:
        return sorted({int(raw["metadata"]["resourceVersion"]) for k, raw in seen[kind] if k == event and mine(raw)})

    jobs = versions("jobs", "ADDED")
    assert len(jobs) == 3
    written = [
        *jobs,
        *versions("snapshot", "ADDED", lambda m: m["metadata"]["name"].endswith("-snapshot")),
        *versions("status", "MODIFIED"),
        *versions("events", "ADDED", lambda e: e["involvedObject"]["kind"] == "FineTuneJob"),
    ]
    assert len([version for version in written if version <= jobs[1]]) <= 5


CALLBACK = """
from types import SimpleNamespace
from transformers.integrations.integration_utils import KubeflowCallback
callback = KubeflowCallback()
state = SimpleNamespace(is_world_process_zero=True, max_steps=640, global_step=118, epoch=0.55)
callback.on_train_begin(None, state, None)
callback.on_log(None, state, None, logs={"loss": 1.3125, "learning_rate": 2e-4})
callback._last_update_time = 0.0
callback._start_time -= 100
callback.on_step_end(None, state, None)
assert callback._update_status(progress_percent=18, metrics=callback._metrics, force=True), "not accepted"
"""


@pytest.mark.light
@pytest.mark.timeout(600)
def test_transformers_own_callback_reports_unmodified(bench: Bench) -> None:
    operator = bench.start_operator(FINETUNE_PROGRESS_INTERVAL_SECONDS="1")
    with bench.script(train_forever):
        bench.apply(finetunejob("flow").build())
        pod = training_pod(bench, "flow")
        environment = {e["name"]: e.get("value", "") for e in pod["spec"]["containers"][0]["env"]}
        token = bench.folder / "token"
        token.write_text(bench.token(pod))
        env = {
            "PATH": "/usr/bin:/bin",
            "KUBEFLOW_TRAINER_SERVER_URL": environment["KUBEFLOW_TRAINER_SERVER_URL"],
            "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(bench.tls.ca),
            "KUBEFLOW_TRAINER_SERVER_TOKEN": str(token),
        }
        assert f":{operator.progress_port}/" in env["KUBEFLOW_TRAINER_SERVER_URL"]
        done = subprocess.run(
            [sys.executable, "-c", CALLBACK],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,  # it imports torch, beside other workers
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen = bench.until("flow", lambda j: j["status"].get("progress", {}).get("step") == 118, "progress")
    progress = seen["status"]["progress"]
    assert progress["summary"] == "118/640"
    assert progress["loss"] == 1.3125
    assert progress["eta"]


# The pure part


def post(sequence: int, **fields: Any) -> ProgressPost:
    return ProgressPost(execution_id="e", stage=fields.pop("stage", Stage.TRAIN), sequence=sequence, **fields)


def test_absent_fields_keep_their_last_value() -> None:
    both = fold(post(1, step=1, total_steps=9, loss=2.0), post(2, step=2))
    assert (both.sequence, both.step, both.total_steps, both.loss) == (2, 2, 9, 2.0)


def test_a_new_execution_of_training_starts_with_a_clean_slate() -> None:
    old = ProgressStatus(execution_id="before", stage="train", sequence=70, step=9, loss=1.0)
    new = merge(old, post(1, activity="Loading"), START)
    assert (new.step, new.loss, new.sequence) == (None, None, 1)


def test_how_far_an_execution_came_outlives_the_first_post_of_the_next() -> None:
    told = {"resumed_from_step": 10, "checkpoint_step": 40, "peak_memory_bytes": 7, "checkpoint_seconds": 3.14}
    status: ProgressStatus | None = None
    for number in range(6):
        post = ProgressPost(execution_id=f"pod-{number}", stage=Stage.TRAIN, sequence=0, step=42 + number, **told)
        status = merge(status, post, START)
    assert status is not None
    assert status.checkpoint_seconds == 3.1
    assert status.earlier is not None
    assert [(e.execution_id, e.step, e.checkpoint_step) for e in status.earlier] == [
        (f"pod-{n}", 42 + n, 40) for n in range(1, 5)
    ]
    prepare = merge(status, ProgressPost(execution_id="cpu", stage=Stage.PREPARE, sequence=0), START)
    assert prepare.earlier is not None
    assert prepare.earlier[-1].execution_id == "pod-5"
    assert (prepare.step, prepare.checkpoint_step) == (None, None)


def test_a_split_stays_until_another_is_told() -> None:
    split = Split(
        micro_batch_sequences=2, gradient_accumulation_steps=8, gradient_checkpointing=True, max_sequence_tokens=2048
    )
    before = merge(None, ProgressPost(execution_id="a", stage=Stage.TRAIN, sequence=0, split=split), START)
    after = merge(before, ProgressPost(execution_id="b", stage=Stage.TRAIN, sequence=0), START)
    assert after.split == split


def test_publish_keeps_the_figures_of_training() -> None:
    old = ProgressStatus(
        execution_id="before", stage="train", sequence=70, step=640, total_steps=640, summary="640/640", loss=0.874
    )
    new = merge(old, post(1, stage=Stage.PUBLISH, activity="Uploading"), START)
    assert (new.summary, new.loss, new.eta) == ("640/640", 0.874, None)


def test_a_loss_that_is_not_a_number_is_left_out() -> None:
    body = {"trainerStatus": {"metrics": [{"name": "loss", "value": "nan"}, {"name": "current_step", "value": "3"}]}}
    read = from_kubeflow(body, "e", Stage.TRAIN, 0)
    assert (read.loss, read.step) == (None, 3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (60, "1m"), (840, "14m"), (3599, "1h00m"), (7500, "2h05m"), (273_600, "3d04h")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text
