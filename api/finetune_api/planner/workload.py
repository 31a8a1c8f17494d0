"""What is planned for: the method, the batch, the optimizer, the GPUs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.planner.architecture import Architecture
from finetune_api.planner.tensors import EMBEDDING
from finetune_api.spec import Full, LoraBias, QuantizationType
from finetune_api.targets import setting_of

Count = Annotated[int, Field(ge=1)]


class Attention(StrEnum):
    """transformers' ``attn_implementation``."""

    SDPA = "sdpa"
    EAGER = "eager"


class Tuning(ApiModel):
    """LoRA, QLoRA where ``quantized`` is set, or the model's own weights where ``full`` is."""

    rank: Count = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    bias: LoraBias = LoraBias.NONE
    target_modules: list[str] = ["all-linear"]
    target_parameters: list[str] = []
    """Of fused experts."""
    exclude_modules: list[str] = []
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = {}
    """Ranks of single layers; the most specific name counts."""
    modules_to_save: list[str] = []
    token_rows: Annotated[int, Field(ge=0)] = 0
    """Tokens whose rows of the embeddings, and of the head where that stands apart, are trained."""
    dora: bool = False
    offset: bool = False
    """PiSSA, OLoRA: as many weights as the matrices have are held beside them, frozen, and products are of twice the rank."""
    quantized: bool = False
    quantization: QuantizationType = QuantizationType.NF4
    """Where it is."""
    double_quantization: bool = True
    """Of 4-bit types."""
    full: Full | None = None
    galore_rank: Annotated[int, Field(ge=1)] | None = None

    def rank_of(self, layer: str) -> int:
        """The rank of one layer's adapter."""
        return setting_of(layer, self.rank_pattern, self.rank)

    @property
    def trains_embeddings(self) -> bool:
        """Whether the input embeddings are trained whole."""
        if self.full is not None and self.full.spectrum is None:
            return self.full.modules is None or any(EMBEDDING.search(f"{m}.weight") for m in self.full.modules)
        return any(EMBEDDING.search(f"{module}.weight") for module in self.modules_to_save)

    @property
    def eight_bit(self) -> bool:
        """Whether a quantized base is held in 8 bit."""
        return self.quantization is QuantizationType.INT8

    @property
    def name(self) -> str:
        """As a person says it."""
        if self.full is not None:
            part = self.full.spectrum
            return "Full" + (
                f" (Spectrum {part.fraction:g})" if part else " (some modules)" if self.full.modules else ""
            )
        bits = " in 8 bit" if self.eight_bit else ""
        return (f"QLoRA{bits}" if self.quantized else "LoRA") + (" with DoRA" if self.dora else "")


class Batch(ApiModel):
    """One forward and backward pass on one GPU."""

    sequence_tokens: Count = 2048
    micro_batch_sequences: Count = 1
    gradient_checkpointing: bool = True
    attention: Attention = Attention.SDPA
    packed: bool = False
    """Several rows share a sequence."""

    @property
    def tokens(self) -> int:
        """Padding included: every row as long as the longest allowed."""
        return self.sequence_tokens * self.micro_batch_sequences

    @property
    def padded(self) -> bool:
        """Rows of unlike length share a batch, or a sequence, so attention needs a mask."""
        return self.micro_batch_sequences > 1 or self.packed

    def attention_of(self, arch: Architecture) -> Attention:
        """What transformers will run: models that cap their scores have no sdpa."""
        return Attention.EAGER if arch.score_cap else self.attention

    def masked_share(self, arch: Architecture) -> float:
        """The share of layers whose attention gets an explicit mask under sdpa (masking_utils, _ignore_causal_mask_sdpa)."""
        if self.padded:
            return 1.0
        if arch.sliding_window is None or self.sequence_tokens < arch.sliding_window:
            return 0.0
        return arch.sliding_layers / arch.layers
