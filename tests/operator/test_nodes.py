"""A training on several nodes, by the real Job controller: one Indexed Job, a Service, and the first pod's end is the Job's."""

from __future__ import annotations

import asyncio

import pytest

from finetune_api.names import Stage
from finetune_cluster.steps import Call, Pod, Running, Step
from finetune_operator.observe import COMPLETION_INDEX
from tests.operator.harness import Bench, condition, is_true, stage_of, succeed_stage
from tests.operator.manifests import Raw, finetunejob

pytestmark = pytest.mark.light


def index_of(pod: Raw) -> int:
    return int(pod["metadata"]["annotations"].get(COMPLETION_INDEX, 0))


def until_gone() -> Call:
    """A step that ends only with its pod."""
    return Call(lambda _: asyncio.Event().wait())


def test_pods_find_each_other_and_the_first_ones_end_is_the_jobs(bench: Bench) -> None:
    ran: dict[str, str] = {}

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is not Stage.TRAIN:
            return succeed_stage(pod)
        ran[f"{pod['spec']['hostname']}.{pod['spec']['subdomain']}"] = pod["metadata"]["uid"]
        return succeed_stage(pod, after=0.5) if index_of(pod) == 0 else [Running(), until_gone()]

    bench.start_operator()
    with bench.script(script) as kubelet:
        bench.apply(finetunejob("70b-story").set(compute={"nodes": 2, "gpusPerNode": 1}).build())
        done = bench.until_finished("70b-story")
        assert kubelet.errors == []
    assert is_true(done, "Complete"), done["status"]
    [job] = [j for j in bench.stage_jobs() if j["metadata"]["labels"]["finetune.dev/stage"] == Stage.TRAIN]
    assert condition(job, "SuccessCriteriaMet")["reason"] == "SuccessPolicy"
    name = job["metadata"]["name"]
    service_name = "train-" + name.removesuffix("-train")
    service = bench.api.get(f"/api/v1/namespaces/{bench.namespace}/services/{service_name}")
    assert service["metadata"]["ownerReferences"][0]["uid"] == done["metadata"]["uid"]
    assert sorted(ran) == [f"{name}-0.{service_name}", f"{name}-1.{service_name}"]
    attempts = [(a["stage"], a["executionId"]) for a in done["status"]["attempts"] if a["stage"] == "train"]
    assert attempts == [("train", ran[f"{name}-0.{service_name}"])], "the first pod is the execution"


def test_a_service_of_somebody_else_is_not_adopted(bench: Bench) -> None:
    taken: list[str] = []

    def script(pod: Pod) -> list[Step]:
        name = "train-" + pod["metadata"]["labels"]["batch.kubernetes.io/job-name"].removesuffix("-prepare")
        body = {"metadata": {"name": name}, "spec": {"ports": [{"port": 1}]}}
        bench.api.create(f"/api/v1/namespaces/{bench.namespace}/services", body)
        taken.append(name)
        return succeed_stage(pod)

    bench.start_operator()
    with bench.script(script):
        bench.apply(finetunejob("story").set(compute={"nodes": 2}).build())
        done = bench.until_finished("story")
    failed = condition(done, "Failed")
    assert failed["reason"] == "NameConflict"
    assert f"Service {taken[0]} exists" in failed["message"]
