"""``spec.method``: how the model is adapted."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import (
    MODULE_KEYS,
    Alpha,
    AlphaMap,
    ModuleName,
    ModulePattern,
    Rank,
    RankMap,
    TokenText,
    cel,
)

_ONE_CHOICE = "method.full takes spectrum or modules: leave one of them out"
LayerIndex = Annotated[int, Field(ge=0, le=9999)]
MOST_MODULES = 64
"""Names in a list."""


class MethodType(StrEnum):
    """Fine-tuning methods."""

    LORA = "LoRA"
    QLORA = "QLoRA"
    FULL = "Full"
    AUTO = "Auto"


class LoraBias(StrEnum):
    """Which biases are trained (peft's ``bias``)."""

    NONE = "None"
    ALL = "All"
    LORA_ONLY = "LoRAOnly"


class LoraInitialization(StrEnum):
    """What the update matrices begin as (peft's ``init_lora_weights``). All but LoftQ begin with an update of nothing."""

    DEFAULT = "Default"
    GAUSSIAN = "Gaussian"
    ORTHOGONAL = "Orthogonal"
    EVA = "EVA"
    LOFTQ = "LoftQ"
    PISSA = "PiSSA"
    OLORA = "OLoRA"


BEGIN_AT_WEIGHTS = (LoraInitialization.PISSA, LoraInitialization.OLORA)
"""Those whose matrices begin at parts of the weights. What is published is a plain adapter of twice the rank."""
WHOLE_WEIGHTS = (LoraInitialization.EVA, LoraInitialization.LOFTQ, *BEGIN_AT_WEIGHTS)
"""Those that read the base's weights, or its inputs, layer by layer, with all of it on the GPU."""


_DORA_MESSAGE = "useDora and initialization: PiSSA or OLoRA each say what the update is: leave one of them out"


EMBEDDINGS = "embed_tokens|embed_in|wte|word_embeddings|lm_head|embed_out"
"""Names of input embeddings and output heads."""
TRAINED_TWICE = "modulesToSave trains embeddings whole already: leave trainableTokens out, or embed_tokens and lm_head out of modulesToSave"

_NO_DROPOUT_OF_PARAMETERS = (
    "targetParameters changes weights before they are multiplied, where dropout of inputs has no place: set dropout: 0"
)
_NO_DORA_OF_PARAMETERS = "targetParameters has no magnitudes to train: leave useDora out, or targetParameters"
_PARAMETERS_BEGIN_PLAINLY = (
    "targetParameters begins with initialization: Default or Gaussian: the others are for linear layers"
)
_PARAMETERS_OF_LAYERS = "layersToTransform does not reach targetParameters: name the layers there (layers.3.mlp.experts.down_proj), and leave it out"


class Lora(ApiModel):
    """Low-rank adaptation (Hu et al., 2021). Defaults follow common practice: rank 16, alpha = 2 × rank, all linear layers."""

    rank: Rank = Field(16, description="Rank r of the update matrices.")
    alpha: Alpha | None = Field(None, description="Scaling numerator; the default is 2 × rank.")
    rank_pattern: RankMap | None = Field(
        None,
        description=(
            "Ranks of single modules, by the end of their names (down_proj, layers.0.self_attn.q_proj; the most specific counts). Without "
            "alpha and alphaPattern their alpha is twice their rank, too."
        ),
        json_schema_extra=MODULE_KEYS,
    )
    alpha_pattern: AlphaMap | None = Field(
        None, description="Alphas of single modules, named as in rankPattern.", json_schema_extra=MODULE_KEYS
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Dropout probability on the adapter's input."
    )
    bias: LoraBias = Field(LoraBias.NONE)
    target_modules: Annotated[list[ModulePattern], Field(min_length=1, max_length=MOST_MODULES)] = Field(
        default=["all-linear"],
        description=(
            "The linear layers to adapt: all-linear, or ends of their names (q_proj, layers.0.mlp.up_proj), in which * stands for any "
            "characters, ? for one and [0-9] for one of a set (layers.[0-7].self_attn.*). One that matches nothing fails the job before a GPU is "
            "used."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    target_parameters: Annotated[list[ModuleName], Field(min_length=1, max_length=8)] | None = Field(
        None,
        description=(
            "Fused experts that are adapted besides, by the ends of the parameters' names: mlp.experts.gate_up_proj, mlp.experts.down_proj "
            "(Mixtral, Qwen2-MoE, Qwen3-MoE). An update of its own for each expert: rank × (inputs + outputs) × experts weights. Needs type: LoRA, "
            "dropout: 0 and the whole base model on each GPU; vLLM serves such adapters merged only."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    exclude_modules: Annotated[list[ModulePattern], Field(min_length=1, max_length=MOST_MODULES)] | None = Field(
        None,
        description="Layers that targetModules names and that are left as they are, named likewise.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    layers_to_transform: Annotated[list[LayerIndex], Field(min_length=1, max_length=256)] | None = Field(
        None,
        description="Indices of the decoder layers that are adapted, from 0; the default is all of them.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    modules_to_save: Annotated[list[ModuleName], Field(min_length=1, max_length=8)] | None = Field(
        None,
        description=(
            "Modules that are trained whole and stored with the adapter, such as embed_tokens and lm_head: for languages and tokens that the "
            "base hardly knows. 16 bytes of GPU memory a weight with AdamW. Needs the whole base model on each GPU; vLLM serves such "
            "adapters merged only."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    trainable_tokens: Annotated[list[TokenText], Field(min_length=1, max_length=256)] | None = Field(
        None,
        description=(
            "Tokens of the tokenizer, by their text, whose rows of the embeddings (and of the output head) are trained beside the adapter: for a "
            "chat template's or a format's tokens that the base hardly knows. Those of model.newTokens are trained in any case. Needs the whole base "
            "model on each GPU; vLLM serves such adapters merged only."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    use_dora: bool = Field(
        False,
        description=(
            "Train the magnitude of each output beside its direction (DoRA, Liu et al., 2024): better at low ranks, slower, and more memory. "
            "Needs the whole base model on each GPU."
        ),
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1000)] | None = Field(
        None,
        alias="loraPlusLRRatio",
        description=(
            "LoRA+ (Hayou et al., 2024): the matrices B learn so many times as fast as the matrices A, whose rate is "
            "training.optimizer.learningRate; 16 is usual, with a lower learningRate."
        ),
    )
    initialization: LoraInitialization = Field(
        LoraInitialization.DEFAULT,
        description=(
            "Default: A uniform (Kaiming), B zero. Gaussian, Orthogonal: A drawn so. EVA: A from the directions in which the layers' inputs vary most, "
            "by a pass over the first training rows (Paischer et al., 2024). LoftQ: what 4 bits leave of the weights, as far as the rank goes "
            "(Li et al., 2023; QLoRA only). PiSSA: A and B from the weight's largest singular values (Meng et al., 2024), OLoRA: from its QR "
            "decomposition (Büyükakyüz, 2024), and the update is what they gain on that: the base stays as it is, and the adapter is published "
            "as a plain one of twice the rank."
        ),
    )
    use_rslora: bool = Field(
        False, description="Scale updates by alpha / √rank instead of alpha / rank (Kalajdzievski, 2023)."
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!self.targetModules.exists(m, m == 'all-linear') || size(self.targetModules) == 1",
                "all-linear already names every linear layer; list it alone or list module names",
            ),
            (
                "!self.useDora || !(self.initialization in ['Orthogonal', 'LoftQ'])",
                "useDora measures the weights before they are initialized so: leave initialization: Orthogonal and LoftQ out",
            ),
            ("!self.useDora || !(self.initialization in ['PiSSA', 'OLoRA'])", _DORA_MESSAGE),
            ("!has(self.targetParameters) || self.dropout == 0.0", _NO_DROPOUT_OF_PARAMETERS),
            ("!has(self.targetParameters) || !self.useDora", _NO_DORA_OF_PARAMETERS),
            (
                "!has(self.targetParameters) || self.initialization in ['Default', 'Gaussian']",
                _PARAMETERS_BEGIN_PLAINLY,
            ),
            ("!has(self.targetParameters) || !has(self.layersToTransform)", _PARAMETERS_OF_LAYERS),
            (
                f"!has(self.trainableTokens) || !has(self.modulesToSave) || !self.modulesToSave.exists(m, m.matches('(^|[.])({EMBEDDINGS})$'))",
                TRAINED_TWICE,
            ),
        )
    )

    @model_validator(mode="after")
    def _no_dora_of_what_begins_at_weights(self) -> Lora:
        if self.use_dora and self.initialization in BEGIN_AT_WEIGHTS:
            raise ValueError(_DORA_MESSAGE)
        return self

    @model_validator(mode="after")
    def _parameters_as_peft_can(self) -> Lora:
        if self.target_parameters is None:
            return self
        for wrong, message in (
            (self.dropout != 0, _NO_DROPOUT_OF_PARAMETERS),
            (self.use_dora, _NO_DORA_OF_PARAMETERS),
            (
                self.initialization not in (LoraInitialization.DEFAULT, LoraInitialization.GAUSSIAN),
                _PARAMETERS_BEGIN_PLAINLY,
            ),
            (self.layers_to_transform is not None, _PARAMETERS_OF_LAYERS),
        ):
            if wrong:
                raise ValueError(message)
        return self

    @property
    def saves_embeddings(self) -> bool:
        """Whether modulesToSave names the input embeddings or the output head."""
        return any(re.search(rf"(^|[.])({EMBEDDINGS})$", module) for module in self.modules_to_save or [])

    @model_validator(mode="after")
    def _embeddings_once(self) -> Lora:
        if self.trainable_tokens and self.saves_embeddings:
            raise ValueError(TRAINED_TWICE)
        return self


class QuantizationType(StrEnum):
    """bitsandbytes' data types: two of 4 bit, and one of 8."""

    NF4 = "NF4"
    FP4 = "FP4"
    INT8 = "Int8"


_DOUBLE_MESSAGE = "doubleQuantization is for the constants of the 4-bit types: leave it out with type: Int8"


class Quantization(ApiModel):
    """How QLoRA holds the frozen base (Dettmers et al., 2023)."""

    type: QuantizationType = Field(
        QuantizationType.NF4,
        description=(
            "NF4 and FP4 take 4 bit a weight, with a constant for 64; Int8 takes 8, with one for each row (the weights of LLM.int8(), Dettmers et "
            "al., 2022): nearer to the base in 16 bit, and half its memory. Products are computed in 16 bit with all of them. Int8 needs "
            "the whole base model on each GPU."
        ),
    )
    double_quantization: bool | None = Field(
        None,
        description="Quantize the constants of 4-bit types too (0.4 bit per parameter less); the default is true.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.type != 'Int8' || !has(self.doubleQuantization) || !self.doubleQuantization",
                _DOUBLE_MESSAGE,
            )
        )
    )

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 8 if self.type is QuantizationType.INT8 else 4

    @property
    def doubled(self) -> bool:
        """Whether constants are quantized, too."""
        return self.bits == 4 and self.double_quantization is not False

    @model_validator(mode="after")
    def _constants_of_4_bit(self) -> Quantization:
        if self.bits == 8 and self.double_quantization:
            raise ValueError(_DOUBLE_MESSAGE)
        return self


class Spectrum(ApiModel):
    """Train the weight matrices with the highest signal-to-noise ratio (Hartford et al., 2024): singular values above the threshold of
    Marchenko and Pastur over those below."""

    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25,
        description=(
            "Share of the decoder layers whose matrix is trained, of each kind of matrix (q_proj, up_proj, …), at least one. Embeddings, head and "
            "norms are not trained."
        ),
    )


class Full(ApiModel):
    """Which weights are trained; all of them where nothing is said."""

    spectrum: Spectrum | None = Field(None, description="Those that Spectrum chooses, in the prepare stage.")
    modules: Annotated[list[ModuleName], Field(min_length=1, max_length=64)] | None = Field(
        None,
        description="Modules by the end of their names, with all that is in them: mlp, layers.31, q_proj, lm_head.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )

    model_config = ConfigDict(
        json_schema_extra=cel(("!has(self.spectrum) || !has(self.modules)", _ONE_CHOICE)),
    )

    @model_validator(mode="after")
    def _at_most_one(self) -> Full:
        if self.spectrum is not None and self.modules is not None:
            raise ValueError(_ONE_CHOICE)
        return self


_BIAS_MESSAGE = (
    "QLoRA cannot train biases, and Auto may choose it: bitsandbytes holds those of quantized layers in 16 bit, where small updates "
    "are lost; set lora.bias: None, or type: LoRA"
)

_PARAMETERS_MESSAGE = "lora.targetParameters is for type: LoRA, and Auto may choose QLoRA: bitsandbytes leaves fused experts in 16 bit anyway"

_LOFTQ_MESSAGE = "lora.initialization: LoftQ makes good for what 4 bits leave of the weights: leave it out with quantization.type: Int8"


_FULL_MESSAGE = "method.full says what type: Full trains: set type: Full, or leave it out"
_ADAPTER_MESSAGE = (
    "type: Full trains the model's own weights: method.lora and method.quantization do not apply, leave them out"
)
_LORA_DEFAULTS = (
    "self.lora.rank == 16 && !has(self.lora.alpha) && !has(self.lora.rankPattern) && !has(self.lora.alphaPattern) && self.lora.dropout == 0.05 && "
    "self.lora.bias == 'None' && self.lora.targetModules == ['all-linear'] && !has(self.lora.targetParameters) && !has(self.lora.excludeModules) && !has(self.lora.layersToTransform) && "
    "!has(self.lora.modulesToSave) && !has(self.lora.trainableTokens) && !self.lora.useDora && !has(self.lora.loraPlusLRRatio) && self.lora.initialization == 'Default' && "
    "!self.lora.useRslora && self.quantization.type == 'NF4' && !has(self.quantization.doubleQuantization)"
)
"""What the API server fills in where a user says nothing; that somebody wrote a default out cannot be told."""


class Method(ApiModel):
    """How the model is adapted."""

    type: MethodType = Field(
        MethodType.LORA,
        description=(
            "LoRA keeps the base in 16 bit; QLoRA quantized, in 4 bit unless quantization.type says otherwise. Auto is LoRA if that fits the GPU, "
            "otherwise QLoRA. Full trains weights of the model itself (method.full), and the whole model is the result."
        ),
    )
    lora: Lora = Field(default_factory=Lora)
    quantization: Quantization = Field(default_factory=Quantization, description="Used by QLoRA.")
    full: Full | None = Field(
        None, description="Used by Full: which weights. 16 bytes of GPU memory for each of them with AdamW."
    )

    # bitsandbytes casts the biases of quantized layers to the compute dtype in the first forward pass (Linear4bit.forward).
    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.type != 'Full' || (" + _LORA_DEFAULTS + ")", _ADAPTER_MESSAGE),
            ("!has(self.full) || self.type == 'Full'", _FULL_MESSAGE),
            ("self.type == 'LoRA' || self.type == 'Full' || self.lora.bias == 'None'", _BIAS_MESSAGE),
            ("self.type == 'LoRA' || self.type == 'Full' || !has(self.lora.targetParameters)", _PARAMETERS_MESSAGE),
            (
                "self.type == 'QLoRA' || self.type == 'Full' || self.lora.initialization != 'LoftQ'",
                "lora.initialization: LoftQ makes good for quantization: it needs type: QLoRA",
            ),
            ("self.quantization.type != 'Int8' || self.lora.initialization != 'LoftQ'", _LOFTQ_MESSAGE),
        ),
    )

    @model_validator(mode="after")
    def _applies(self) -> Method:
        if self.full is not None and self.type is not MethodType.FULL:
            raise ValueError(_FULL_MESSAGE)
        if self.type is MethodType.FULL and (self.lora, self.quantization) != (Lora(), Quantization()):
            raise ValueError(_ADAPTER_MESSAGE)
        return self

    @model_validator(mode="after")
    def _no_biases_in_16_bit(self) -> Method:
        if self.type is not MethodType.LORA and self.lora.bias is not LoraBias.NONE:
            raise ValueError(_BIAS_MESSAGE)
        return self

    @model_validator(mode="after")
    def _parameters_of_lora(self) -> Method:
        if self.type is not MethodType.LORA and self.lora.target_parameters is not None:
            raise ValueError(_PARAMETERS_MESSAGE)
        return self

    @model_validator(mode="after")
    def _loftq_of_4_bit(self) -> Method:
        if self.quantization.bits == 8 and self.lora.initialization is LoraInitialization.LOFTQ:
            raise ValueError(_LOFTQ_MESSAGE)
        return self
