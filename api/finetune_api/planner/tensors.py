"""A model's tensors by name and shape: from safetensors headers, or from its architecture alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from finetune_api.planner.architecture import Architecture, Family

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

BUFFER = re.compile(r"(rotary_emb\.inv_freq|\.attn\.masked_bias|\.attn\.bias|\.attention\.(masked_)?bias)$")
"""Old checkpoints hold these; transformers makes them anew."""
EMBEDDING = re.compile(r"(^|\.)(wte|wpe|[a-z_]*embed[a-z_]*)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.([a-z0-9_]+)\.weight$")
UP_NAMES = ("w1", "w3", "gate_proj", "up_proj")


def parameter_shapes(headers: Mapping[str, Shape], arch: Architecture) -> Shapes:
    """The parameters that transformers makes of a checkpoint's tensors: no buffers, no second copy of a tied head, and
    experts fused into one parameter each for up (with gate) and down projections (transformers 5, core_model_loading).

    Args:
        headers: name → shape of every tensor in the files.
    """
    shapes: Shapes = {}
    for name, shape in headers.items():
        if BUFFER.search(name) or EXPERT.match(name) or (arch.tied_embeddings and HEAD.search(name)):
            continue
        shapes[parameter_name(name)] = shape
    return shapes | fused_experts(headers)


def fused_experts(headers: Mapping[str, Shape]) -> Shapes:
    """The parameters that are made of each expert's tensors: (experts, outputs, inputs)."""
    experts: dict[tuple[str, str], list[Shape]] = {}
    for name, shape in headers.items():
        if found := EXPERT.match(name):
            kind = "gate_up_proj" if found[3] in UP_NAMES else "down_proj"
            experts.setdefault((found[1].replace("block_sparse_moe", "mlp"), kind), []).append(shape)
    shapes: Shapes = {}
    for (module, kind), parts in experts.items():
        fused = 2 if kind == "gate_up_proj" else 1
        shapes[f"{module}.{kind}"] = (len(parts) // fused, fused * parts[0][0], parts[0][1])
    return shapes


def parameter_name(name: str) -> str:
    """The parameter's name where transformers 5 has another one than the checkpoint."""
    return name.replace("block_sparse_moe.gate", "mlp.gate").replace("embed_out.weight", "lm_head.weight")


def describe(arch: Architecture) -> Shapes:
    """The same from the architecture alone, as transformers 5.23 names and shapes them."""
    shapes = dict(_outside(arch))
    prefix = {Family.FALCON: "transformer.h", Family.GPT2: "transformer.h", Family.GPT_NEOX: "gpt_neox.layers"}
    for layer in range(arch.layers):
        for name, shape in _layer(arch):
            shapes[f"{prefix.get(arch.family, 'model.layers')}.{layer}.{name}"] = shape
    return shapes


def parameters(shapes: Shapes) -> int:
    """How many numbers."""
    return sum(math.prod(shape) for shape in shapes.values())


def _outside(arch: Architecture) -> Iterator[tuple[str, Shape]]:
    hidden, vocabulary = arch.hidden_size, arch.vocabulary_size
    if arch.family is Family.GPT2:
        yield "transformer.wte.weight", (vocabulary, hidden)
        yield "transformer.wpe.weight", (arch.positions, hidden)
        yield from _norm("transformer.ln_f", hidden, arch)
    elif arch.family is Family.FALCON:
        yield "transformer.word_embeddings.weight", (vocabulary, hidden)
        yield from _norm("transformer.ln_f", hidden, arch)
    elif arch.family is Family.GPT_NEOX:
        yield "gpt_neox.embed_in.weight", (vocabulary, hidden)
        yield from _norm("gpt_neox.final_layer_norm", hidden, arch)
    else:
        yield "model.embed_tokens.weight", (vocabulary, hidden)
        yield from _norm("model.norm", hidden, arch)
    if not arch.tied_embeddings:
        yield "lm_head.weight", (vocabulary, hidden)


def _norm(name: str, size: int, arch: Architecture) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    if arch.layer_norm:
        yield f"{name}.bias", (size,)


def _linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _layer(arch: Architecture) -> Iterator[tuple[str, Shape]]:
    if arch.family is Family.GPT2:
        yield from _gpt2_layer(arch)
    elif arch.family is Family.FALCON:
        yield from _fused_layer(arch, "self_attention", bias=False)
    elif arch.family is Family.GPT_NEOX:
        yield from _fused_layer(arch, "attention", bias=arch.attention_bias)
    else:
        yield from _decoder_layer(arch)


def _gpt2_layer(arch: Architecture) -> Iterator[tuple[str, Shape]]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    for norm in ("ln_1", "ln_2"):
        yield from _norm(norm, hidden, arch)
    # Conv1D: the weight is (inputs, outputs)
    for name, inputs, outputs in (
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, inner),
        ("mlp.c_proj", inner, hidden),
    ):
        yield f"{name}.weight", (inputs, outputs)
        yield f"{name}.bias", (outputs,)


def _fused_layer(arch: Architecture, attention: str, bias: bool) -> Iterator[tuple[str, Shape]]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    yield from _norm("input_layernorm", hidden, arch)
    if arch.family is Family.GPT_NEOX:
        yield from _norm("post_attention_layernorm", hidden, arch)
    yield from _linear(f"{attention}.query_key_value", hidden, arch.query_size + 2 * arch.key_value_size, bias)
    yield from _linear(f"{attention}.dense", arch.query_size, hidden, bias)
    yield from _linear("mlp.dense_h_to_4h", hidden, inner, arch.family is Family.GPT_NEOX)
    yield from _linear("mlp.dense_4h_to_h", inner, hidden, arch.family is Family.GPT_NEOX)


def _decoder_layer(arch: Architecture) -> Iterator[tuple[str, Shape]]:
    hidden, inner, queries, keys = arch.hidden_size, arch.intermediate_size, arch.query_size, arch.key_value_size
    qkv_bias = arch.attention_bias or arch.family is Family.QWEN2
    if arch.family is Family.PHI3:
        yield from _linear("self_attn.qkv_proj", hidden, queries + 2 * keys)
    else:
        yield from _linear("self_attn.q_proj", hidden, queries, qkv_bias)
        yield from _linear("self_attn.k_proj", hidden, keys, qkv_bias)
        yield from _linear("self_attn.v_proj", hidden, keys, qkv_bias)
    yield from _linear("self_attn.o_proj", queries, hidden, arch.attention_bias)
    if arch.head_norms:
        yield "self_attn.q_norm.weight", (arch.head_dim,)
        yield "self_attn.k_norm.weight", (arch.head_dim,)
    if arch.experts:
        yield "mlp.gate.weight", (arch.experts, hidden)
        yield "mlp.experts.gate_up_proj", (arch.experts, 2 * inner, hidden)
        yield "mlp.experts.down_proj", (arch.experts, hidden, inner)
    elif arch.family is Family.PHI3:
        yield from _linear("mlp.gate_up_proj", hidden, 2 * inner)
        yield from _linear("mlp.down_proj", inner, hidden)
    else:
        yield from _linear("mlp.gate_proj", hidden, inner)
        yield from _linear("mlp.up_proj", hidden, inner)
        yield from _linear("mlp.down_proj", inner, hidden)
    names = ["input_layernorm", "post_attention_layernorm"]
    if arch.norms == 4:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in names:
        yield from _norm(name, hidden, arch)
