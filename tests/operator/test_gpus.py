"""Which GPUs a job may get, by the nodes' labels, and that its training pod avoids those that its plan does not fit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from finetune_api.names import GPU_MEMORY_LABEL, GPU_PRODUCT_LABEL, Stage
from finetune_api.progress import Split
from finetune_api.results import RunPlan
from finetune_api.snapshot import NodeGpu, Snapshot
from finetune_api.spec import FineTuneJobSpec, MethodType
from finetune_cluster.steps import Pod, Running, Step, Terminated
from finetune_operator.client import NODES_PATH
from finetune_operator.gpus import kinds, needed
from tests.operator.harness import Bench, stage_of, succeed_stage
from tests.operator.manifests import Raw, finetunejob, prepare_report, success, termination_message

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
        NodeGpu(product="B", memory_mib=1000, nodes=3),
        NodeGpu(product=A10, memory_mib=None, nodes=1),
    ]


def test_only_nodes_count_that_the_training_pod_may_land_on() -> None:
    nodes = [node(A10, gpus=4, pool="large"), node(T4, gpus=1, pool="small")]
    assert products(nodes) == [A10, T4]
    assert products(nodes, runtime={"nodeSelector": {"pool": "small"}}) == [T4]
    assert products(nodes, compute={"gpusPerNode": 2}) == [A10]
    assert products(nodes, compute={"gpu": {"product": T4}}) == [T4]
    assert products(nodes, compute={"gpu": {"resourceName": "amd.com/gpu"}}) == []


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
    assert not needed(spec(training={"useCpu": True}))


def planned_for(avoid: list[str]) -> str:
    split = Split(
        micro_batch_sequences=4, gradient_accumulation_steps=4, gradient_checkpointing=True, max_sequence_tokens=2048
    )
    plan = RunPlan(
        method=MethodType.LORA,
        split=split,
        needed_bytes=1,
        peak_allocated_bytes=1,
        verified=True,
        summary="so",
        unsuitable_gpu_products=avoid,
    )
    report = prepare_report().model_copy(update={"plan": plan})
    return termination_message(success(Stage.PREPARE).model_copy(update={"result": report.to_json_dict()}))


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
        bench.api.merge(f"{NODES_PATH}/{name}/status", {"status": {"allocatable": {"nvidia.com/gpu": "1"}}})

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.PREPARE:
            return [Running(), Terminated(0, message=planned_for([T4]))]
        return succeed_stage(pod)

    bench.start_operator()
    with bench.script(script, labels=pool) as kubelet:
        job = finetunejob("story").set(runtime={"nodeSelector": pool}).build()
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
    assert not any("affinity" in pods[stage] for stage in ("prepare", "publish"))
