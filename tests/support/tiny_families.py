"""Tiny models of other families than Llama: their configurations and weights by transformers, with the names that their files have on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_model import MAX_POSITIONS, VOCABULARY, write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
}
TIED = ("gpt2", "gemma2", "gemma3_text", "falcon")


def build_tiny_family(folder: Path, family: str, **settings: Any) -> Path:
    """Write the model to ``folder`` and return it; weights are large enough that outputs differ from row to row."""
    config = AutoConfig.for_model(
        family, **{**SIZES, "tie_word_embeddings": family in TIED, **OWN.get(family, {}), **settings}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
