"""A frozen base in 8 bit: bitsandbytes' row-wise weights (LLM.int8(), Dettmers et al. 2022), multiplied in 16 bit as QLoRA's 4-bit ones are.

Not by bitsandbytes' own product, which is made for inference (read in 0.50.2): it rounds the inputs to 8 bit in the forward pass and
not in the backward pass, nor does a merged model; it looks for outliers in every product, for which the CPU waits for the GPU; and it keeps each
layer's input where gradient checkpointing cannot drop it. So there is no outlier threshold here: inputs are never rounded, and the weights that
training sees are those that are merged.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Linear8bitLt
from torch.nn import functional as F

LARGEST = 127.0


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8, as the weight) and scales (float32, one a row: its largest magnitude), as bitsandbytes makes them of a weight that is loaded."""
    codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    return codes, scales


def dequantized(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight in the computing type."""
    return codes.to(dtype, copy=True).mul_(scales[:, None] / LARGEST)


class Product(torch.autograd.Function):
    """x · Wᵀ with a weight that is dequantized for the time of a product, forward and backward. Nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> Any:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantized(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        codes, scales = ctx.saved_tensors
        return grad @ dequantized(codes, scales, grad.dtype), None, None, None


class Int8Linear(Linear8bitLt):  # type: ignore[misc]
    """bitsandbytes' layer as transformers loads it and peft knows it, with the product above."""

    scales: torch.Tensor
    compute_dtype: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Linear4bit does: products in the computing type, results in the input's."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        # Its data: bitsandbytes' parameter has a ``to`` of its own.
        product: torch.Tensor = Product.apply(x.to(self.compute_dtype), self.weight.data, self.scales, bias)
        return product.to(x.dtype)


def multiply_in_16_bit(model: Any, dtype: torch.dtype) -> None:
    """Make :class:`Int8Linear` of bitsandbytes' layers."""
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = Int8Linear
            module.compute_dtype = dtype
            module.register_buffer("scales", module.weight.SCB, persistent=False)
            module.state.SCB = module.scales  # where peft looks for them
