"""The memory plan of a run: what it chooses, what it refuses, and what it leaves alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.planner import Layout, describe, parse_config
from finetune_api.results import DataSummary, LengthPercentiles, RunPlan
from finetune_api.snapshot import NodeGpu, resolve_plan
from finetune_api.spec import FineTuneJobSpec, MethodType
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.model import BaseModel
from finetune_trainer.prepare.plan import plan_run
from finetune_trainer.prepare.shapes import Parameters
from tests.support.prepared import deep_merge, job_spec, prepare_job, snapshot_of
from tests.trainer.test_supervisor_process import rewrite_prepared

CONFIGS = Path(__file__).parents[1] / "planner" / "configs"
GIB = 1 << 30


def base_model(name: str, **changes: Any) -> BaseModel:
    config = {**json.loads((CONFIGS / f"{name}.json").read_text())["config"], **changes}
    shapes = describe(parse_config(json.loads((CONFIGS / f"{name}.json").read_text())["config"]))
    shapes = {n.removeprefix("transformer."): s for n, s in shapes.items()}  # as GPT-2's files have them
    return BaseModel(
        uri=f"hf://org/{name}", commit=None, files=[], tokenizer=None, tokenizer_hash="", renderer=None, vocabulary=0,
        parameters=Parameters(0, 0, []), config=config, shapes=shapes, warnings=[],
    )  # fmt: skip


def rows(longest: int = 2048, tokens: int = 1_000_000) -> DataSummary:
    return DataSummary(
        rows=1100, train_rows=1000, held_out_rows=100, bad_rows=0, truncated_rows=0, dropped_rows=0, duplicate_rows=0,
        formats={"Messages": 1100}, train_tokens=tokens, train_target_tokens=1, held_out_tokens=1,
        held_out_target_tokens=1, tokens=LengthPercentiles(p50=1, p95=1, p99=1, max=longest),
    )  # fmt: skip


def planned(
    name: str = "llama-3-8b",
    data: DataSummary | None = None,
    nodes: list[NodeGpu] | None = None,
    **spec: Any,
) -> RunPlan | None:
    asked = deep_merge(job_spec(None, "bucket", training={"useCpu": False}), spec)
    parsed = FineTuneJobSpec.model_validate(asked)
    split = snapshot_of(asked, "u" * 32).split
    return plan_run(parsed, split, base_model(name), data or rows(), nodes)


def gpu(product: str | None = None, memory: str | None = None, count: int | str = 1) -> dict[str, Any]:
    asked = {k: v for k, v in (("product", product), ("memory", memory)) if v is not None}
    return {"gpusPerNode": count, "gpu": asked}


def test_auto_is_lora_where_it_fits_and_qlora_where_it_does_not() -> None:
    large = planned(method={"type": "Auto"}, compute=gpu("NVIDIA-A100-SXM4-80GB"))
    small = planned(method={"type": "Auto"}, compute=gpu("Tesla-T4"))
    assert large is not None
    assert small is not None
    assert (large.method, small.method) == (MethodType.LORA, MethodType.QLORA)
    assert "LoRA would need" in small.summary, "why not"
    for plan in (large, small):
        assert plan.usable_bytes is not None
        assert plan.needed_bytes <= 0.95 * plan.usable_bytes
        assert plan.estimated_seconds is not None
        assert plan.verified


def test_the_largest_efficient_micro_batch_that_fits_is_taken_and_the_global_batch_stays_exact() -> None:
    large = planned(compute=gpu("NVIDIA-A100-SXM4-80GB"))
    small = planned(method={"type": "QLoRA"}, compute=gpu(memory="8Gi"))
    assert large is not None
    assert small is not None
    assert large.split.micro_batch_sequences > small.split.micro_batch_sequences
    for plan in (large, small):
        assert plan.split.micro_batch_sequences * plan.split.gradient_accumulation_steps == 8
    asked = planned(compute=gpu("NVIDIA-A100-SXM4-80GB"), training={"microBatchSequences": 1})
    assert asked is not None
    assert asked.split.micro_batch_sequences == 1, "no more than the user allows"


def test_every_rank_takes_its_share_and_whole_copies_come_first() -> None:
    plan = planned(compute=gpu("NVIDIA-A100-SXM4-80GB", count=3), training={"globalBatchSequences": 8})
    assert plan is not None
    assert (plan.split.micro_batch_sequences, plan.split.gradient_accumulation_steps) == (3, 1)
    assert "micro-batch 3." in plan.summary
    assert plan.layout is Layout.DDP


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("batch", [1, 7, 8, 15, 16, 17, 100])
def test_what_runs_is_what_was_planned_however_many_gpus_share_the_batch(batch: int, count: int) -> None:
    def cut(rows_at_once: int | None) -> RunPlan:
        training = {"globalBatchSequences": batch, "maxSequenceTokens": 2048, "microBatchSequences": rows_at_once}
        plan = planned("smollm2-135m", compute=gpu("NVIDIA-A100-SXM4-80GB", count=count), training=training)
        assert plan is not None
        return plan

    plan = cut(None)
    micro, accumulation = plan.split.micro_batch_sequences, plan.split.gradient_accumulation_steps
    assert micro * accumulation == math.ceil(batch / count)
    assert accumulation == math.ceil(batch / (micro * count)), (
        "what a run makes of the micro-batch (training_arguments)"
    )
    assert f"micro-batch {micro}." in plan.summary
    assert cut(micro) == plan, "and the peak is that micro-batch's"


def test_a_base_that_fits_no_gpu_is_shared_out_where_that_is_allowed() -> None:
    eight = gpu("NVIDIA-A100-SXM4-80GB", count=8)
    plan = planned("llama-2-70b", compute=eight)
    assert plan is not None
    assert plan.layout is Layout.FSDP
    with pytest.raises(StageError) as refused:
        planned("llama-2-70b", compute=eight, training={"parallelism": "DDP"})
    assert refused.value.reason is Reason.DOES_NOT_FIT
    assert "gpusPerNode" not in refused.value.message, "more GPUs with a whole copy each do not help"
    with pytest.raises(StageError, match=r"compute\.gpusPerNode: \d \(FSDP\)"):
        planned("llama-2-70b", compute=gpu("NVIDIA-A100-SXM4-40GB"))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            {"type": "QLoRA", "quantization": {"type": "Int8"}},
            r"method\.quantization\.type: NF4 and compute\.gpusPerNode: \d \(FSDP\)",
        ),
        ({"type": "QLoRA", "lora": {"useDora": True}}, r"^(?!.*FSDP)"),
    ],
    ids=["8 bit", "DoRA"],
)
def test_what_must_be_whole_on_a_gpu_is_offered_what_need_not_be(method: dict[str, Any], words: str) -> None:
    with pytest.raises(StageError, match=words) as refused:
        planned(
            "llama-2-70b", method=method, compute=gpu("NVIDIA-A100-SXM4-40GB" if "lora" not in method else "Tesla-T4")
        )
    assert refused.value.reason is Reason.DOES_NOT_FIT


def test_auto_takes_the_fewest_gpus_that_the_run_fits_on() -> None:
    def auto(name: str, product: str, nodes: list[NodeGpu] | None = None, **spec: Any) -> RunPlan:
        plan = planned(name, nodes=nodes, compute=gpu(product, count="Auto"), **{"method": {"type": "Auto"}, **spec})
        assert plan is not None
        return plan

    small = auto("llama-3-8b", "NVIDIA-A100-SXM4-80GB")
    assert (small.gpus_per_node, small.layout, small.method) == (1, Layout.SINGLE, MethodType.LORA)
    large = auto("llama-2-70b", "NVIDIA-A100-SXM4-80GB")
    assert (large.gpus_per_node, large.layout, large.method) == (1, Layout.SINGLE, MethodType.QLORA)
    lora = auto("llama-2-70b", "NVIDIA-A100-SXM4-80GB", method={"type": "LoRA"})
    assert lora.gpus_per_node is not None
    assert lora.gpus_per_node > 1
    assert lora.layout is Layout.FSDP
    assert f"{lora.gpus_per_node - 1} would not do" in lora.summary
    batch = lora.split.micro_batch_sequences * lora.split.gradient_accumulation_steps
    assert batch == math.ceil(8 / lora.gpus_per_node)
    one_less = gpu("NVIDIA-A100-SXM4-80GB", count=lora.gpus_per_node - 1)
    with pytest.raises(StageError) as refused:
        planned("llama-2-70b", compute=one_less, method={"type": "LoRA"})
    assert refused.value.reason is Reason.DOES_NOT_FIT
    shared = auto("llama-3-8b", "NVIDIA-A100-SXM4-80GB", training={"parallelism": "FSDP"})
    assert (shared.gpus_per_node, shared.layout) == (2, Layout.FSDP)


def test_auto_takes_no_more_gpus_than_a_node_of_that_kind_has() -> None:
    nodes = [
        NodeGpu(product="NVIDIA-A10G", nodes=3, per_node=1),
        NodeGpu(product="Tesla-T4", nodes=2, per_node=8),
    ]
    auto = {"compute": gpu(count="Auto"), "method": {"type": "LoRA"}}
    plan = planned("llama-2-13b", nodes=nodes, **auto)
    assert plan is not None
    assert plan.gpu == "Tesla T4"
    assert plan.gpus_per_node is not None
    assert plan.gpus_per_node > 1
    assert plan.unsuitable_gpu_products is None, "the scheduler itself sees that the others are too few"
    with pytest.raises(StageError, match="No node that it may use has more GPUs than 1") as refused:
        planned("llama-2-13b", nodes=nodes[:1], **auto)
    assert refused.value.reason is Reason.DOES_NOT_FIT
    assert "gpusPerNode" not in refused.value.message, "there are no more"


def test_nodes_share_the_base_and_the_batch_as_gpus_of_one_node_do() -> None:
    one = planned("llama-2-70b", compute=gpu("NVIDIA-A100-SXM4-40GB", count=4), method={"type": "QLoRA"})
    two = {**gpu("NVIDIA-A100-SXM4-40GB", count=2), "nodes": 2}
    plan = planned("llama-2-70b", compute=two, method={"type": "QLoRA"})
    assert plan is not None
    assert one is not None
    assert (plan.layout, plan.gpus_per_node, plan.needed_bytes) == (Layout.FSDP, 2, one.needed_bytes)
    assert plan.split == one.split
    with pytest.raises(StageError) as refused:
        planned("llama-2-70b", compute={**gpu("Tesla-T4"), "nodes": 2})
    assert refused.value.reason is Reason.DOES_NOT_FIT
    assert "gpusPerNode" not in refused.value.message, "its count is of all nodes"
    auto = planned(
        "llama-2-70b", compute={**gpu("NVIDIA-A100-SXM4-40GB", count="Auto"), "nodes": 2}, method={"type": "LoRA"}
    )
    assert auto is not None
    assert auto.gpus_per_node is not None
    single = planned("llama-2-70b", compute=gpu("NVIDIA-A100-SXM4-40GB", count="Auto"), method={"type": "LoRA"})
    assert single is not None
    assert single.gpus_per_node is not None
    assert auto.gpus_per_node == math.ceil(single.gpus_per_node / 2)


def test_auto_gpus_need_a_plan() -> None:
    auto = gpu(count="Auto")
    with pytest.raises(StageError, match=r"compute\.gpusPerNode: Auto: the job names no GPU") as refused:
        planned(compute=auto, method={"type": "LoRA"})
    assert refused.value.reason is Reason.INVALID_CONFIG
    with pytest.raises(StageError, match=r"compute\.gpusPerNode: Auto: the memory of this model"):
        planned(
            "llama-3-8b",
            compute=gpu("Tesla-T4", count="Auto"),
            method={"type": "LoRA", "lora": {"targetModules": ["nothing"]}},
        )


def test_sharding_is_what_the_spec_says_and_only_for_models_that_can_be() -> None:
    two = {"compute": gpu("NVIDIA-A100-SXM4-80GB", count=2), "method": {"type": "LoRA"}}
    plan = planned(**two, training={"parallelism": "FSDP"})
    assert plan is not None
    assert plan.layout is Layout.FSDP, "although whole copies would fit"
    unknown = planned(compute=gpu(count=2), method={"type": "LoRA"}, training={"parallelism": "FSDP"})
    assert unknown is not None
    assert unknown.layout is Layout.FSDP
    for name in ("mixtral-8x7b", "gpt2"):  # experts are fused as they are loaded; its files leave a prefix out
        with pytest.raises(StageError, match="parallelism: FSDP: this model is none that can be loaded") as refused:
            planned(name, **two, training={"parallelism": "FSDP"})
        assert refused.value.reason is Reason.INVALID_CONFIG
        auto = planned(name, compute=gpu(count=2), method={"type": "LoRA"})
        assert auto is not None
        assert auto.layout is Layout.DDP


def test_the_base_goes_to_host_memory_only_if_nothing_else_fits() -> None:
    def offloading(name: str, when: str, method: str = "Auto", **compute: Any) -> RunPlan:
        asked = {**gpu("NVIDIA-A10G"), **compute}
        plan = planned(name, compute=asked, method={"type": method}, training={"cpuOffload": when})
        assert plan is not None
        return plan

    small = offloading("llama-3-8b", "IfNeeded", gpu={"memory": "12Gi"})
    assert (small.layout, small.method) == (Layout.SINGLE, MethodType.QLORA), "4 bit on the GPU before 16 bit beside it"
    large = offloading("llama-2-70b", "IfNeeded", "QLoRA")
    assert large.layout is Layout.CPU_OFFLOAD
    assert large.needed_bytes < 22 * GIB
    assert "CPU offload: " in large.summary
    assert "of the base in host memory" in large.summary
    counted = offloading("llama-2-13b", "IfNeeded", "LoRA", gpusPerNode="Auto")
    assert counted.layout is Layout.FSDP, "more GPUs before host memory"
    always = offloading("llama-3-8b", "Always", "LoRA")
    assert (always.layout, always.gpus_per_node) == (Layout.CPU_OFFLOAD, 1)
    assert always.estimated_seconds is not None
    with pytest.raises(StageError, match=r"training\.cpuOffload: IfNeeded \(") as refused:
        planned("llama-2-70b", compute=gpu("NVIDIA-A10G"), method={"type": "QLoRA"})
    assert refused.value.reason is Reason.DOES_NOT_FIT


def test_host_memory_must_hold_the_base() -> None:
    asked = {**gpu("NVIDIA-A10G"), "memory": "16Gi"}
    job = {"method": {"type": "QLoRA"}, "training": {"cpuOffload": "Always"}}
    with pytest.raises(
        StageError, match=r"host memory in each training pod by plan; compute\.memory: 16Gi is"
    ) as refused:
        planned("llama-2-70b", compute=asked, **job)
    assert refused.value.reason is Reason.DOES_NOT_FIT
    assert planned("llama-2-70b", compute={**asked, "memory": "128Gi"}, **job) is not None


def test_only_a_base_that_is_loaded_by_layers_goes_to_host_memory() -> None:
    with pytest.raises(StageError, match="cpuOffload: Always: this model is none that can be loaded") as refused:
        planned("gpt2", compute=gpu("NVIDIA-A10G"), training={"cpuOffload": "Always"})
    assert refused.value.reason is Reason.INVALID_CONFIG
    plan = planned("gpt2", compute=gpu("NVIDIA-A10G"), training={"cpuOffload": "IfNeeded"})
    assert plan is not None
    assert plan.layout is Layout.SINGLE


def test_what_cannot_fit_is_refused_with_how_much_is_missing_and_what_would_fit() -> None:
    with pytest.raises(StageError, match="too little") as refused:
        planned(compute=gpu("Tesla-T4"))
    assert refused.value.reason is Reason.DOES_NOT_FIT
    assert "method.type: QLoRA" in refused.value.message
    assert "hf://org/llama-3-8b" in refused.value.message
    assert planned(compute=gpu("Tesla-T4", memory="80Gi")) is not None, "what is declared counts"


def test_a_type_that_a_gpu_has_not_is_refused() -> None:
    asked = {"computeDtype": "bfloat16"}
    with pytest.raises(StageError, match="computeDtype: bfloat16: Tesla T4 multiplies float16 only") as refused:
        planned(method={"type": "QLoRA"}, compute=gpu("Tesla-T4"), training=asked)
    assert refused.value.reason is Reason.INVALID_CONFIG
    assert planned(method={"type": "QLoRA"}, compute=gpu("NVIDIA-A10G"), training=asked) is not None


def on_nodes(*products: str, memory_mib: int | None = None) -> list[NodeGpu]:
    return [NodeGpu(product=product, memory_mib=memory_mib, nodes=1) for product in products]


def test_gpus_on_nodes_without_the_type_that_is_asked_for_are_avoided() -> None:
    nodes = on_nodes("NVIDIA-A100-SXM4-80GB", "NVIDIA-A10G", "Tesla-T4")
    spec: dict[str, Any] = {"method": {"type": "QLoRA"}, "nodes": nodes}
    plain, asking = planned(**spec), planned(**spec, training={"computeDtype": "bfloat16"})
    assert plain is not None
    assert asking is not None
    assert (plain.gpu, plain.unsuitable_gpu_products) == ("Tesla T4", None)
    assert (asking.gpu, asking.unsuitable_gpu_products) == ("NVIDIA A10G", ["Tesla-T4"])
    assert "Not on Tesla T4, which nodes have: no bfloat16, which training.computeDtype asks for." in asking.summary
    large = planned(nodes=nodes, training={"maxSequenceTokens": 8192, "computeDtype": "bfloat16"}, data=rows(8192))
    assert large is not None
    assert large.unsuitable_gpu_products == ["NVIDIA-A10G", "Tesla-T4"]
    assert "Not on NVIDIA A10G, which nodes have: too little memory for it. Not on Tesla T4" in large.summary


def test_a_job_that_names_no_gpu_is_planned_for_the_smallest_on_nodes_that_it_fits() -> None:
    nodes = on_nodes("NVIDIA-H100-80GB-HBM3", "NVIDIA-A100-SXM4-40GB", "Tesla-T4")
    lora, qlora = (planned(nodes=nodes, method={"type": method}) for method in ("LoRA", "QLoRA"))
    assert lora is not None
    assert qlora is not None
    assert (lora.gpu, lora.unsuitable_gpu_products) == ("NVIDIA A100 SXM4 40GB", ["Tesla-T4"])
    assert "Not on Tesla T4, which nodes have:" in lora.summary
    assert (qlora.gpu, qlora.unsuitable_gpu_products) == ("Tesla T4", None), (
        "it fits the smallest, so it may run anywhere"
    )


def test_auto_takes_lora_if_one_kind_of_gpu_on_nodes_holds_it() -> None:
    mixed = planned(nodes=on_nodes("NVIDIA-A100-SXM4-80GB", "Tesla-T4"), method={"type": "Auto"})
    small = planned(nodes=on_nodes("Tesla-T4"), method={"type": "Auto"})
    assert mixed is not None
    assert small is not None
    assert (mixed.method, mixed.unsuitable_gpu_products) == (MethodType.LORA, ["Tesla-T4"])
    assert (small.method, small.unsuitable_gpu_products) == (MethodType.QLORA, None)


def test_what_no_gpu_on_nodes_holds_is_refused_by_the_largest_of_them() -> None:
    with pytest.raises(StageError, match="too little") as refused:
        planned(nodes=on_nodes("Tesla-T4", "Tesla-V100-SXM2-16GB"), method={"type": "LoRA"})
    assert refused.value.reason is Reason.DOES_NOT_FIT
    assert "Tesla V100 SXM2 16GB has" in refused.value.message
    said = "nodes have Tesla T4, Tesla V100 SXM2 16GB: to wait for another, name it in compute.gpu.product"
    assert said in refused.value.message
    with pytest.raises(StageError, match="to wait for another"):
        planned(nodes=on_nodes("Tesla-T4"), method={"type": "LoRA"})


@pytest.mark.parametrize(("method", "planned_as"), [("LoRA", MethodType.LORA), ("Auto", MethodType.QLORA)])
@pytest.mark.parametrize("shared", [False, True])
def test_where_nodes_have_a_gpu_of_which_nothing_is_known_it_may_fit(
    shared: bool, method: str, planned_as: MethodType
) -> None:
    """And the others, which are known not to, are avoided."""
    product, memory = ("NVIDIA-A100-SXM4-80GB-SHARED", 81920) if shared else ("Somebodys-GPU", None)
    other = NodeGpu(product=product, memory_mib=memory, shared=shared, nodes=1)
    spec = {"method": {"type": method}, "training": {"maxSequenceTokens": 32768}}
    plan = planned(nodes=[*on_nodes("Tesla-T4"), other], data=rows(32768), **spec)
    assert plan is not None
    assert (plan.method, plan.usable_bytes, plan.unsuitable_gpu_products) == (planned_as, None, ["Tesla-T4"])


def test_an_estimate_that_was_not_verified_forbids_no_gpu() -> None:
    nodes = on_nodes("NVIDIA-A100-SXM4-80GB", "NVIDIA-H100-80GB-HBM3")
    plan = planned("mixtral-8x7b", nodes=nodes, method={"type": "LoRA"})
    assert plan is not None
    assert "does not fit" in plan.summary
    assert plan.unsuitable_gpu_products is None


def test_a_product_that_is_not_in_the_table_has_what_its_label_tells() -> None:
    for asked in (gpu("Somebodys-GPU"), gpu()):
        plan = planned(nodes=on_nodes("Somebodys-GPU", memory_mib=40_000), compute=asked, method={"type": "Auto"})
        assert plan is not None
        assert plan.gpu == "Somebodys GPU"
        assert plan.usable_bytes == int(40_000 * 0.97) << 20
    for nodes, why in (
        (on_nodes("Somebodys-GPU"), r"of those that nodes have \(Somebodys-GPU\) the memory is not known"),
        ([], "no node tells of one that it may use"),
        (None, r"names no GPU\. Set compute"),
    ):
        with pytest.raises(StageError, match=why) as refused:
            planned(nodes=nodes, method={"type": "Auto"})
        assert refused.value.reason is Reason.INVALID_CONFIG


def test_what_the_job_declares_counts_more_than_what_nodes_tell() -> None:
    plan = planned(nodes=on_nodes("Tesla-T4"), compute=gpu(memory="80Gi"), method={"type": "LoRA"})
    assert plan is not None
    assert plan.usable_bytes == 80 * GIB


def test_rows_are_as_long_as_the_longest_there_is() -> None:
    spec = {"method": {"type": "QLoRA"}, "compute": gpu(memory="9Gi"), "training": {"maxSequenceTokens": 32768}}
    with pytest.raises(StageError) as refused:
        planned(data=rows(longest=100_000), **spec)
    assert "32768 tokens" in refused.value.message
    short = planned(data=rows(longest=300), **spec)
    assert short is not None
    assert short.split.max_sequence_tokens == 32768, "a limit for what may be trained on, not for what is"


def test_without_a_known_gpu_nothing_is_refused_and_nothing_chosen() -> None:
    for asked in (gpu(), gpu("Somebodys-GPU")):
        plan = planned(compute=asked, method={"type": "QLoRA"})
        assert plan is not None
        assert plan.usable_bytes is None
        assert 5 * GIB < plan.needed_bytes < 20 * GIB
        assert plan.split.micro_batch_sequences == 4
    with pytest.raises(StageError, match=r"compute\.gpu\.memory") as refused:
        planned(compute=gpu("Somebodys-GPU"), method={"type": "Auto"})
    assert refused.value.reason is Reason.INVALID_CONFIG


def test_a_cpu_needs_no_plan_and_an_unknown_model_has_none(caplog: pytest.LogCaptureFixture) -> None:
    assert planned(training={"useCpu": True}, method={"type": "Auto"}) is None
    spec = FineTuneJobSpec.model_validate(
        job_spec(None, "bucket", training={"useCpu": False}, compute=gpu("Tesla-T4"), method={"type": "LoRA"})
    )
    split = snapshot_of(job_spec(None, "bucket"), "u" * 32).split
    strange = base_model("llama-3-8b", hidden_size=None)
    assert plan_run(spec, split, strange, rows()) is None
    assert "cannot be planned" in caplog.text
    auto = spec.model_copy(update={"method": spec.method.model_copy(update={"type": MethodType.AUTO})})
    with pytest.raises(StageError) as refused:
        plan_run(auto, split, strange, rows())
    assert refused.value.reason is Reason.INVALID_CONFIG


def test_a_family_that_was_not_verified_is_told_and_not_refused() -> None:
    plan = planned("mixtral-8x7b", compute=gpu("Tesla-T4"))
    assert plan is not None
    assert not plan.verified
    assert "not verified" in plan.summary


def test_auto_on_a_cpu_is_lora() -> None:
    spec = FineTuneJobSpec.model_validate(job_spec(None, "bucket", method={"type": "Auto"}, training={"useCpu": True}))
    assert resolve_plan(spec).method.type is MethodType.LORA


def test_training_takes_method_and_split_from_the_plan(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    from finetune_trainer.train import run as train
    from tests.trainer.test_train_resume import result

    job = prepare_job(s3, tmp_path, tiny_model, training={"length": {"steps": 2}})
    chosen = RunPlan(
        method=MethodType.QLORA,
        split=job.snapshot.split.model_copy(update={"micro_batch_sequences": 2, "gradient_accumulation_steps": 4}),
        needed_bytes=1, peak_allocated_bytes=1, verified=True, summary="",
    )  # fmt: skip
    rewrite_prepared(job, job)
    store = job.context().workspace_store()
    stored = json.loads(store.get_bytes("prepare/result.json"))
    store.put_bytes("prepare/result.json", json.dumps({**stored, "plan": chosen.to_json_dict()}).encode())
    ctx = job.context()
    train.run(ctx)
    found = result(job)
    assert found.quantized_modules, "QLoRA"
    assert found.split == chosen.split
    assert not any("split" in post for post in ctx.reporter.posts), "as planned: nothing to tell"  # type: ignore[attr-defined]
