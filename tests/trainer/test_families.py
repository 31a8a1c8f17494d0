"""Families of models: the layers that prepare resolves are those that peft adapts, and a job on each ends in a verified adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.planner import Tuning, parameter_shapes, parse_config
from finetune_api.planner.linears import trainable_parameters
from finetune_api.planner.weights import expert_copies
from finetune_api.results import Manifest, PrepareResult
from finetune_api.spec import MethodType
from finetune_api.targets import is_named
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.four_bit import left_in_16_bit
from finetune_trainer.prepare.run import run as prepare
from finetune_trainer.prepare.shapes import Parameters, count_parameters, refuse_mamba_projections, refuse_other_experts
from finetune_trainer.publish.run import run as publish
from finetune_trainer.sources.model import TensorHeaders
from finetune_trainer.train.model import attach_adapter
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.run import load
from finetune_trainer.train.run import run as train
from tests.planner.simulator.golden import read_config
from tests.support.prepare_bench import ROWS, Bench
from tests.support.prepared import deep_merge, job_spec, questions
from tests.support.served_layout import check_model_folder
from tests.support.tiny_families import build_tiny_family
from tests.support.trainer_run import Pod
from tests.trainer.test_train_trainer import CPU16, snapshot

CONFIGS = ("phi-3-mini", "gpt2", "gemma-2-2b", "gemma-3-1b", "qwen2.5-0.5b", "qwen3-0.6b", "falcon-7b", "pythia-1.4b", "mixtral-8x7b", "qwen3-30b-a3b")  # fmt: skip


def two_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with two of its layers."""
    kinds = {"layer_types": config["layer_types"][:2]} if "layer_types" in config else {}
    return {**config, "n_layer" if "n_layer" in config else "num_hidden_layers": 2, **kinds}


def on_meta(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)


def headers_of(base: Any) -> TensorHeaders:
    """What stands in the model's files: names of the Hub's."""
    stored = revert_weight_conversion(base, {n: p.detach() for n, p in base.named_parameters()})
    hub = {n.removeprefix("transformer.") if base.config.model_type == "gpt2" else n: t for n, t in stored.items()}
    return {name: ("BF16", tuple(tensor.shape)) for name, tensor in hub.items()}


def configuration(name: str) -> dict[str, Any]:
    """A committed one, or transformers' defaults for a model type, which are those of its first model."""
    return read_config(name) if name in CONFIGS else AutoConfig.for_model(name).to_dict()


@pytest.mark.parametrize("lora", [{}, {"layersToTransform": [1], "useDora": True}], ids=["all-linear", "one layer"])
@pytest.mark.parametrize("name", [*CONFIGS, "qwen2_moe", "granitemoeshared", "gpt_oss"])
def test_the_layers_that_prepare_resolves_are_those_that_are_adapted(name: str, lora: dict[str, Any]) -> None:
    """By name, with the number of weights that are trained; so does the planner count."""
    config = two_layers(configuration(name))
    base = on_meta(config)
    headers = headers_of(base)
    run = snapshot(method={"lora": {"rank": 8, "dropout": 0.05, **lora}})
    counted = count_parameters(headers, run.plan.method.lora)
    adapted = attach_adapter(base, run)
    modules = [n for n, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    prefix = "transformer." if name == "gpt2" else ""
    assert sorted(modules) == sorted(f"{prefix}{target}" for target in counted.targets)
    assert counted.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    arch = parse_config(config)
    tuning = Tuning(rank=8, layers_to_transform=lora.get("layersToTransform"), dora=bool(lora))
    shapes = parameter_shapes({n: shape for n, (_, shape) in headers.items()}, arch)
    assert counted.trainable == trainable_parameters(shapes, arch, tuning)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen2_moe", "qwen3-30b-a3b"])
def test_experts_and_routers_cannot_be_named(name: str) -> None:
    headers = headers_of(on_meta(two_layers(configuration(name))))
    expert = "w1" if name == "mixtral-8x7b" else "up_proj"
    for module in (expert, "gate"):
        for setting in ("targetModules", "modulesToSave"):
            lora = snapshot(method={"lora": {"targetModules": ["q_proj"], setting: [module]}}).plan.method.lora
            with pytest.raises(StageError, match=f"{setting}: {module} is .*of .*mixture of experts") as caught:
                count_parameters(headers, lora)
            assert caught.value.reason is Reason.INVALID_CONFIG


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "parameters", [EXPERTS, EXPERTS[1:], ["layers.1.mlp.experts.gate_up_proj"]], ids=["both", "down", "one layer"]
)
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen2_moe", "qwen3-30b-a3b"])
def test_weights_trained_for_experts_are_counted_as_peft_has_them(name: str, parameters: list[str]) -> None:
    """By prepare and by the planner, on the meta device."""
    config = two_layers(configuration(name))
    base = on_meta(config)
    headers = headers_of(base)
    run = snapshot(method={"lora": {"rank": 8, "dropout": 0, "targetParameters": parameters}})
    counted = count_parameters(headers, run.plan.method.lora)
    adapted = attach_adapter(base, run)
    assert counted.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert len(counted.experts) == sum(1 if "layers." in each else 2 for each in parameters)
    wrapped = [m for m in adapted.modules() if isinstance(m, ParamWrapper)]
    assert len(wrapped) == len(counted.experts)
    arch = parse_config(config)
    shapes = parameter_shapes({n: shape for n, (_, shape) in headers.items()}, arch)
    tuning = Tuning(rank=8, dropout=0, target_parameters=parameters)
    assert counted.trainable == trainable_parameters(shapes, arch, tuning)
    layer, everything = expert_copies(shapes, tuning)
    held = {n: 2 * p.numel() for n, p in base.named_parameters() if is_named(n.replace(".base_layer", ""), parameters)}
    assert everything == sum(held.values())
    assert layer == everything // (1 if "layers." in parameters[0] else 2)


def test_experts_that_cannot_be_adapted_are_refused_before_a_gpu_is_used() -> None:
    lora = snapshot(method={"lora": {"dropout": 0, "targetParameters": ["mlp.experts.w1"]}}).plan.method.lora
    mixture = headers_of(on_meta(two_layers(configuration("mixtral-8x7b"))))
    with pytest.raises(
        StageError, match=r"fused experts are mlp\.experts\.down_proj, mlp\.experts\.gate_up_proj"
    ) as caught:
        count_parameters(mixture, lora)
    assert caught.value.reason is Reason.UNKNOWN_TARGET_MODULE
    with pytest.raises(StageError, match="no fused experts: name its layers in targetModules"):
        count_parameters(headers_of(on_meta(two_layers(configuration("qwen3-0.6b")))), lora)
    with pytest.raises(
        StageError, match="is a gpt_oss; experts of mixtral, qwen2_moe, qwen3_moe can be adapted"
    ) as other:
        refuse_other_experts(lora, "gpt_oss", "hf://org/name")
    assert other.value.reason is Reason.UNSUPPORTED_MODEL
    refuse_other_experts(lora, "mixtral", "hf://org/name")


def test_layers_of_mamba_that_peft_refuses_are_refused_before_a_gpu_is_used() -> None:
    def counted(**lora: Any) -> Parameters:
        return count_parameters(headers, snapshot(method={"lora": lora}).plan.method.lora)

    base = on_meta(two_layers(configuration("falcon_h1")))
    headers = headers_of(base)
    with pytest.raises(StageError, match=r"excludeModules: \[out_proj\]") as caught:
        refuse_mamba_projections("falcon_h1", counted())
    assert caught.value.reason is Reason.INVALID_CONFIG
    without = {"excludeModules": ["out_proj"]}
    refuse_mamba_projections("falcon_h1", counted(**without))
    adapted = attach_adapter(base, snapshot(method={"lora": without}))
    modules = [n for n, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    assert sorted(modules) == sorted(counted(**without).targets)


FAMILIES = ["phi3", "gpt2", "gpt_neox", "falcon", "gemma3_text", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"]
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def run_job(s3: Any, folder: Path, family: str, **changes: Any) -> tuple[PrepareResult, Manifest, Path]:
    """Two steps of a job on a tiny model, from prepare to publish; what prepare and publish wrote, and the adapter's folder."""
    base = build_tiny_family(folder / "base", family)
    bucket = s3.new_bucket()
    s3.put_dir(bucket, "base", base)
    s3.put(bucket, "train.jsonl", "".join(json.dumps({"messages": m}) + "\n" for m in questions(24)))
    pod = Pod(folder / "pod")
    for slot in ("model", "output", "train-0"):
        s3.write_secret(pod.secrets / slot)
    own = {
        "method": {"lora": {"dropout": 0.05}},
        "training": {"length": {"steps": 2}},
        "evaluation": {"generation": {"prompts": 1, "maxNewTokens": 2}},
        "output": {
            "merged": {"enabled": True, "dtype": "float32"},
            "workspace": {"retention": "Keep"},
        },
    }
    spec = deep_merge(deep_merge(job_spec(s3, bucket), own), changes)
    prepare(pod.context(spec))
    train(pod.context(spec, Stage.TRAIN))
    publish(pod.context(spec, Stage.PUBLISH))
    context = pod.context(spec, Stage.PUBLISH)
    prepared = context.workspace_store().get_model("prepare/result.json", PrepareResult)
    store = context.output_store()
    for part in ("adapter", "merged"):
        s3.get_dir(bucket, f"{store.location.key}/{part}", folder / part)
    check_model_folder(folder / "merged", "float32")
    return prepared, store.get_model("manifest.json", Manifest), folder / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_job_on_any_family_ends_in_a_verified_adapter(s3: Any, tmp_path: Path, family: str) -> None:
    prepared, manifest, adapter = run_job(s3, tmp_path, family)
    with safe_open(adapter / "adapter_model.safetensors", "np") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert prepared.trainable_parameters == sum(a * b for a, b in stored.values())
    assert manifest.verification is not None
    assert manifest.verification.relative_difference < 1e-6
    assert manifest.merge_check is not None
    assert manifest.merge_check.relative_difference < 1e-5
    mixture = [
        w
        for w in prepared.warnings
        if w.startswith("mixture of experts: the adapter is on k_proj, o_proj, q_proj, v_proj;")
    ]
    assert len(mixture) == (family in MIXTURES)
    assert not any("experts" in name for name in stored)


@pytest.mark.parametrize(
    ("family", "changes", "head"),
    [
        ("gpt2", {"model": {"newTokens": ["<zig>", "<zag>"]}}, "transformer.wte.weight"),
        ("gpt_neox", {"model": {"newTokens": ["<zig>", "<zag>"]}}, "embed_out.weight"),
        ("gpt_neox", {"method": {"lora": {"modulesToSave": ["lm_head"]}}}, "embed_out.weight"),
    ],
    ids=["tied", "apart", "whole"],
)
def test_what_is_trained_of_the_head_is_merged_whatever_the_files_call_it(
    s3: Any, tmp_path: Path, family: str, changes: dict[str, Any], head: str
) -> None:
    prepared, manifest, _ = run_job(s3, tmp_path, family, **changes)
    assert manifest.merge_check is not None
    assert manifest.merge_check.relative_difference < 1e-5
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged:
        found = merged.get_tensor(head)
    base = load_file(tmp_path / "base" / "model.safetensors")[head]
    assert len(found) - len(base) == len(prepared.trained_tokens.new if prepared.trained_tokens else [])
    assert len(found) > len(base) or not torch.equal(found, base)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("gpt_neox", {"modulesToSave": ["embed_in", "lm_head"]}),
        ("gpt_neox", {"modulesToSave": ["final_layer_norm"]}),
        ("gpt2", {"bias": "All"}),
        ("falcon", {"modulesToSave": ["ln_f"]}),
        ("phi", {"modulesToSave": ["embed_tokens"]}),
    ],
    ids=["embeddings", "norm", "biases", "falcon", "phi"],
)
def test_layer_norms_take_what_is_trained_in_float32_of_a_16_bit_model(
    s3: Any, tmp_path: Path, family: str, lora: dict[str, Any]
) -> None:
    """On a CPU torch refuses such a mixture. The reloaded adapter and the merged model give what training measured."""
    changes = {"method": {"lora": lora}, "training": {"computeDtype": "bfloat16"}}
    _, manifest, _ = run_job(s3, tmp_path, family, **changes)
    assert manifest.verification is not None
    rounding = 1e-3 if "bias" in lora else 1e-6  # peft loads biases into the model's own, which have 16 bit
    assert manifest.verification.relative_difference < rounding
    assert manifest.merge_check is not None


@pytest.mark.parametrize("bias", ["All", "LoRAOnly"])
def test_trained_biases_reach_adapter_and_merged_model(s3: Any, tmp_path: Path, bias: str) -> None:
    """Training's held-out loss, the reloaded adapter's and the merged model's agree, at a rate that moves the biases far."""
    changes = {
        "method": {"lora": {"bias": bias, "targetModules": ["q_proj", "up_proj"]}},
        "training": {"optimizer": {"learningRate": 0.1}},
    }
    prepared, manifest, adapter = run_job(s3, tmp_path, "qwen2", **changes)
    stored = load_file(adapter / "adapter_model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    biases = {name.removeprefix("base_model.model."): value for name, value in stored.items() if name.endswith(".bias")}
    plain = {name.replace(".base_layer.", "."): value for name, value in biases.items()}
    named = {n for n in base if n.endswith(".bias") and (bias == "All" or "q_proj" in n)}
    assert plain.keys() == named
    assert all((plain[name] - base[name]).abs().max() > 0.01 for name in named)
    assert prepared.trainable_parameters == sum(value.numel() for value in stored.values())
    assert manifest.verification is not None
    assert manifest.verification.relative_difference < 1e-6
    assert manifest.merge_check is not None


def test_qlora_of_experts_tells_how_much_stays_in_16_bit(s3: Any, tmp_path: Path) -> None:
    prepared, manifest, _ = run_job(s3, tmp_path, "mixtral", method={"type": "QLoRA"})
    assert any(w.startswith("QLoRA leaves 86% of its layers' weights in 16 bit") for w in prepared.warnings)
    assert manifest.verification is not None
    assert manifest.merge_check is not None


@pytest.mark.parametrize("family", MIXTURES)
def test_a_job_on_experts_ends_in_a_verified_adapter_and_merged_model(s3: Any, tmp_path: Path, family: str) -> None:
    changes = {
        "method": {"lora": {"dropout": 0, "targetParameters": EXPERTS}},
        "training": {"optimizer": {"learningRate": 0.01}},
    }
    prepared, manifest, adapter = run_job(s3, tmp_path, family, **changes)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert prepared.trainable_parameters == sum(value.numel() for value in stored.values())
    assert {value.dtype for value in stored.values()} == {torch.float32}
    moved = [name for name, value in stored.items() if ".experts." in name and ".lora_B." in name and bool(value.any())]
    assert len(moved) == 4
    assert set(json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]) == set(EXPERTS)
    assert manifest.verification is not None
    assert manifest.verification.relative_difference < 1e-6
    assert manifest.merge_check is not None
    assert manifest.merge_check.relative_difference < 1e-5
    assert any("for each expert, on down_proj, gate_up_proj" in warning for warning in prepared.warnings)
    assert "vLLM serves no such adapter" in (adapter / "README.md").read_text()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_qlora_of_older_families_is_merged_into_what_training_saw(s3: Any, tmp_path: Path, family: str) -> None:
    """The merge check compares base + adapter here with training's own measurement."""
    _, manifest, _ = run_job(s3, tmp_path, family, method={"type": "QLoRA"})
    assert manifest.merge_check is not None
    assert manifest.merge_check.held_out_loss_trained is not None
    assert not any("quantize on this CPU" in warning for warning in manifest.warnings)


def test_qlora_that_would_quantize_nothing_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.s3.put_dir(bench.bucket, "model", build_tiny_family(tmp_path / "falcon", "falcon"))
    bench.put(ROWS)
    error = bench.fails(method={"type": "QLoRA"})
    assert error.reason is Reason.INVALID_CONFIG
    assert "would leave all of s3://" in error.message
    assert bench.run().trainable_parameters


def test_training_does_not_take_a_base_for_quantized_that_is_not(tmp_path: Path) -> None:
    base = build_tiny_family(tmp_path / "falcon", "falcon")
    with pytest.raises(StageError, match="quantized none of the layers of FalconForCausalLM") as caught:
        load(base, snapshot(method={"type": "QLoRA"}), CPU16, Ranks())
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL


def test_what_stays_in_16_bit_is_told_where_it_is_much() -> None:
    def told(name: str, method: MethodType) -> str | None:
        config = configuration(name)
        shapes = {n: shape for n, (_, shape) in headers_of(on_meta(two_layers(config))).items()}
        return left_in_16_bit(method, config, shapes, "hf://org/name")

    assert told("mixtral-8x7b", MethodType.LORA) is None
    assert "leaves 97% of its layers' weights" in (told("mixtral-8x7b", MethodType.AUTO) or "")
    for dense in ("phi-3-mini", "gpt2", "gemma-2-2b"):
        assert told(dense, MethodType.QLORA) is None
