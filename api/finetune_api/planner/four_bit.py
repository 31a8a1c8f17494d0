"""How much of a model QLoRA holds in 4 bit: bitsandbytes takes plain linear layers only."""

from __future__ import annotations

import math

from finetune_api.planner.architecture import Architecture
from finetune_api.planner.from_spec import Unsuitable
from finetune_api.planner.linears import linear_layers, quantized_layers
from finetune_api.planner.tensors import EMBEDDING, HEAD, Shapes
from finetune_api.spec import MethodType

WORTH_TELLING = 0.1
"""Of the layers' weights."""


def left_in_16_bit(method: MethodType, arch: Architecture, shapes: Shapes, uri: str) -> str | None:
    """A warning, where that is much. (Embeddings and head always are.)

    Args:
        shapes: of every parameter.

    Raises:
        Unsuitable: QLoRA, where it is all.
    """
    if method in (MethodType.LORA, MethodType.FULL):
        return None
    of_layers = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) > 1 and not EMBEDDING.search(name) and not HEAD.search(name)
    )
    packed = sum(layer.inputs * layer.outputs for layer in quantized_layers(linear_layers(shapes, arch), arch))
    if packed >= (1 - WORTH_TELLING) * of_layers:
        return None
    if packed == 0 and method is MethodType.QLORA:
        raise Unsuitable(
            f"method.type: QLoRA would leave all of {uri} in 16 bit: its layers are of a class of their own, which bitsandbytes does not "
            "quantize. Use type: LoRA."
        )
    share = f"{1 - packed / of_layers:.0%} of its layers' weights"
    return f"QLoRA leaves {share} in 16 bit: bitsandbytes quantizes plain linear layers only, and no fused experts"
