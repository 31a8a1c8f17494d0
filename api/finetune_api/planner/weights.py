"""Bytes of the frozen base, of the adapter, and of what its training keeps."""

from __future__ import annotations

import math

from finetune_api.planner.architecture import Architecture, Family
from finetune_api.planner.linears import adapted_experts, linear_layers, quantized_layers
from finetune_api.planner.tensors import EMBEDDING, Shapes, parameters
from finetune_api.planner.workload import Tuning
from finetune_api.targets import is_named

HALF = 2
FULL = 4
BLOCK = 64
"""Weights that share a constant (bitsandbytes' Linear4bit on CUDA; Dettmers et al. 2023, section 3)."""
NESTED_BLOCK = 256
"""Constants that share one, with double quantization."""
CODE_BYTES = 16 * FULL
"""The 16 values of the 4-bit type, kept with each layer."""
NESTED_CODE_BYTES = 256 * FULL + FULL
"""The 256 values of the constants' 8-bit type and their offset, kept with each layer."""

MOMENTS = {
    # one (Chen et al. 2023)
    "lion_32bit": 1,
    "lion_8bit": 1,
    "paged_lion_32bit": 1,
    "paged_lion_8bit": 1,
    # a fast and a slow one, and the squares (Pagliardini et al. 2024)
    "ademamix": 3,
    "ademamix_8bit": 3,
    "paged_ademamix_32bit": 3,
    "paged_ademamix_8bit": 3,
    # the squares
    "adagrad": 1,
    "rmsprop": 1,
    "rmsprop_bnb": 1,
    "rmsprop_bnb_8bit": 1,
    "rmsprop_bnb_32bit": 1,
    # the steps without the average (Defazio et al. 2024); with AdamW and RAdam the squares, too
    "schedule_free_sgd": 1,
    "sgd": 0,
}
"""Values that an optimizer keeps of each trained weight, where they are not two as with AdamW (Loshchilov and Hutter 2019): float32, or 8 bit and a
float32 per 256 of them (Dettmers et al. 2022, block-wise quantization). Adafactor's are fewer. Paged ones can move to host memory under
pressure; they are counted on the GPU all the same."""


def packed_bytes(shape: tuple[int, ...]) -> int:
    """A 4-bit weight: two values a byte."""
    return (math.prod(shape) + 1) // 2


def constants_bytes(shape: tuple[int, ...], double: bool) -> int:
    """The block constants of one 4-bit weight: float32, or with double quantization 8 bit and a float32 for 256 of them."""
    blocks = math.ceil(math.prod(shape) / BLOCK)
    if not double:
        return blocks * FULL + CODE_BYTES
    return blocks + math.ceil(blocks / NESTED_BLOCK) * FULL + CODE_BYTES + NESTED_CODE_BYTES


def row_scale_bytes(shape: tuple[int, ...], arch: Architecture) -> int:
    """The constants of one 8-bit weight: float32 for each output. GPT-2's layers are stored the other way round, and turned."""
    return FULL * (shape[1] if arch.family is Family.GPT2 else shape[0])


def quantized_names(shapes: Shapes, arch: Architecture, tuning: Tuning) -> set[str]:
    """Names of the tensors that are held in 4 or 8 bit."""
    if not tuning.quantized:
        return set()
    return {f"{layer.name}.weight" for layer in quantized_layers(linear_layers(shapes, arch), arch)}


def tensor_bytes(shapes: Shapes, quantized: set[str], tuning: Tuning) -> dict[str, int]:
    """Bytes of each tensor on the GPU: 16 bit (the trainer loads in bfloat16 or float16), 8 bit, or packed."""
    held = math.prod if tuning.eight_bit else packed_bytes
    return {name: held(shape) if name in quantized else HALF * math.prod(shape) for name, shape in shapes.items()}


def quantization_bytes(shapes: Shapes, quantized: set[str], tuning: Tuning, arch: Architecture) -> dict[str, int]:
    """Constants of each quantized weight."""
    return {
        name: row_scale_bytes(shape, arch) if tuning.eight_bit else constants_bytes(shape, tuning.double_quantization)
        for name, shape in shapes.items()
        if name in quantized
    }


def checkpoint_bytes(shapes: Shapes) -> int:
    """The model's files in 16 bit, as most are published: a safetensors file is its header, which is too small to show, and the numbers side by
    side (safetensors' format). A model that is published in float32 takes twice that."""
    return HALF * parameters(shapes)


def optimizer_bytes(name: str, trainable: int, embedding: int = 0) -> int:
    """State of the optimizer; one that is not in the table is taken for AdamW.

    Args:
        embedding: how many of the trainable weights are input embeddings, whose state transformers keeps in 32 bit.
    """
    each = 1 + FULL / NESTED_BLOCK if "8bit" in name else FULL
    return int(MOMENTS.get(name, 2) * (each * (trainable - embedding) + FULL * embedding))


def token_copy_bytes(arch: Architecture, tuning: Tuning) -> int:
    """A copy of the embeddings with the trained tokens' rows put in, which peft makes in each forward pass, of the head too (0.21:
    TrainableTokensLayer.get_merged_weights)."""
    return HALF * arch.vocabulary_size * arch.hidden_size if tuning.token_rows else 0


def expert_copies(shapes: Shapes, tuning: Tuning) -> tuple[int, int]:
    """Bytes of the adapted experts' copies with their updates added, which peft makes for each forward pass (0.21, ParamWrapper): of the layer that
    has the most, and of all layers."""
    layers: dict[str, int] = {}
    for name, shape in adapted_experts(shapes, tuning).items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + HALF * math.prod(shape)
    return max(layers.values(), default=0), sum(layers.values())


def trained_embedding(shapes: Shapes, tuning: Tuning) -> int:
    """Weights of input embeddings that are trained whole."""
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if EMBEDDING.search(name) and is_named(name.removesuffix(".weight"), tuning.modules_to_save)
    )
