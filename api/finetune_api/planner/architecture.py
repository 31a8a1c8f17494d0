"""What a model's config.json says of its shape, in one vocabulary for all families."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from finetune_api.base import ApiModel


class Family(StrEnum):
    """Families whose layers are known tensor by tensor. Others are planned as LLAMA, which most newer decoders resemble."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    MIXTRAL = "mixtral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    QWEN3_MOE = "qwen3_moe"
    GEMMA2 = "gemma2"
    GEMMA3 = "gemma3_text"
    PHI3 = "phi3"
    FALCON = "falcon"
    GPT2 = "gpt2"
    GPT_NEOX = "gpt_neox"


LAYER_NORM = (Family.FALCON, Family.GPT2, Family.GPT_NEOX)
FOUR_NORMS = (Family.GEMMA2, Family.GEMMA3)
GEMMA = FOUR_NORMS
HEAD_NORMS = (Family.QWEN3, Family.QWEN3_MOE, Family.GEMMA3)
LOGIT_SETTINGS = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Settings by which models change their logits after the head (transformers 5.23): then the loss needs them all at once."""
SOFTCAP = "final_logit_softcapping"
"""Another one, whose meaning is the same in all models that have it (cap · tanh(logits / cap), Gemma above all, with its
vocabulary of 256k): the loss does it itself, on chunks."""


class UnknownArchitecture(ValueError):
    """config.json lacks what a plan needs."""


class Architecture(ApiModel):
    """Sizes of a decoder. Counts are per layer where a layer has them."""

    family: Family
    known: bool
    """False: the family is none of the list, or a variant of one: activations are an estimate, and shapes need headers."""
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary_size: int
    positions: int = 0
    """Rows of a learned position embedding (GPT-2)."""
    tied_embeddings: bool
    attention_bias: bool = False
    gated: bool = True
    """The MLP has a gate beside its up projection."""
    activation: str = "silu"
    sliding_layers: int = 0
    """Layers that look back no further than ``sliding_window`` tokens."""
    sliding_window: int | None = None
    """Rows at least this long get an explicit mask in the layers that look back no further."""
    score_cap: bool = False
    """Attention scores are capped, which only eager attention can do."""
    attention_dropout: float = 0.0
    logits_changed: bool = False
    """The loss needs all logits at once."""
    logits_capped: bool = False
    """cap · tanh(logits / cap), a chunk at a time."""
    experts: int = 0
    experts_per_token: int = 0
    parallel_residual: bool = False

    @property
    def compared(self) -> bool:
        """Plans of this family were compared with simulated runs (docs/planner.md); those of others are estimates."""
        return self.known and not self.experts

    @property
    def layer_norm(self) -> bool:
        """LayerNorm, whose output is float32 under autocast; otherwise RMSNorm."""
        return self.family in LAYER_NORM

    @property
    def norms(self) -> int:
        """Norms over the hidden size in a layer."""
        if self.family in FOUR_NORMS:
            return 4
        return 1 if self.family is Family.FALCON else 2

    @property
    def head_norms(self) -> bool:
        """Queries and keys are normalised per head."""
        return self.family in HEAD_NORMS

    @property
    def query_size(self) -> int:
        """All query heads side by side."""
        return self.heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """All key heads side by side; the values' the same."""
        return self.key_value_heads * self.head_dim


def parse_config(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json.

    Missing values are the defaults of transformers' configuration classes (5.23), which leave them out of the file.

    Raises:
        UnknownArchitecture: without the sizes of layers and heads.
    """
    text = config.get("text_config")
    values: Mapping[str, Any] = {**config, **text} if isinstance(text, Mapping) else config
    name = str(values.get("model_type", ""))
    family = next((f for f in Family if name in (f.value, f.value.removesuffix("_text"))), None)
    hidden = _integer(values, "hidden_size", "n_embd", "d_model")
    heads = _integer(values, "num_attention_heads", "n_head", "n_heads")
    known = family or Family.LLAMA
    return Architecture(
        family=known,
        known=family is not None and not _variant(values, known) and text is None,
        layers=_integer(values, "num_hidden_layers", "n_layer", "n_layers"),
        hidden_size=hidden,
        intermediate_size=_intermediate(values, known, hidden),
        heads=heads,
        key_value_heads=_key_value_heads(values, known, heads),
        head_dim=_head_dim(values, known, hidden, heads),
        vocabulary_size=_integer(values, "vocab_size"),
        positions=_integer(values, "n_positions") if known is Family.GPT2 else 0,
        tied_embeddings=bool(values.get("tie_word_embeddings", known in (*GEMMA, Family.GPT2, Family.FALCON))),
        attention_bias=bool(values.get("attention_bias", known is Family.GPT_NEOX)),
        gated=known not in LAYER_NORM,
        activation=_activation(values, known),
        sliding_window=_window(values, known),
        sliding_layers=_sliding_layers(values, known),
        score_cap=values.get("attn_logit_softcapping", 50.0 if known is Family.GEMMA2 else None) is not None,
        attention_dropout=float(
            values.get("attn_pdrop", 0.1) if known is Family.GPT2 else values.get("attention_dropout", 0.0)
        ),
        logits_changed=any(values.get(setting) not in (None, 1.0) for setting in LOGIT_SETTINGS),
        logits_capped=values.get(SOFTCAP, 30.0 if known is Family.GEMMA2 else None) is not None,
        experts=int(values.get("num_local_experts") or values.get("num_experts") or 0),
        experts_per_token=int(values.get("num_experts_per_tok") or 0),
        parallel_residual=known is Family.FALCON
        or (known is Family.GPT_NEOX and values.get("use_parallel_residual", True)),
    )


def _variant(values: Mapping[str, Any], family: Family) -> bool:
    """Whether the layers differ from those the family is known by: Falcon 40B's and RW's, biases in the MLP, and dense layers between those of
    experts."""
    falcon = values.get("new_decoder_architecture") or values.get("alibi") or not values.get("parallel_attn", True)
    dense = values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1
    return bool(
        (family is Family.FALCON and falcon) or (family is Family.QWEN3_MOE and dense) or values.get("mlp_bias")
    )


def _integer(values: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(values.get(name), int):
            return int(values[name])
    raise UnknownArchitecture(f"config.json has none of {', '.join(names)}: expected a decoder's sizes")


def _intermediate(values: Mapping[str, Any], family: Family, hidden: int) -> int:
    if family is Family.FALCON:
        return int(values.get("ffn_hidden_size") or 4 * hidden)
    if family is Family.GPT2:
        return int(values.get("n_inner") or 4 * hidden)
    if family is Family.QWEN3_MOE:
        return _integer(values, "moe_intermediate_size")
    return _integer(values, "intermediate_size")


def _key_value_heads(values: Mapping[str, Any], family: Family, heads: int) -> int:
    if family is Family.FALCON:
        if values.get("new_decoder_architecture", False):
            return int(values.get("num_kv_heads") or heads)
        return 1 if values.get("multi_query", True) else heads
    if family in (Family.GPT2, Family.GPT_NEOX):
        return heads
    return int(values.get("num_key_value_heads") or heads)


def _head_dim(values: Mapping[str, Any], family: Family, hidden: int, heads: int) -> int:
    default = 256 if family in GEMMA else (128 if family is Family.QWEN3 else hidden // heads)
    return int(values.get("head_dim") or default)


def _activation(values: Mapping[str, Any], family: Family) -> str:
    default = {Family.GPT2: "gelu_new", Family.GPT_NEOX: "gelu", Family.FALCON: "gelu"}.get(family, "silu")
    names = ("activation_function", "hidden_activation", "hidden_act", "activation")
    return str(next((values[n] for n in names if values.get(n)), default))


def _window(values: Mapping[str, Any], family: Family) -> int | None:
    window = values.get("sliding_window")
    if not isinstance(window, int) or (
        family in (Family.QWEN2, Family.QWEN3, Family.QWEN3_MOE) and not values.get("use_sliding_window")
    ):
        return None
    return window


def _sliding_layers(values: Mapping[str, Any], family: Family) -> int:
    layers = _integer(values, "num_hidden_layers", "n_layer", "n_layers")
    if _window(values, family) is None:
        return 0
    if isinstance(values.get("layer_types"), list):
        return sum(kind == "sliding_attention" for kind in values["layer_types"])
    if family is Family.GEMMA2:
        return (layers + 1) // 2
    if family is Family.GEMMA3:
        pattern = int(values.get("sliding_window_pattern") or 6)
        return layers - layers // pattern
    return layers
