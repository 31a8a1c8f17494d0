"""output.deletionPolicy: Delete: held before anything exists, let go when the artifacts are deleted or cannot be."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from finetune_api.names import FINALIZER_DELETE_OUTPUT, Stage
from finetune_api.snapshot import Snapshot
from finetune_api.status import ConditionType
from finetune_cluster.steps import Pod, Running, Step, Terminated, run_forever
from finetune_operator.manifests import Owner, cleanup_job
from finetune_operator.planning.conditions import is_true
from finetune_operator.planning.model import EventType, Refusal
from finetune_operator.settings import Settings
from tests.operator.harness import Bench, finetunejobs_of, jobs_of, stage_of, succeed_stage, until_set
from tests.operator.manifests import DELETE, Raw, failure, finetunejob
from tests.operator.test_planner import in_training
from tests.operator.world import UID, World, world

PLACE = "s3://results/here/story-3f9c2a11"


def deleted(w: World) -> World:
    w.deleting, w.deleted_at = True, w.now
    return w


def cleaning() -> World:
    w = deleted(in_training(**DELETE))
    w.settle()
    w.collect()
    w.settle()
    return w


def test_the_finalizer_comes_before_anything_else_and_only_where_it_is_asked_for() -> None:
    assert world(**DELETE).plan().hold_output is True
    assert world(**DELETE).plan().create_job is None
    assert world().plan().hold_output is None


def test_a_job_that_had_finished_before_an_upgrade_is_held_too() -> None:
    w = World(in_training(**DELETE).spec)
    for _ in Stage.PREPARE, Stage.TRAIN, Stage.PUBLISH:
        w.pass_stage()
    w.settle()
    assert is_true(w.status, ConditionType.FINISHED)
    w.held = False
    w.settle()
    assert w.held
    deleted(w).settle()
    assert w.job(Stage.CLEANUP) is not None


def test_pods_stop_before_the_artifacts_are_deleted() -> None:
    w = deleted(in_training(**DELETE))
    assert [d.name.rsplit("-", 1)[1] for d in w.plan().deletes] == ["train"]
    w.settle()
    assert w.job(Stage.CLEANUP) is None, "a pod still saves its checkpoint"
    w.collect()
    w.settle()
    assert w.job(Stage.CLEANUP) is not None
    assert w.held


def test_a_pod_without_its_job_is_waited_for_too() -> None:
    w = deleted(in_training(**DELETE))
    w.jobs = {}
    w.settle()
    assert w.job(Stage.CLEANUP) is None
    w.pods = {}
    w.settle()
    assert w.job(Stage.CLEANUP) is not None


def test_a_job_whose_artifacts_are_deleted_is_let_go() -> None:
    w = cleaning()
    w.start_pod()
    w.run_pod()
    w.end_pod(0)
    w.settle()
    assert w.gone
    assert (w.events[-1].type, w.events[-1].reason) == (EventType.NORMAL, "OutputDeleted")
    assert PLACE in w.events[-1].message


def test_a_cleanup_that_fails_for_good_says_what_is_left_and_where() -> None:
    w = cleaning()
    w.start_pod()
    w.run_pod()
    w.end_pod(16, failure(Stage.CLEANUP, "AccessDenied", "DeleteObject was refused"))
    w.settle()
    assert w.gone
    assert (w.events[-1].type, w.events[-1].reason) == (EventType.WARNING, "OutputLeft")
    assert PLACE in w.events[-1].message
    assert "AccessDenied: DeleteObject was refused" in w.events[-1].message


def test_in_a_namespace_that_is_being_deleted_it_lets_go() -> None:
    w = deleted(in_training(**DELETE))
    w.settle()
    w.collect()
    w.refusal = Refusal("namespace is being terminated", w.now + timedelta(seconds=60), terminating=True)
    w.settle()
    assert w.gone
    assert "its namespace is being deleted" in w.events[-1].message


def test_a_quota_is_waited_for_and_not_for_ever() -> None:
    w = deleted(in_training(pendingTimeoutSeconds=60, **DELETE))
    w.settle()
    w.collect()
    w.refusal = Refusal("exceeded quota", w.now + timedelta(seconds=8))
    assert w.settle().requeue_after == pytest.approx(8.05)
    w.tick(60)
    w.settle()
    assert w.gone
    assert "exceeded quota (waited for pendingTimeoutSeconds, 60)" in w.events[-1].message


def test_a_cleanup_that_a_queue_never_admits_does_not_hold_the_job_for_ever() -> None:
    w = cleaning()
    w.tick(2 * 3600)
    w.settle()
    assert w.gone
    assert "did not end within 7200 s" in w.events[-1].message


def test_a_finalizer_that_is_not_called_for_is_taken_off() -> None:
    w = deleted(in_training())
    w.held = True
    w.settle()
    assert w.gone


def test_a_workspace_elsewhere_is_named_too() -> None:
    output = {"uri": "s3://results/here", "deletionPolicy": "Delete", "workspace": {"uri": "s3://scratch/x"}}
    w = deleted(in_training(output=output))
    w.refusal = Refusal("terminating", w.now, terminating=True)
    w.settle()
    assert f"{PLACE} and s3://scratch/x/story-3f9c2a11/workspace" in w.events[-1].message


def test_the_cleanup_job_depends_on_nothing_that_goes_with_the_finetunejob() -> None:
    w = world(model={"uri": "pvc://models/llama"}, output={**DELETE["output"], "secretRef": {"name": "s3"}})
    w.make_snapshot()
    assert w.snapshot is not None
    job = cleanup_job(Owner("ns", "story", UID), w.snapshot.snapshot, Settings())
    assert "ownerReferences" not in job["metadata"]
    pod = job["spec"]["template"]["spec"]
    assert {v["name"] for v in pod["volumes"]} == {"work", "tmp", "secret-output"}
    names = {e["name"] for e in pod["containers"][0]["env"]}
    assert "FINETUNE_SNAPSHOT" in names
    assert "FINETUNE_PROGRESS_URL" not in names
    assert pod["containers"][0]["args"] == ["cleanup"]
    assert "nvidia.com/gpu" not in str(pod["containers"][0]["resources"])


def test_what_the_cleanup_pod_is_told_fits_a_variable_and_is_what_it_reads() -> None:
    source = {"uri": f"s3://data/{'r' * 1000}.jsonl", "format": "Text", "template": {"text": "ä" * 16_000}}
    w = world(
        data={"train": [source] * 16, "heldOut": {"sources": [source] * 16}, "chatTemplate": "ü" * 32_000},
        evaluation={"generation": {"sources": [source] * 16}},
        runtime={"annotations": {f"example.com/a{n}": "x" * 4_000 for n in range(8)}},
        output={**DELETE["output"], "workspace": {"uri": "s3://scratch/ä"}},
    )
    w.make_snapshot()
    assert w.snapshot is not None
    whole = w.snapshot.snapshot
    [container] = cleanup_job(Owner("ns", "story", UID), whole, Settings())["spec"]["template"]["spec"]["containers"]
    [text] = [e["value"] for e in container["env"] if e["name"] == "FINETUNE_SNAPSHOT"]
    assert len(text.encode()) < 16_000
    assert "scratch/ä" in text
    told = Snapshot.model_validate_json(text)
    assert (told.output, told.workspace) == (whole.output, whole.workspace)
    assert told.spec.output == whole.spec.output


def clean(pod: Pod) -> list[Step]:
    """Training runs for ever; cleanup ends well."""
    if stage_of(pod) is Stage.CLEANUP:
        return [Running(), Terminated(0, "")]
    return run_forever() if stage_of(pod) is Stage.TRAIN else succeed_stage(pod)


def held_job(name: str) -> Raw:
    return finetunejob(name).set(**DELETE).build()


@pytest.mark.light
@pytest.mark.parametrize("policy", ["Background", "Foreground"])
def test_deleting_a_job_deletes_its_artifacts_first(bench: Bench, policy: str) -> None:
    bench.start_operator()
    cleaned = threading.Event()

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is not Stage.CLEANUP:
            return clean(pod)
        return [Running(), until_set(cleaned), Terminated(0, "")]

    with bench.script(script):
        bench.apply(held_job("gone"))
        job = bench.until_phase("gone", "Training")
        assert job["metadata"]["finalizers"] == [FINALIZER_DELETE_OUTPUT]
        path = f"{finetunejobs_of(bench.namespace)}/gone"
        bench.api.http.request("DELETE", path, json={"propagationPolicy": policy}).raise_for_status()
        key = f"gone-{job['metadata']['uid'][:8]}"
        bench.api.wait(jobs_of(bench.namespace), f"{key}-cleanup", lambda _: True, 60, "the cleanup Job")
        assert FINALIZER_DELETE_OUTPUT in bench.job("gone")["metadata"]["finalizers"]
        assert not [p for p in bench.pods() if stage_of(p) is Stage.TRAIN], "it stopped before"
        cleaned.set()
        bench.until_gone(finetunejobs_of(bench.namespace))
    [left] = [j for j in bench.stage_jobs() if j["metadata"]["name"].endswith("-cleanup")]
    assert left["spec"]["ttlSecondsAfterFinished"] == 600
    bench.told("gone", "OutputDeleted")


@pytest.mark.light
def test_a_namespace_that_is_being_deleted_is_not_held_up(bench: Bench) -> None:
    operator = bench.start_operator()
    with bench.script(clean):
        bench.apply(held_job("doomed"))
        bench.until_phase("doomed", "Training")
        bench.api.http.request("DELETE", f"/api/v1/namespaces/{bench.namespace}").raise_for_status()
        bench.until_gone(finetunejobs_of(bench.namespace))
    operator.until_logged("OutputLeft")
    assert "s3://results/here/doomed-" in operator.log.read_text()


@pytest.mark.light
def test_an_operator_that_was_away_cleans_up_when_it_is_back(bench: Bench) -> None:
    operator = bench.start_operator()
    with bench.script(clean):
        bench.apply(held_job("later"))
        bench.until_phase("later", "Training")
        operator.kill()
        path = f"{finetunejobs_of(bench.namespace)}/later"
        bench.api.http.request("DELETE", path, json={"propagationPolicy": "Foreground"}).raise_for_status()
        bench.start_operator()
        bench.until_gone(finetunejobs_of(bench.namespace))
    bench.told("later", "OutputDeleted")
