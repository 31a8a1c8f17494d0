"""peft's files of a LoRA adapter: names, and settings that change what the tensors mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from finetune_api.targets import is_named

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TOKENS = ".token_adapter.trainable_tokens_delta"
"""Rows of an embedding that take the place of the base's (peft's ``trainable_token_indices``)."""
PREFIX = "base_model.model."
UNCHANGED_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""peft's ``init_lora_weights`` after which an adapter means what its file says."""
UNKNOWN_SETTINGS = (
    "fan_in_fan_out", "lora_bias", "layer_replication",
    "kasa_config", "monteclora_config", "velora_config", "arrow_config", "use_bdlora", "alora_invocation_tokens", "use_qalora",
)  # fmt: skip
"""The operator sets none of them; a file that has one is refused, not misread."""
CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn|crossattention|mlp)\.(c_attn|c_fc|c_proj|q_attn)$")
"""GPT-2's layers, whose weights are stored (inputs, outputs)."""


FUSED = ("gate_up_proj", "down_proj")
"""The parameters of a layer's experts, in the order in which transformers (5.23) declares them. peft (0.21, ParamWrapper) puts one wrapper around
another in that order: the first is the innermost."""
NESTED = ".base_layer"


def expert_keys(keys: Collection[str], target_parameters: Collection[str]) -> dict[str, str]:
    """The file's keys of experts' updates, by the parameter's name and half: ``…mlp.experts.down_proj.lora_A.weight``."""
    found = {}
    for key in keys:
        for half in (LORA_A, LORA_B):
            module, depth = tensor_name(key).removesuffix(half), key.count(NESTED)
            adapted = [kind for kind in FUSED if is_named(f"{module}.{kind}", target_parameters)]
            if key.endswith(half) and adapted:
                found[f"{module}.{adapted[len(adapted) - 1 - depth]}{half}"] = key
    return found


def strange_settings(config: Mapping[str, Any], modules: Collection[str], *others: str) -> list[str]:
    """Those that are set, and ``others``; but for fan_in_fan_out, which peft sets by itself, where all layers are GPT-2's: A and B are as those
    of any layer.

    Args:
        modules: those that the adapter is on.
    """
    by_itself = {"fan_in_fan_out"} if all(CONV1D.search(module) for module in modules) else set()
    return [name for name in (*UNKNOWN_SETTINGS, *others) if config.get(name) and name not in by_itself]


def adapted_modules(keys: Collection[str]) -> list[str]:
    """The modules that a file with these keys has an update of."""
    names = [tensor_name(key) for key in keys]
    return sorted(name.removesuffix(LORA_A) for name in names if name.endswith(LORA_A))


def tensor_name(key: str) -> str:
    """A file's key in the words of the base model."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")
