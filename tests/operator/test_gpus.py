"""Which GPUs a job may get, by the nodes' labels, and that its training pod avoids those that its plan does not fit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from finetune_api.names import ENV_GPUS_PER_NODE, GPU_COUNT_LABEL, GPU_MEMORY_LABEL, GPU_PRODUCT_LABEL, Stage
from finetune_api.snapshot import NodeGpu, Snapshot
from finetune_api.spec import FineTuneJobSpec
from finetune_cluster.steps import Pod, Running, Step, Terminated
from finetune_operator.client import NODES_PATH, ApiError
from finetune_operator.gpus import NodeGpus, kinds, needed
from tests.operator.harness import Bench, pods_of, stage_of, succeed_stage
from tests.operator.manifests import Raw, finetunejob, planned_success, termination_message

A10, T4 = "NVIDIA-A10G", "Tesla-T4"


def spec(**changes: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(finetunejob("gpus").set(**changes).build()["spec"])


def node(product: str, gpus: int = 1, taints: list[Raw] | None = None, **labels: str) -> Raw:
    return {
        "metadata": {"labels": {GPU_PRODUCT_LABEL: product, **labels}},
        "spec": {"taints": taints or []},
        "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}},
    }


def taint(key: str, value: str = "", effect: str = "NoSchedule") -> Raw:
    return {"key": key, "value": value, "effect": effect}


def products(nodes: list[Raw], **changes: Any) -> list[str]:
    return [gpu.product for gpu in kinds(nodes, spec(**changes))]


def test_kinds_are_counted_and_take_the_least_memory_that_a_node_tells() -> None:
    nodes = [node("B", **{GPU_MEMORY_LABEL: "2000"}), node(A10), node("B", **{GPU_MEMORY_LABEL: "1000"}), node("B")]
    assert kinds(nodes, spec()) == [
        NodeGpu(product="B", memory_mib=1000, nodes=3, per_node=1),
        NodeGpu(product=A10, memory_mib=None, nodes=1, per_node=1),
    ]


def test_for_auto_any_node_with_a_gpu_counts_and_tells_how_many_it_has() -> None:
    nodes = [node(T4, gpus=1), node(T4, gpus=4), node(A10, gpus=0, **{GPU_COUNT_LABEL: "8"}), node("B", gpus=0)]
    found = kinds(nodes, spec(compute={"gpusPerNode": "Auto"}))
    assert [(gpu.product, gpu.nodes, gpu.per_node) for gpu in found] == [(A10, 1, 8), (T4, 2, 4)]


def test_only_nodes_count_that_the_training_pod_may_land_on() -> None:
    nodes = [node(A10, gpus=4, pool="large"), node(T4, gpus=1, pool="small")]
    assert products(nodes) == [A10, T4]
    assert products(nodes, runtime={"nodeSelector": {"pool": "small"}}) == [T4]
    assert products(nodes, compute={"gpusPerNode": 2}) == [A10]
    assert products(nodes, compute={"gpu": {"product": T4}}) == [T4]
    away = node(A10, gpus=0, **{"nvidia.com/gpu.count": "2"})
    assert products([away]) == [A10], "its device plugin starts anew"


def test_gpus_that_several_pods_share_are_told_apart() -> None:
    by_name, by_label = node(f"{A10}-SHARED"), node(T4, **{"nvidia.com/gpu.replicas": "4"})
    assert [(gpu.product, gpu.shared) for gpu in kinds([by_name, by_label, node("B")], spec())] == [
        ("B", False),
        (f"{A10}-SHARED", True),
        (T4, True),
    ]


@pytest.mark.parametrize(
    ("tolerations", "lands"),
    [
        ([], False),
        ([{"key": "team", "operator": "Exists"}], True),
        ([{"key": "team", "value": "a"}], True),
        ([{"key": "team", "operator": "Equal", "value": "b"}], False),
        ([{"key": "team", "value": "a", "effect": "NoExecute"}], False),
        ([{"key": "other", "operator": "Exists"}], False),
        ([{"operator": "Exists"}], True),
    ],
)
def test_taints_are_tolerated_as_the_scheduler_has_it(tolerations: list[Raw], lands: bool) -> None:
    nodes = [node(A10, taints=[taint("team", "a")])]
    assert products(nodes, runtime={"tolerations": tolerations}) == [A10] * lands


def test_taints_that_pass_or_that_admission_tolerates_hide_no_gpu() -> None:
    passing = [taint("node.kubernetes.io/unschedulable"), taint("nvidia.com/gpu", "present"), taint("x", "", "PreferNoSchedule")]  # fmt: skip
    assert products([node(A10, taints=passing)]) == [A10]


def test_nodes_are_asked_where_the_job_leaves_it_to_them() -> None:
    assert needed(spec())
    assert needed(spec(compute={"gpu": {"product": "Somebodys-GPU"}})), "its memory label may tell"
    assert not needed(spec(compute={"gpu": {"product": A10}}))
    assert not needed(spec(compute={"gpu": {"memory": "24Gi"}}))
    assert needed(spec(compute={"gpu": {"memory": "24Gi"}, "gpusPerNode": "Auto"})), "how many there are"
    assert not needed(spec(training={"useCpu": True}))
    assert not needed(spec(queue={"name": "team"})), "Kueue's flavors say where its pod may land"
    assert not needed(spec(compute={"gpu": {"resourceName": "nvidia.com/mig-1g.5gb"}})), (
        "the labels are of the whole GPU"
    )


class Nodes:
    """An API server that lists nodes, or refuses to."""

    def __init__(self, *answers: list[Raw] | ApiError) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def list_all(self, path: str, label_selector: str, trim: Callable[[Raw], Raw]) -> tuple[list[Raw], int]:
        assert (path, label_selector) == (NODES_PATH, GPU_PRODUCT_LABEL)
        self.asked += 1
        answer = self._answers.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        return [trim(item) for item in answer], 1


def refused(status: int) -> ApiError:
    return ApiError(status, "Reason", "no", "GET", NODES_PATH)


async def test_nodes_are_read_once_a_minute_and_what_was_read_outlives_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api = Nodes([node(A10)], refused(500), [node(T4)])
    nodes = NodeGpus(api)  # type: ignore[arg-type]
    a10, t4 = ([NodeGpu(product=product, nodes=1, per_node=1)] for product in (A10, T4))
    assert await asyncio.gather(nodes.for_job(spec()), nodes.for_job(spec())) == [a10, a10]
    assert api.asked == 1
    monkeypatch.setattr("finetune_operator.gpus.FRESH_SECONDS", -1)
    assert await nodes.for_job(spec()) == a10
    assert await nodes.for_job(spec()) == t4
    assert api.asked == 3


async def test_without_the_right_to_list_nodes_nothing_is_known_and_they_are_asked_for_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = Nodes(refused(403), [node(A10)])
    nodes = NodeGpus(api)  # type: ignore[arg-type]
    assert [await nodes.for_job(spec()), await nodes.nodes()] == [None, None]
    assert (api.asked, len(caplog.records)) == (1, 1)
    monkeypatch.setattr("finetune_operator.gpus.FRESH_SECONDS", -1)
    assert await nodes.for_job(spec()) == [NodeGpu(product=A10, nodes=1, per_node=1)]


async def test_an_outage_is_remembered_too_and_only_a_job_that_needs_nodes_asks_again_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = Nodes(refused(500), [node(A10)], refused(500))
    nodes = NodeGpus(api)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(ApiError, match="500"):
            await nodes.nodes()
    assert api.asked == 1
    known = await nodes.for_job(spec())
    assert (known, api.asked) == ([NodeGpu(product=A10, nodes=1, per_node=1)], 2)
    monkeypatch.setattr(nodes, "_asked_at", None)  # a minute has passed
    assert await nodes.for_job(spec()) == await nodes.for_job(spec()) == known
    assert (api.asked, len(caplog.records)) == (3, 1)


async def test_an_outage_before_nodes_were_ever_read_says_what_it_is_about() -> None:
    with pytest.raises(ApiError) as told:
        await NodeGpus(Nodes(refused(500))).for_job(spec())  # type: ignore[arg-type]
    assert told.value.message == "nodes cannot be listed: no"


@pytest.mark.light
def test_what_nodes_have_is_frozen_and_the_training_pod_avoids_what_does_not_fit(
    bench: Bench, request: pytest.FixtureRequest
) -> None:
    pool = {"pool": bench.namespace}
    elsewhere = "Tesla-V100-SXM2-16GB"
    for product, labels in ((A10, pool), (T4, pool), (elsewhere, {})):
        name = f"{bench.namespace}-{product.lower()}"
        bench.api.create(NODES_PATH, {"metadata": {"name": name, "labels": {GPU_PRODUCT_LABEL: product, **labels}}})
        request.addfinalizer(partial(bench.api.delete, f"{NODES_PATH}/{name}"))
        bench.api.merge(f"{NODES_PATH}/{name}/status", {"status": {"allocatable": {"nvidia.com/gpu": "2"}}})

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.PREPARE:
            return [Running(), Terminated(0, message=termination_message(planned_success(2, [T4])))]
        return succeed_stage(pod)

    other = {"name": "c", "image": "i", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    somebody = {"containers": [other], "nodeName": f"{bench.namespace}-{A10.lower()}"}
    bench.api.create(pods_of(bench.namespace), {"metadata": {"name": "somebody"}, "spec": somebody})
    bench.start_operator()
    with bench.script(script, labels=pool) as kubelet:
        job = finetunejob("story").set(runtime={"nodeSelector": pool}, compute={"gpusPerNode": "Auto"}).build()
        bench.apply(job)
        done = bench.until_finished("story")
        assert kubelet.errors == []
    assert done["status"]["phase"] == "Succeeded"
    assert done["status"]["plan"]["unsuitableGpuProducts"] == [T4]
    frozen = bench.api.get(f"/api/v1/namespaces/{bench.namespace}/configmaps/{done['status']['snapshot']['configMap']}")
    found = Snapshot.model_validate_json(frozen["data"]["snapshot.json"]).node_gpus
    assert {A10, T4} <= {gpu.product for gpu in found or []}
    assert elsewhere not in {gpu.product for gpu in found or []}
    pods = {j["metadata"]["labels"]["finetune.dev/stage"]: j["spec"]["template"]["spec"] for j in bench.stage_jobs()}
    assert pods["train"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] == {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": GPU_PRODUCT_LABEL, "operator": "NotIn", "values": [T4]}]}]
    }
    train = pods["train"]["containers"][0]
    assert train["resources"]["limits"]["nvidia.com/gpu"] == "2", "what Auto became"
    assert {"name": ENV_GPUS_PER_NODE, "value": "2"} in train["env"], "as many ranks"
    assert done["status"]["plan"]["gpusPerNode"] == 2
    assert "on 2 × nvidia.com/gpu" in done["status"]["plan"]["summary"]
    assert not any("affinity" in pods[stage] for stage in ("prepare", "publish"))

    with bench.script(script, labels=pool):
        job = finetunejob("asks").set(runtime={"nodeSelector": pool}, compute={"gpusPerNode": "Auto"}, planOnly=True)
        bench.apply(job.build())
        plan = bench.until_finished("asks")["status"]["plan"]
    stock = {s["product"]: (s["nodes"], s["total"], s["free"]) for s in plan["gpuStock"]}
    assert stock[A10] == (1, 2, 1), "somebody's pod has one"
    assert T4 not in stock
    assert "Takes 2 on 1 node." in plan["availability"]
