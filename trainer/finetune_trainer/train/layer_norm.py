"""Layer norms on a CPU, where what is trained of a 16-bit model is float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import layer_norm


class AnyTypeLayerNorm(torch.nn.LayerNorm):
    """In float32, where input, weight and bias are not of one type: then torch 2.15 refuses them on a CPU.

    CUDA's autocast computes every layer norm so (torch/aten/src/ATen/autocast_mode.h, the operations that autocast to float32); a CPU's
    autocast leaves them alone. Types are mixed after embeddings that are trained, and with biases that are.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape (..., normalized_shape); of the input's type, or float32."""
        if len({t.dtype for t in (input, self.weight, self.bias) if t is not None}) == 1:
            return super().forward(input)
        weight, bias = (t.float() if t is not None else None for t in (self.weight, self.bias))
        return layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


def let_layer_norms_take_any_type(model: Any) -> None:
    """Of a model on a CPU. Their class is changed, so that copies of them are such too."""
    for module in model.modules():
        if type(module) is torch.nn.LayerNorm:
            module.__class__ = AnyTypeLayerNorm
