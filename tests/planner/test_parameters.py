"""Parameter counts and weight bytes equal those of PEFT and transformers on the meta device."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.planner import Request, Tuning, UnknownTarget, describe, parameter_shapes, parse_config, plan
from finetune_api.planner.linears import linear_layers, trainable_parameters
from finetune_api.spec import LoraBias, QuantizationType
from tests.planner.cases import model
from tests.planner.simulator.golden import read_config
from tests.planner.simulator.linear4bit import FakeLinear4bit, quantize
from tests.planner.simulator.linear8bit import FakeLinear8bit

MODELS = sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.json"))
BIASES = {LoraBias.NONE: "none", LoraBias.ALL: "all", LoraBias.LORA_ONLY: "lora_only"}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**read_config(name)), dtype=torch.bfloat16)


@functools.cache
def parameters_on_meta(name: str) -> dict[str, torch.nn.Parameter]:
    return dict(on_meta(name).named_parameters())


def trainable_by_peft(base: Any, targets: list[str] | str, rank: int, bias: str, **settings: Any) -> int:
    lora = LoraConfig(r=rank, target_modules=targets, bias=bias, task_type="CAUSAL_LM", **settings)
    return sum(p.numel() for p in get_peft_model(base, lora).parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_transformers_name_and_shape(name: str) -> None:
    _, shapes = model(name)
    assert shapes == {n: tuple(p.shape) for n, p in parameters_on_meta(name).items()}


@pytest.mark.parametrize("name", MODELS)
def test_weight_bytes_are_those_of_transformers(name: str) -> None:
    arch, shapes = model(name)
    planned = plan(Request(architecture=arch, shapes=shapes))
    real = parameters_on_meta(name).values()
    assert planned.weight_bytes == sum(p.numel() * p.element_size() for p in real)
    assert planned.total_parameters == sum(p.numel() for p in real)


@pytest.mark.parametrize("name", MODELS)
def test_trainable_parameters_are_those_of_peft(name: str) -> None:
    arch, shapes = model(name)
    ours = trainable_parameters(shapes, arch, Tuning())
    assert ours == trainable_by_peft(on_meta(name), QKVO if arch.experts else "all-linear", 16, "none")


@pytest.mark.parametrize("bias", list(LoraBias))
@pytest.mark.parametrize("name", ["gpt2", "pythia-1.4b", "qwen2.5-0.5b"])
def test_trained_biases_are_counted_as_peft_counts_them(name: str, bias: LoraBias) -> None:
    arch, shapes = model(name)
    ours = trainable_parameters(shapes, arch, Tuning(rank=8, bias=bias))
    assert ours == trainable_by_peft(on_meta(name), "all-linear", 8, BIASES[bias])


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "qwen3-0.6b"])
def test_named_targets_are_counted_as_peft_counts_them(name: str) -> None:
    arch, shapes = model(name)
    ours = trainable_parameters(shapes, arch, Tuning(target_modules=QKVO))
    assert ours == trainable_by_peft(on_meta(name), QKVO, 16, "none")


@pytest.mark.parametrize(
    "left_out",
    [
        {"exclude_modules": ["down_proj", "layers.1.self_attn.q_proj"]},
        {"layers_to_transform": [0, 3]},
        {"exclude_modules": ["o_proj"], "layers_to_transform": [1]},
        {"layers_to_transform": [2], "dora": True},
    ],
)
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b", "gpt2"])
def test_what_is_left_out_is_not_counted_as_peft_does_not(name: str, left_out: dict[str, Any]) -> None:
    arch, shapes = model(name)
    ours = trainable_parameters(shapes, arch, Tuning(**left_out))
    every = sorted({layer.kind for layer in linear_layers(shapes, arch)})  # peft takes no all-linear for some layers
    settings = {"use_dora" if key == "dora" else key: value for key, value in left_out.items()}
    assert ours == trainable_by_peft(on_meta(name), every, 16, "none", **settings)
    assert ours < trainable_parameters(shapes, arch, Tuning()) or name == "gpt2"


@pytest.mark.parametrize(
    ("name", "targets", "expression"),
    [
        (
            "qwen3-0.6b",
            ["layers.[0-7].self_attn.?_proj", "1?.mlp.*"],
            r".*\.([0-7]\.self_attn\.._proj|1\d\.mlp\..*_proj)",
        ),
        ("gpt2", ["h.[!1]*.c_fc"], r".*h\.[^1].*\.c_fc"),
    ],
)
def test_patterns_are_counted_as_peft_counts_the_same_regular_expression(
    name: str, targets: list[str], expression: str
) -> None:
    arch, shapes = model(name)
    ours = trainable_parameters(shapes, arch, Tuning(target_modules=targets))
    assert ours == trainable_by_peft(on_meta(name), expression, 16, "none")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("qwen3-0.6b", {"layers.1.mlp.up_proj": 2, "up_proj": 4}), ("gpt2", {"mlp.c_fc": 3, "c_attn": 1})],
)
def test_ranks_of_single_layers_are_counted_as_peft_counts_them(name: str, pattern: dict[str, int]) -> None:
    arch, shapes = model(name)
    ours = trainable_parameters(shapes, arch, Tuning(rank_pattern=pattern))
    assert ours == trainable_by_peft(on_meta(name), "all-linear", 16, "none", rank_pattern=pattern)
    with pytest.raises(UnknownTarget, match="rankPattern names lm_head"):
        trainable_parameters(shapes, arch, Tuning(rank_pattern={"lm_head": 2}))


def test_modules_that_are_trained_whole_are_counted_and_planned_for() -> None:
    arch, shapes = model("llama-3-8b")
    plain, whole = (Tuning(quantized=True), Tuning(quantized=True, modules_to_save=["embed_tokens", "lm_head"]))
    extra = 2 * 128256 * 4096
    assert trainable_parameters(shapes, arch, whole) - trainable_parameters(shapes, arch, plain) == extra
    small, large, eight = (
        plan(Request(architecture=arch, shapes=shapes, tuning=tuning, optimizer=name))
        for tuning, name in ((plain, "adamw_torch"), (whole, "adamw_torch"), (whole, "adamw_8bit"))
    )
    assert large.adapter_bytes - small.adapter_bytes == 4 * extra
    assert large.optimizer_bytes - small.optimizer_bytes == 8 * extra
    assert eight.optimizer_bytes > 8 * extra // 2, "transformers keeps the state of embeddings in 32 bit"
    assert large.activation_bytes > small.activation_bytes, "hidden states are float32"
    with pytest.raises(UnknownTarget, match="modulesToSave names wte"):
        trainable_parameters(shapes, arch, Tuning(modules_to_save=["wte"]))


@pytest.mark.parametrize(("name", "modules"), [("llama-3-8b", ["embed_tokens", "lm_head"]), ("llama-3.2-1b", ["embed_tokens"]), ("gpt2", ["wte"])])  # fmt: skip
def test_rows_of_trained_tokens_are_counted_as_peft_counts_them(name: str, modules: list[str]) -> None:
    arch, shapes = model(name)
    ours = trainable_parameters(shapes, arch, Tuning(token_rows=3))
    indices = {module: [5, 6, 7] for module in modules}
    assert ours == trainable_by_peft(on_meta(name), "all-linear", 16, "none", trainable_token_indices=indices)
    assert ours - trainable_parameters(shapes, arch, Tuning()) == 3 * len(modules) * arch.hidden_size


def test_rows_of_trained_tokens_need_copies_of_the_embeddings() -> None:
    arch, shapes = model("llama-3-8b")
    plain, rows = (plan(Request(architecture=arch, shapes=shapes, tuning=Tuning(token_rows=n))) for n in (0, 2))
    copy = 2 * 128256 * 4096
    assert rows.logits_bytes - plain.logits_bytes == 2 * copy, "the head's copy and its gradient"
    assert rows.peak_evaluation_bytes - plain.peak_evaluation_bytes >= copy
    assert rows.peak_loading_bytes - plain.peak_loading_bytes == copy, "the embeddings are resized"
    assert plain.verified
    assert not rows.verified


def test_something_must_be_left_to_adapt() -> None:
    arch, shapes = model("smollm2-135m")
    with pytest.raises(UnknownTarget, match="leave no layer to adapt"):
        trainable_parameters(shapes, arch, Tuning(layers_to_transform=[30]))


def test_llama_3_8b_at_rank_16_over_the_attention_trains_13_631_488_parameters() -> None:
    arch, shapes = model("llama-3-8b")
    planned = plan(Request(architecture=arch, shapes=shapes, tuning=Tuning(target_modules=QKVO)))
    assert planned.trainable_parameters == 13_631_488


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "falcon-7b", "mixtral-8x7b", "qwen2-7b"])
def test_quantized_bytes_are_those_of_the_layers_transformers_replaces(name: str, double: bool) -> None:
    """Falcon's layers and fused experts are not replaced: they stay in 16 bit."""
    arch, shapes = model(name)
    planned = plan(Request(architecture=arch, shapes=shapes, tuning=Tuning(quantized=True, double_quantization=double)))
    base = on_meta(name)
    with torch.device("meta"):
        quantize(base, double)
    constants = sum(
        math.prod(b.shape) * b.element_size()
        for m in base.modules()
        if isinstance(m, FakeLinear4bit)
        for b in m.buffers()
    )
    assert planned.weight_bytes == sum(p.numel() * p.element_size() for p in base.parameters())
    assert planned.quantization_constant_bytes == constants


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "falcon-7b", "qwen2-7b"])
def test_8_bit_bytes_are_those_of_the_layers_transformers_replaces(name: str) -> None:
    arch, shapes = model(name)
    tuning = Tuning(quantized=True, quantization=QuantizationType.INT8)
    planned = plan(Request(architecture=arch, shapes=shapes, tuning=tuning))
    base = on_meta(name)
    with torch.device("meta"):
        quantize(base, False, eight_bit=True)
    scales = [m.scales for m in base.modules() if isinstance(m, FakeLinear8bit)]
    assert planned.weight_bytes == sum(p.numel() * p.element_size() for p in base.parameters())
    assert planned.quantization_constant_bytes == sum(s.numel() * s.element_size() for s in scales)


@pytest.mark.parametrize("double", [True, False])
def test_a_layer_that_bitsandbytes_quantized_holds_what_is_planned(double: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    from finetune_api.planner.weights import constants_bytes, packed_bytes

    layer = Linear4bit(192, 320, bias=False, quant_type="nf4", compress_statistics=double)
    layer.weight.data = torch.randn(320, 192)
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    assert packed_bytes((320, 192)) == layer.weight.numel() * layer.weight.element_size()
    assert constants_bytes((320, 192), double) == sum(
        t.numel() * t.element_size() for t in (state.absmax, state.code, *nested)
    )


def test_headers_of_a_checkpoint_give_the_same_as_the_architecture() -> None:
    """A checkpoint has one tensor an expert, buffers of old, and at times a second copy of a tied head."""
    for name, extra in (("mixtral-8x7b", {}), ("llama-3.2-1b", {"lm_head.weight": (128256, 2048)})):
        arch, shapes = model(name)
        headers: dict[str, tuple[int, ...]] = {"model.layers.0.self_attn.rotary_emb.inv_freq": (64,), **extra}
        for tensor, shape in shapes.items():
            headers |= as_published(tensor, shape)
        assert parameter_shapes(headers, arch) == shapes


def as_published(tensor: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if ".mlp.gate.weight" in tensor:
        return {tensor.replace("mlp.gate", "block_sparse_moe.gate"): shape}
    if ".experts." not in tensor:
        return {tensor: shape}
    prefix, _, kind = tensor.replace("mlp.experts", "block_sparse_moe.experts").rpartition(".")
    experts, outputs, inputs = shape
    names = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[kind]
    return {f"{prefix}.{e}.{n}.weight": (outputs // len(names), inputs) for e in range(experts) for n in names}


def test_a_target_that_matches_nothing_is_named_with_what_exists() -> None:
    arch, shapes = model("gpt2")
    with pytest.raises(
        UnknownTarget, match="q_proj is none of this model's linear layers, which are c_attn, c_fc, c_proj"
    ):
        plan(Request(architecture=arch, shapes=shapes, tuning=Tuning(target_modules=["q_proj"])))


def test_a_multimodal_configuration_is_read_by_its_text_part() -> None:
    config = {"model_type": "gemma3", "text_config": read_config("gemma-3-1b")}
    assert describe(parse_config(config)) == model("gemma-3-1b")[1]
