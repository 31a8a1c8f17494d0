"""A tiny Llama folder as the Hub has them: config, tokenizer with chat template, safetensors with real names and shapes.

Small enough to train in seconds on a CPU, and built without torch, so that tests of the prepare stage may use it too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 400
HIDDEN = 64
INTERMEDIATE = 128
LAYERS = 2
HEADS = 4
KV_HEADS = 2
MAX_POSITIONS = 2048
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "You are a helpful assistant. Please answer the question in one sentence, and say so if you do not know.",
    "system user assistant 0 1 2 3 4 5 6 7 8 9 kubectl get pods -n default; apiVersion: v1, kind: Pod, metadata: name",
]


def build_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    chat_template: str | None = CHATML,
    tied: bool = False,
    shards: int = 1,
    layers: int = LAYERS,
) -> Path:
    """Write the model to ``folder`` and return it. The same arguments give the same bytes.

    ``tied`` leaves out ``lm_head`` (as models with tied embeddings do); ``shards`` > 1 writes shards and an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, chat_template)
    write_json(folder / "config.json", config(tied, layers))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    write_weights(folder, weights(seed, tied, layers), shards)
    return folder


def config(tied: bool = False, layers: int = LAYERS) -> dict[str, object]:
    """``config.json`` of a Llama with grouped-query attention."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def weights(seed: int = 0, tied: bool = False, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """All tensors, fp32. Larger than an untrained model's, so that outputs differ clearly from row to row."""
    random = np.random.default_rng(seed)

    def matrix(out: int, inp: int) -> np.ndarray:
        return random.normal(0, 0.6 / np.sqrt(inp), (out, inp)).astype(np.float32)

    key_value = HIDDEN // HEADS * KV_HEADS
    tensors: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": random.normal(0, 0.3, (VOCABULARY, HIDDEN)).astype(np.float32)
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{layer}.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{layer}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": matrix(key_value, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": matrix(key_value, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    if not tied:
        tensors["lm_head.weight"] = matrix(VOCABULARY, HIDDEN)
    return tensors


def write_weights(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """One file, or shards with an index, named as transformers names them."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_tokenizer(folder: Path, chat_template: str | None = CHATML) -> None:
    """A byte-level BPE tokenizer (any text round-trips), EOS ``<|im_end|>``, pad ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_settings(chat_template))


def tokenizer_settings(chat_template: str | None) -> dict[str, object]:
    """``tokenizer_config.json``."""
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    return settings


def write_json(path: Path, value: object) -> None:
    """Indented, as the Hub has it."""
    path.write_text(json.dumps(value, indent=2) + "\n")
