"""What vLLM, TGI and Ollama read of a model's folder: the Hub's layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_trainer.publish.safetensors_stream import Checkpoint

ADAPTERS = "lora|base_layer|modules_to_save|absmax|quant"


def check_model_folder(folder: Path, dtype: str) -> dict[str, Any]:
    """Its configuration. A causal model's architecture and type, its end token, shards under the Hub's names and of torch's format, without
    anything of an adapter or a quantization, and a tokenizer."""
    config, generation = (json.loads((folder / f).read_text()) for f in ("config.json", "generation_config.json"))
    assert config["architectures"] == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    assert "quantization_config" not in config
    assert generation["eos_token_id"] is not None
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    count = len(shards)
    assert shards in (["model.safetensors"], [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)])
    assert (folder / "model.safetensors.index.json").exists() == (shards != ["model.safetensors"])
    for shard in shards:
        with safe_open(folder / shard, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    tensors = Checkpoint(folder).tensors
    assert not [name for name in tensors if re.search(ADAPTERS, name)]
    rows = [
        info.shape[0]
        for name, info in tensors.items()
        if re.search(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight$", name)
    ]
    assert rows == [config["vocab_size"]]
    check_tokenizer(folder)
    return dict(config)


def check_tokenizer(folder: Path) -> None:
    """A fast one, with a chat template and an end token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (folder / "tokenizer.json").exists()
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id is not None
