"""Activations of one decoder layer: what the forward pass keeps for the backward pass, and the most either needs besides.

Counted operator by operator over transformers 5.23's modelling code as autograd sees it on CUDA under bfloat16 autocast
(torch 2.15), with PEFT 0.21's LoRA layers on it. Frozen weights keep no input: what is kept comes from norms (float32), attention,
the activation function, and the adapters. Checked against simulated runs (docs/planner.md); all numbers are bytes per token
until the last function.
"""

from __future__ import annotations

import math

from finetune_api.base import ApiModel
from finetune_api.planner.architecture import Architecture, Family
from finetune_api.planner.linears import Linear
from finetune_api.planner.workload import Attention, Batch, Tuning

HALF, FULL, MASK = 2, 4, 1
"""bfloat16, float32, dropout's or a boolean mask: bytes."""


class LayerMemory(ApiModel):
    """Bytes for one micro-batch."""

    input_bytes: int
    """The hidden states that go in, which are all that checkpointing keeps."""
    kept_bytes: int
    """Kept from forward to backward."""
    working_bytes: int
    """The most that exists besides, at one time."""


def layer_memory(
    arch: Architecture, tuning: Tuning, batch: Batch, linears: list[Linear], targets: list[Linear], quantized: bool
) -> LayerMemory:
    """One layer's activations.

    Args:
        linears: the layer's linear layers.
        targets: those with an adapter.
        quantized: the layer's linear layers are 4 bit.
    """
    # LayerNorm gives float32, and a Linear4bit answers in its input's type: then hidden states are float32 too. So do embeddings that are
    # trained, which are float32 (unverified).
    wide_states = tuning.trains_embeddings or (quantized and arch.layer_norm)
    wide = quantized and wide_states
    attention = _attention(arch, batch, wide)
    mlp = _mlp(arch, wide)
    adapters = sum(_adapter(target, arch, tuning, quantized) for target in targets)
    if not tuning.full and not tuning.dropout and not _copies_inputs(arch, tuning, quantized):
        adapters += _shared_inputs(arch, batch, targets)
    if tuning.dora:
        adapters += sum(2 * HALF * target.outputs for target in targets)
    kept = _norms(arch, wide) + attention + mlp + adapters
    down = _last(arch, linears)
    adapted = tuning.full is None and any(t.name == down.name for t in targets)
    last = _working(down, adapted, arch, tuning, quantized)
    tokens = batch.tokens
    weight = _dequantized(down) if quantized and not arch.experts else 0
    working = max(tokens * last + weight, tokens * (_scores(arch, batch) - mlp))
    if tuning.dora:
        working += max((_dora_weights(target) for target in targets), default=0)
    return LayerMemory(
        input_bytes=tokens * (FULL if wide_states else HALF) * arch.hidden_size,
        kept_bytes=int(tokens * kept),
        working_bytes=int(working),
    )


def _dora_weights(target: Linear) -> int:
    """PEFT 0.21 makes the update as a matrix in each pass, from the identity, and the norms of its sum with the weight. Unverified, as is
    what DoRA keeps: the base's result and the adapter's."""
    return FULL * (target.inputs**2 + 3 * target.inputs * target.outputs)


def _last(arch: Architecture, linears: list[Linear]) -> Linear:
    """The MLP's second projection; of a mixture of experts, those that a token visits side by side."""
    if arch.experts:
        inputs = arch.experts_per_token * arch.intermediate_size
        return Linear(name="experts", inputs=inputs, outputs=arch.hidden_size)
    return max(linears, key=lambda layer: layer.name.endswith(("down_proj", "4h_to_h", "mlp.c_proj")))


def _norms(arch: Architecture, wide: bool) -> float:
    """A float32 copy of each norm's input; where hidden states are float32 themselves, norms of the same input share it."""
    count = 1 if wide and arch.parallel_residual else arch.norms
    heads = FULL * (arch.query_size + arch.key_value_size) if arch.head_norms else 0
    dropped = 2 * MASK * arch.hidden_size if arch.family is Family.GPT2 else 0
    return FULL * count * arch.hidden_size + heads + dropped


def _attention(arch: Architecture, batch: Batch, wide: bool) -> float:
    """Queries, keys, values, and the output with one float32 a row (FlashAttention, Dao et al. 2022), or eager's scores.

    Keys and values are copied for every query head where a mask or eager attention needs them so (repeat_kv).
    """
    eager = batch.attention_of(arch) is Attention.EAGER
    masked = batch.masked_share(arch)
    if batch.gradient_checkpointing:
        masked = math.ceil(masked)  # one layer at a time is recomputed, and the masked ones are larger
    queries, keys = HALF * arch.query_size, HALF * arch.key_value_size
    repeated = arch.family is not Family.FALCON and arch.key_value_heads != arch.heads
    copied = 1.0 if eager else masked
    each = copied * queries + (1 - copied) * keys if repeated else keys
    values = each
    if arch.family in (Family.PHI3, Family.GPT_NEOX) and not wide and not (repeated and copied == 1.0):
        values = queries + 2 * keys  # a view into the fused projection keeps all of it
    if eager:
        return queries + each + values + arch.heads * batch.sequence_tokens * _probabilities(arch)
    mask = masked * HALF * batch.sequence_tokens  # as numbers, anew in each layer
    return queries + each + values + queries + FULL * arch.heads + mask


def _probabilities(arch: Architecture) -> int:
    """Bytes kept per score: softmax's result in float32, a half-precision copy, the capped scores, dropout's mask."""
    return FULL + HALF + (HALF if arch.score_cap else 0) + (MASK if arch.attention_dropout else 0)


def _scores(arch: Architecture, batch: Batch) -> float:
    """Eager attention's gradients: of the probabilities in float32 and in half precision."""
    eager = batch.attention_of(arch) is Attention.EAGER
    return arch.heads * batch.sequence_tokens * FULL if eager else 0


def _mlp(arch: Architecture, wide: bool) -> float:
    """What the activation function and the gate's product keep."""
    size = FULL if wide else HALF
    if arch.gated:
        return 3 * HALF * arch.intermediate_size * max(1, arch.experts_per_token)
    if arch.activation == "gelu_new":  # pow in float32, tanh, 1 + tanh, and half the input
        return (3 * FULL + size) * arch.intermediate_size
    if arch.activation == "gelu_fast":
        return 7 * size * arch.intermediate_size
    return size * arch.intermediate_size


def _adapter(target: Linear, arch: Architecture, tuning: Tuning, quantized: bool) -> float:
    """A LoRA layer: its input in half precision after dropout, dropout's mask, and A's output. A trained weight: its input."""
    if tuning.full:
        return HALF * target.inputs
    inner = HALF * tuning.rank_of(target.name) * (2 if tuning.offset else 1)
    if tuning.dropout:
        return (HALF + MASK) * target.inputs + inner
    return (HALF * target.inputs if _copies_inputs(arch, tuning, quantized) else 0) + inner


def _copies_inputs(arch: Architecture, tuning: Tuning, quantized: bool) -> bool:
    """Whether each adapter without dropout keeps a copy of its input: where that is float32, or peft makes it so (for DoRA, but not on
    a quantized layer). Otherwise the input itself is kept."""
    return arch.layer_norm or (not quantized and (tuning.dora or tuning.trains_embeddings))


def _shared_inputs(arch: Architecture, batch: Batch, targets: list[Linear]) -> float:
    """Inputs that adapters without dropout keep as they are, each once however many layers read it."""
    inputs = {"mlp" if ".mlp." in t.name else "attention": t.inputs for t in targets if t.inputs == arch.hidden_size}
    total = sum(inputs.values())
    kinds = {t.kind for t in targets}
    if "down_proj" in kinds:
        total += arch.intermediate_size
    if "o_proj" in kinds and batch.attention_of(arch) is Attention.EAGER:
        total += arch.query_size
    return HALF * total


def _working(last: Linear, adapted: bool, arch: Architecture, tuning: Tuning, quantized: bool) -> float:
    """Beside what is kept, at the layer's last and widest product: forward and backward meet here with all else still kept."""
    inputs, outputs = last.inputs, last.outputs
    if not adapted:
        return HALF * (2 * inputs + 2 * outputs)
    if quantized:
        wide = arch.layer_norm
        return (2 * FULL if wide else HALF) * inputs + (FULL if wide else HALF) * 2 * outputs
    # the input; for dropout and DoRA its float32 copy; the same after dropout; the base's result and the incoming gradient
    copy = FULL if tuning.dropout or tuning.dora else 0
    own = FULL if arch.activation == "gelu_new" else HALF + copy
    return (own + (FULL if tuning.dropout else 0)) * inputs + HALF * 2 * outputs


def _dequantized(last: Linear) -> int:
    """A 4-bit weight in half precision for the time of a product, its constants in float32 beside it."""
    return last.inputs * last.outputs * HALF


def evaluation_working(arch: Architecture, batch: Batch, quantized: bool, mlp_adapted: bool) -> float:
    """Bytes per token of a layer's forward pass without gradients: hidden states held by name, and the MLP or eager attention's
    scores at their widest, with keys and values for every query head."""
    held = (4 if quantized and arch.gated else 6) * HALF * arch.hidden_size
    scores = 0
    if batch.attention_of(arch) is Attention.EAGER:
        # softmax's float32 result beside its input, and beside a copy in the values' type
        copy = FULL if quantized and arch.layer_norm else HALF
        each = {Family.GPT2: FULL + copy, Family.FALCON: 3 * FULL}.get(arch.family, FULL + 2 * HALF)
        scores = each * arch.heads * batch.sequence_tokens + 2 * HALF * arch.query_size
    return held + max(evaluation_mlp(arch, quantized, mlp_adapted), scores)


def evaluation_mlp(arch: Architecture, quantized: bool, mlp_adapted: bool) -> float:
    """Of a gated MLP without adapters: gate, up projection and their product; with them: the activated gate, the up projection, its adapter's part and their sum; of a fused one (Phi-3) the
    projection, its adapter's part and their sum, all twice as wide. Of others: the adapter's input
    in both types, or gelu_new's float32 intermediates. Float32 hidden states take more."""
    wide = quantized and arch.layer_norm
    if arch.gated:
        widest = 6 if arch.family is Family.PHI3 else 4
        return (widest if mlp_adapted else 3) * HALF * arch.intermediate_size
    if arch.activation in ("gelu_new", "gelu_fast"):
        return (4 * FULL + 1 if wide else 3 * FULL) * arch.intermediate_size
    return (2 * FULL + HALF if wide else FULL + 2 * HALF) * arch.intermediate_size
