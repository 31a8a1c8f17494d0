"""The 8-bit layer made of fakes: the real product (finetune_trainer.train.int8) on tensors of the same sizes.

Loading is what cannot be done with fakes: quantization reads values.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn

from finetune_trainer.train.int8 import Int8Linear


class FakeLinear8bit(Int8Linear):
    """One byte a weight, and a scale for each row."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = torch.bfloat16
        self.state, self.index = bnb.MatmulLtState(), None
        self.state.has_fp16_weights = False
        self.weight = nn.Parameter(torch.empty((out_features, in_features), dtype=torch.int8), requires_grad=False)
        self.bias = bias
        self.register_buffer("scales", torch.empty(out_features), persistent=False)
