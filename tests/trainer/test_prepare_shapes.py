"""Parameter counts from shapes alone equal those of the real thing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.snapshot import ResolvedLora
from finetune_api.spec import LoraBias
from finetune_api.targets import is_left_out, is_named
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.shapes import check_mergeable, count_parameters, refuse_unsaveable
from finetune_trainer.sources.model import TensorHeaders

Q_V = ["q_proj", "v_proj"]
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(rank: int, modules: list[str], bias: LoraBias = LoraBias.NONE, **left_out: Any) -> ResolvedLora:
    return ResolvedLora(rank=rank, alpha=2 * rank, dropout=0, bias=bias, target_modules=modules, **left_out)


def llama(
    hidden: int, intermediate: int, layers: int, key_value: int, vocabulary: int, bias: bool = False
) -> TensorHeaders:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (key_value, hidden),
            f"{layer}.self_attn.v_proj.weight": (key_value, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, intermediate),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.rotary_emb.inv_freq": (64,),
        }
        if bias:
            shapes |= {f"{layer}.self_attn.{m}.bias": (n,) for m, n in (("q_proj", hidden), ("k_proj", key_value))}
    shapes["model.norm.weight"] = (hidden,)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


LLAMA_3_8B = llama(4096, 14336, 32, 1024, 128256)


@pytest.mark.parametrize(
    ("modules", "rank", "trainable"),
    [
        (QKVO, 16, 13_631_488),
        (Q_V, 8, 3_407_872),
        (["all-linear"], 16, 41_943_040),
        (["self_attn.q_proj"], 1, 32 * 8192),
    ],
)
def test_llama_3_8b_has_the_published_counts(modules: list[str], rank: int, trainable: int) -> None:
    parameters = count_parameters(LLAMA_3_8B, lora(rank, modules))
    assert parameters.trainable == trainable
    assert parameters.total == 8_030_261_248


def test_biases_are_counted_as_peft_trains_them() -> None:
    headers = llama(64, 128, 2, 32, 100, bias=True)
    none, only, every = (
        count_parameters(headers, lora(4, Q_V, bias)).trainable
        for bias in (LoraBias.NONE, LoraBias.LORA_ONLY, LoraBias.ALL)
    )
    assert (only - none, every - none) == (2 * 64, 2 * (64 + 32))


def test_gpt2_names_are_understood() -> None:
    headers: TensorHeaders = {
        "wte.weight": ("F32", (50257, 768)),
        "wpe.weight": ("F32", (1024, 768)),
        "h.0.attn.bias": ("F32", (1, 1, 1024, 1024)),
        "h.0.attn.c_attn.weight": ("F32", (768, 2304)),
        "h.0.attn.c_attn.bias": ("F32", (2304,)),
    }
    parameters = count_parameters(headers, lora(8, ["all-linear"]))
    assert parameters.targets == ["h.0.attn.c_attn"]
    assert parameters.trainable == 8 * (768 + 2304)


@pytest.mark.parametrize(
    ("module", "reason"),
    [("query", Reason.UNKNOWN_TARGET_MODULE), ("proj", Reason.UNKNOWN_TARGET_MODULE), ("lm_head", Reason.INVALID_CONFIG),
     ("embed_tokens", Reason.INVALID_CONFIG), ("input_layernorm", Reason.UNKNOWN_TARGET_MODULE)],
)  # fmt: skip
def test_a_module_that_cannot_be_adapted_is_named_with_those_that_can(module: str, reason: Reason) -> None:
    with pytest.raises(StageError) as info:
        count_parameters(LLAMA_3_8B, lora(8, ["q_proj", module]))
    assert info.value.reason is reason
    assert module in info.value.message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in info.value.message


def test_patterns_name_the_layers_that_they_fit() -> None:
    asked = lora(8, ["layers.[0-7].self_attn.?_proj", "*.11.mlp.*"], exclude_modules=["[ko]_proj"])
    parameters = count_parameters(LLAMA_3_8B, asked)
    attention = {f"model.layers.{n}.self_attn.{m}" for n in range(8) for m in ("q_proj", "v_proj")}
    assert set(parameters.targets) == attention | {f"model.layers.11.mlp.{m}_proj" for m in ("gate", "up", "down")}
    with pytest.raises(
        StageError, match=r"blocks\.\[0-9\]\.\* fits none of this model's linear layers, .* such as model\.layers\.0\."
    ) as info:
        count_parameters(LLAMA_3_8B, lora(8, ["q_proj", "blocks.[0-9].*"]))
    assert info.value.reason is Reason.UNKNOWN_TARGET_MODULE
    with pytest.raises(StageError, match=r"lm_\* is the output head"):
        count_parameters(LLAMA_3_8B, lora(8, ["lm_*"]))


def test_no_pattern_takes_long() -> None:
    """Of as many wildcards as a name may have, on names that it almost fits."""
    hostile = "*a" * 63 + "b"
    began = time.perf_counter()
    assert not is_named("model.layers.0." + "a" * 5000, [hostile])
    assert time.perf_counter() - began < 1


def test_something_must_be_left_to_adapt() -> None:
    with pytest.raises(StageError, match="leave none of 32 layers to adapt") as info:
        count_parameters(LLAMA_3_8B, lora(8, ["q_proj"], exclude_modules=["q_proj"]))
    assert info.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize(
    ("module", "layer"),
    [("model.layers.3.self_attn.q_proj", 3), ("h.0.attn.c_attn", 0), ("a.layers.2.experts.7.w1", 2)],
)
def test_a_modules_layer_is_the_first_number_in_its_name(module: str, layer: int) -> None:
    assert not is_left_out(module, [], [layer])
    assert is_left_out(module, [], [layer + 1])


def test_a_setting_that_leaves_nothing_out_is_refused() -> None:
    with pytest.raises(StageError, match="excludeModules: lm_head is none of the layers") as info:
        count_parameters(LLAMA_3_8B, lora(8, ["all-linear"], exclude_modules=["lm_head"]))
    assert info.value.reason is Reason.UNKNOWN_TARGET_MODULE
    with pytest.raises(StageError, match="layersToTransform: no layer 32 would be adapted") as info:
        count_parameters(LLAMA_3_8B, lora(8, ["all-linear"], layers_to_transform=[31, 32]))
    assert info.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize(
    ("modules", "bias", "left_out"),
    [
        (["all-linear"], "none", {}),
        (Q_V, "none", {}),
        (["up_proj"], "all", {}),
        (QKVO, "lora_only", {}),
        (["all-linear"], "none", {"exclude_modules": ["gate_proj"], "layers_to_transform": [1]}),
    ],
)
def test_counts_equal_pefts_own(tiny_model: Path, modules: list[str], bias: Any, left_out: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
        total = model.num_parameters()
        target: Any = modules
        if modules == ["all-linear"]:
            target = [*QKVO, "gate_proj", "up_proj", "down_proj"] if left_out else "all-linear"
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=8, target_modules=target, bias=bias, task_type="CAUSAL_LM", **left_out)
        )
    with safe_open(tiny_model / "model.safetensors", "np") as file:
        headers = {name: ("F32", tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    bias_name = {"none": LoraBias.NONE, "all": LoraBias.ALL, "lora_only": LoraBias.LORA_ONLY}[bias]
    counted = count_parameters(headers, lora(8, modules, bias_name, **left_out))
    assert counted.trainable == wrapped.get_nb_trainable_parameters()[0]
    assert counted.total == total


def test_a_dense_decoder_can_be_merged() -> None:
    check_mergeable(llama(8, 16, 1, 8, 32), "llama", "s3://models/llama")


@pytest.mark.parametrize(
    "headers",
    [
        {"wte.weight": ("F32", (32, 8)), "h.0.attn.c_attn.weight": ("F32", (8, 24))},
        llama(8, 16, 1, 8, 32) | {"model.layers.0.mlp.experts.0.w1.weight": ("F32", (8, 8))},
    ],
    ids=["tensors named otherwise", "a mixture of experts"],
)
def test_a_model_that_publish_could_not_merge_is_refused_before_a_gpu_is_asked_for(headers: TensorHeaders) -> None:
    with pytest.raises(StageError, match=r"output\.merged\.enabled: false") as error:
        check_mergeable(headers, "other", "s3://models/other")
    assert error.value.reason is Reason.UNSUPPORTED_MODEL


def test_modules_that_cannot_be_trained_whole() -> None:
    whole = count_parameters(LLAMA_3_8B, lora(8, ["q_proj"], modules_to_save=["embed_tokens", "norm"]))
    assert whole.trainable == count_parameters(LLAMA_3_8B, lora(8, ["q_proj"])).trainable + 128256 * 4096 + 4096
    with pytest.raises(
        StageError, match="modulesToSave: wte is no module with weights of this model, which has down_proj"
    ):
        count_parameters(LLAMA_3_8B, lora(8, ["q_proj"], modules_to_save=["wte"]))
    with pytest.raises(StageError, match="modulesToSave: q_proj gets an adapter, too"):
        count_parameters(LLAMA_3_8B, lora(8, ["q_proj"], modules_to_save=["q_proj"]))
    head = lora(8, ["q_proj"], modules_to_save=["lm_head"])
    refuse_unsaveable(LLAMA_3_8B, head, tied=False, quantized=True)
    with pytest.raises(StageError, match="name embed_tokens, and both are trained as one"):
        refuse_unsaveable(LLAMA_3_8B, head, tied=True, quantized=False)
    for tied in (True, False):
        refuse_unsaveable(
            LLAMA_3_8B, lora(8, ["q_proj"], modules_to_save=["model.embed_tokens"]), tied, quantized=False
        )
    wte = lora(8, ["c_attn"], modules_to_save=["transformer.wte", "wpe"])
    refuse_unsaveable(LLAMA_3_8B, wte, tied=False, quantized=False)
    with pytest.raises(StageError, match=r"transformer\.wte is the output head of this model too") as refused:
        refuse_unsaveable(LLAMA_3_8B, wte, tied=True, quantized=False)
    assert refused.value.reason is Reason.INVALID_CONFIG
    linear = lora(8, ["q_proj"], modules_to_save=["down_proj"])
    refuse_unsaveable(LLAMA_3_8B, linear, tied=False, quantized=False)
    with pytest.raises(StageError, match=r"QLoRA holds model.layers.\d+.mlp.down_proj quantized"):
        refuse_unsaveable(LLAMA_3_8B, linear, tied=False, quantized=True)


def test_patterns_name_layers_that_are_adapted() -> None:
    plain, patterned = (
        count_parameters(LLAMA_3_8B, lora(8, ["q_proj", "v_proj"], **given))
        for given in ({}, {"rank_pattern": {"v_proj": 16}})
    )
    assert patterned.trainable - plain.trainable == 32 * 8 * (4096 + 1024)
    for field, given in (("rankPattern", "rank_pattern"), ("alphaPattern", "alpha_pattern")):
        with pytest.raises(
            StageError, match=f"{field}: k_proj is none of the layers that are adapted, which are q_proj"
        ):
            count_parameters(LLAMA_3_8B, lora(8, ["q_proj"], **{given: {"k_proj": 4}}))
