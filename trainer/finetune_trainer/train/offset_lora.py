"""Matrices that begin at parts A0, B0 of the weight itself (PiSSA, OLoRA), on a base that stays as it is.

As published, the base becomes W - s·B0·A0, and A and B are trained from A0 and B0 on. Here the base is left alone, and what is trained is how
far they have come, a = A - A0 and b = B - B0, both zero at first. The update is

    s·(B·A - B0·A0) = s·(B0·a + b·(A0 + a)) = s·[B0 b]·[a; A0 + a]

so gradients and steps are the same (but for weight decay, which pulls towards A0 and B0 instead of nothing). The first loss is the base's to
the bit, nothing is the difference of two large products that were rounded to 16 bit, a quantized base stays as it was quantized, and what
is published is a plain LoRA adapter of twice the rank for the base as everybody has it. It costs A0 and B0 in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.nn import functional as F

OFFSET = "lora_offset_"
"""Begins the names of A0's and B0's holders; with "lora_" in them peft saves and loads both with the adapter, so checkpoints have them."""


class Held(nn.Module):
    """A matrix that moves, and is stored, with its layer, and is not trained."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


class OffsetLora(LoraVariant):  # type: ignore[misc]
    """peft's own way to say what a LoRA layer computes."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Nothing is moved yet from A0 and B0, which are zero until :func:`begin_at` says otherwise."""
        for name in ("A", "B"):
            weight = getattr(module, f"lora_{name}")[adapter_name].weight
            nn.init.zeros_(weight)
            module.add_module(f"{OFFSET}{name}", nn.ModuleDict({adapter_name: Held(torch.zeros_like(weight.data))}))
        module.lora_variant[adapter_name] = OffsetLora()

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """As peft's own layer of twice the rank computes it, so that what is loaded again is the same to the bit."""
        begun = [getattr(module, f"{OFFSET}{name}")[active_adapter].weight for name in ("A", "B")]
        a, b = doubled(module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight, *begun)
        update = F.linear(F.linear(module.lora_dropout[active_adapter](x), a), b) * module.scaling[active_adapter]
        total: torch.Tensor = result + update
        return total


def doubled(
    a: torch.Tensor, b: torch.Tensor, begun_a: torch.Tensor, begun_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of twice the rank."""
    return torch.cat([a, begun_a + a]), torch.cat([begun_b, b], dim=1)


def lora_layers(model: PeftModel) -> Iterator[LoraLayer]:
    """The adapted layers."""
    return (module for module in model.get_base_model().modules() if isinstance(module, LoraLayer))


def make_offset(model: PeftModel) -> None:
    """Let a fresh adapter begin at parts of the weights."""
    for module in lora_layers(model):
        OffsetLora.init(module, model.active_adapter)


def is_offset(model: PeftModel) -> bool:
    """Whether it does."""
    return any(isinstance(module.lora_variant.get(model.active_adapter), OffsetLora) for module in lora_layers(model))


def begin_at(module: LoraLayer, adapter: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Set A0 (rank, inputs) and B0 (outputs, rank)."""
    for name, value in (("A", a), ("B", b)):
        getattr(module, f"{OFFSET}{name}")[adapter].weight.copy_(value)


def plain_lora(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """What is published: configuration and tensors of a LoRA adapter that says nothing of how it began.

    Ranks and alphas are doubled, which leaves alpha / rank as it is; alpha / √rank becomes √2 times as much, which B makes good for.

    Args:
        tensors: the adapter's, as peft names them.
    """
    plain = copy.copy(config)
    plain.r, plain.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    plain.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    plain.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    found = {name: value for name, value in tensors.items() if f".{OFFSET}" not in name}
    for of_a in [name for name in found if name.endswith(".lora_A.weight")]:
        of_b = of_a.replace(".lora_A.", ".lora_B.")
        begun = [tensors[name.replace(".lora_", f".{OFFSET}")] for name in (of_a, of_b)]
        a, b = doubled(found[of_a], found[of_b], *begun)
        found[of_a], found[of_b] = a, b / math.sqrt(2) if config.use_rslora else b
    return plain, found
