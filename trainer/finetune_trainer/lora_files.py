"""peft's files of a LoRA adapter: names, and settings that change what the tensors mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "target_parameters", "kasa_config", "monteclora_config", "velora_config", "arrow_config", "use_bdlora", "alora_invocation_tokens", "use_qalora",
)  # fmt: skip
"""The operator sets none of them; a file that has one is refused, not misread."""


def strange_settings(config: Mapping[str, Any], *others: str) -> list[str]:
    """Those that are set, and ``others``."""
    return [name for name in (*UNKNOWN_SETTINGS, *others) if config.get(name)]


def tensor_name(key: str) -> str:
    """A file's key in the words of the base model."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")
