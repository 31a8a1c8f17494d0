"""A stand-in for bitsandbytes' Linear4bit: the same tensors in the same sizes, made of fakes.

The real one cannot be built from fake tensors (its quantization reads values). What it allocates was read in bitsandbytes
0.50.2: ``autograd/_functions.py`` (MatMul4Bit) and ``backends/cuda/ops.py`` (gemm_4bit: beyond a few hundred tokens the weight
is dequantized and multiplied by F.linear; in the backward pass always).
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.planner.simulator.linear8bit import FakeLinear8bit

BLOCK = 64
"""Weights that share a constant (Linear4bit's default on CUDA)."""
NESTED_BLOCK = 256
"""Constants that share a constant of theirs."""


class _MatMul4Bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FakeLinear4bit, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        return torch.matmul(grad, ctx.layer.dequantized(grad.dtype)), None, None


class FakeLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """Packed weight (two per byte), block constants, and a matrix product that dequantizes the weight for its duration."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, double: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = torch.bfloat16
        self.compute_type_is_set = True
        self.support_avx512bf16_for_cpu = False
        elements = in_features * out_features
        packed = torch.empty(((elements + 1) // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.compress_statistics = double  # type: ignore[attr-defined]
        self.weight.quant_type = "nf4"  # type: ignore[attr-defined]
        self.bias = bias
        self.double = double
        blocks = -(-elements // BLOCK)
        constants = {"code": torch.empty(16), "absmax": torch.empty(blocks)}
        if double:
            constants["absmax"] = torch.empty(blocks, dtype=torch.uint8)
            constants["nested_absmax"] = torch.empty(-(-blocks // NESTED_BLOCK))
            constants["nested_code"] = torch.empty(256)
            constants["offset"] = torch.empty(())
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in 16 bit; with double quantization the constants in float32 exist beside it."""
        constants = torch.empty(self.absmax.shape, dtype=torch.float32) if self.double else self.absmax
        weight = torch.empty((self.out_features, self.in_features), dtype=dtype)
        del constants
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As bitsandbytes' own: products in the computing type, results in the input's."""
        result: torch.Tensor = _MatMul4Bit.apply(x.to(self.compute_dtype), self, self.bias)
        return result.to(x.dtype)


def quantize(model: Any, double: bool, eight_bit: bool = False) -> None:
    """Replace what transformers replaces (integrations/bitsandbytes.py): every Linear and Conv1D but the output head."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is head or not (type(module) is nn.Linear or isinstance(module, Conv1D)):
            continue
        rows, columns = module.weight.shape
        inputs, outputs = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
        fake: nn.Module = FakeLinear4bit(inputs, outputs, module.bias, double)
        model.set_submodule(name, FakeLinear8bit(inputs, outputs, module.bias) if eight_bit else fake)
    setattr(model, "is_loaded_in_8bit" if eight_bit else "is_loaded_in_4bit", True)
