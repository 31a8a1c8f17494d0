"""``FineTuneJob.spec``: what a user asks for.

Every field here is API. Static defaults stand in the CRD; defaults that depend on other fields (alpha, learning rate,
micro-batch) stay absent here and are resolved into the run snapshot by :func:`finetune_api.snapshot.resolve_plan`.
Rules carry their CEL form beside them (``x-kubernetes-validations``), so that the apiserver refuses what pydantic would.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import (
    LABEL_KEYS,
    MODULE_KEYS,
    Alpha,
    AlphaMap,
    AnnotationMap,
    ColumnName,
    LabelMap,
    LabelValue,
    ModuleName,
    Name,
    Quantity,
    Rank,
    RankMap,
    ShortText,
    cel,
    exactly_one,
)
from finetune_api.optimizers import OptimizerName
from finetune_api.uris import DATA_URI_PATTERN, MODEL_URI_PATTERN, OUTPUT_URI_PATTERN

LayerIndex = Annotated[int, Field(ge=0, le=9999)]
MOST_GPUS_PER_NODE = 8
MOST_NODES = 64


class LocalObjectReference(ApiModel):
    """The name of an object in the job's namespace."""

    name: Name


class RemoteSource(ApiModel):
    """Where bytes come from, and whose credentials fetch them. The Secret's keys are boto3's and huggingface_hub's own
    environment names (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL,
    AWS_CA_BUNDLE, HF_TOKEN, HF_ENDPOINT). Without secretRef the pod's own identity is used."""

    secret_ref: LocalObjectReference | None = Field(
        None,
        description="Secret in the same namespace that holds the credentials, under boto3's and huggingface_hub's names.",
    )
    endpoint_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+$", max_length=2048)] | None = Field(
        None,
        alias="endpointURL",
        description="Address of the S3-compatible store or of a Hugging Face Hub mirror. Overrides the Secret's.",
    )
    region: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        None, description="Region of the S3-compatible store. Overrides the Secret's."
    )


class ModelCache(ApiModel):
    """A volume on which jobs share base models."""

    claim_name: Name = Field(
        description=(
            "PersistentVolumeClaim in the same namespace, of access mode ReadWriteMany, or of another one where all jobs run on one node. "
            "Models that were not used for the longest time leave it when there is no room."
        )
    )


class InitialAdapter(RemoteSource):
    """A LoRA adapter of peft's (adapter_config.json, adapter_model.safetensors) that training goes on from."""

    uri: Annotated[str, StringConstraints(pattern=MODEL_URI_PATTERN, max_length=2048)] = Field(
        description=(
            "hf://org/name, s3://bucket/prefix or pvc://claim/path of the adapter's folder, such as the adapter/ of another job's output."
        )
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="Branch, tag or commit (hf:// only)."
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.revision) || self.uri.startsWith('hf://')", "revision applies to hf:// adapters only"),
        )
    )


class Model(RemoteSource):
    """The base model."""

    uri: Annotated[str, StringConstraints(pattern=MODEL_URI_PATTERN, max_length=2048)] = Field(
        description="hf://org/name, s3://bucket/prefix or pvc://claim/path of a Hugging Face model folder."
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="Branch, tag or commit (hf:// only). The commit it resolves to is recorded in status."
    )
    initial_adapter: InitialAdapter | None = Field(
        None,
        description=(
            "Train on from this adapter's weights instead of fresh ones. Rank, alpha, modules and variant are the adapter's; of method.lora "
            "only dropout and loraPlusLRRatio apply."
        ),
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model repository ships.")
    cache: ModelCache | None = Field(
        None,
        description=(
            "Where the base model is kept between jobs (hf:// and s3://). The prepare stage fetches it, before a GPU is asked for, and the "
            "later stages use it where it lies."
        ),
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.revision) || self.uri.startsWith('hf://')", "revision applies to hf:// models only"),
            (
                "!has(self.cache) || !self.uri.startsWith('pvc://')",
                "a pvc:// model is used where it lies: cache applies to others",
            ),
        )
    )


class DataFormat(StrEnum):
    """Row formats. Auto detects one of the others from the first rows."""

    AUTO = "Auto"
    MESSAGES = "Messages"
    SHAREGPT = "ShareGPT"
    PROMPT_COMPLETION = "PromptCompletion"
    ALPACA = "Alpaca"
    TOKENIZED = "Tokenized"
    TEXT = "Text"


class DataSource(RemoteSource):
    """One file, or one prefix or repository of files (json, jsonl, csv, parquet; also .gz, .bz2, .xz, .zst)."""

    uri: Annotated[str, StringConstraints(pattern=DATA_URI_PATTERN, max_length=2048)] = Field(
        description="s3://bucket/key, hf://org/dataset[/path], https://… or pvc://claim/path; a trailing / means all files below."
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="Branch, tag or commit (hf:// only)."
    )
    format: DataFormat = Field(DataFormat.AUTO, description="Row format; Auto detects it and records it in status.")
    columns: dict[str, ColumnName] | None = Field(
        None,
        description=(
            "Maps the format's field names (messages, conversations, tools, prompt, completion, instruction, input, output, system, text, "
            "input_ids, labels, attention_mask) to this source's column names."
        ),
        json_schema_extra={"maxProperties": 16},
    )
    weight: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None,
        description=(
            "How often each of this source's training rows stands in an epoch: 2 twice, 0.25 a quarter of the rows (drawn with "
            "training.seed, the same rows in every epoch). The default is 1. Held-out rows have none."
        ),
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.revision) || self.uri.startsWith('hf://')", "revision applies to hf:// data only"),
        )
    )


class HeldOut(ApiModel):
    """The rows that are never trained on: a fraction of the training data, or sources of their own."""

    fraction: Annotated[float, Field(gt=0, le=0.5)] | None = Field(
        None, description="Share of the rows held out, split by prompt so that no prompt stands on both sides."
    )
    sources: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = Field(
        None, description="Held-out data of their own.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            exactly_one("fraction", "sources"),
            (
                "!has(self.sources) || self.sources.all(source, !has(source.weight))",
                "every held-out row counts once: leave weight out",
            ),
        )
    )

    @model_validator(mode="after")
    def _one_of(self) -> HeldOut:
        if (self.fraction is None) == (self.sources is None):
            raise ValueError("exactly one of fraction, sources must be set")
        return self


class Overlength(StrEnum):
    """What happens to a row longer than training.maxSequenceTokens."""

    TRUNCATE = "Truncate"
    DROP = "Drop"
    FAIL = "Fail"


class NearDuplicates(ApiModel):
    """Rows that say nearly the same, by MinHash."""

    enabled: bool = Field(
        True,
        description=(
            "Count them, keep rows that are nearly the same on one side of the split by heldOut.fraction, and tell how many rows of "
            "heldOut.sources nearly stand in the training data."
        ),
    )
    threshold: Annotated[float, Field(ge=0.6, le=1)] = Field(
        0.8,
        description="Share of their runs of 16 characters that two rows have in common from which on they are near duplicates (an estimate).",
    )


class PiiPolicy(StrEnum):
    """What happens to obvious personal data: e-mail addresses, telephone, card and US social security numbers, IBANs, public IPv4
    addresses."""

    IGNORE = "Ignore"
    COUNT = "Count"
    REDACT = "Redact"


class DataChecks(ApiModel):
    """How strictly the rows are judged, before any GPU is asked for."""

    max_bad_rows: Annotated[int, Field(ge=0, le=1_000_000_000)] = Field(
        0, description="Rows that may be unusable (they are left out and listed) before the job fails."
    )
    overlength: Overlength = Field(
        Overlength.TRUNCATE, description="What to do with a row longer than training.maxSequenceTokens."
    )
    near_duplicates: NearDuplicates = Field(default_factory=NearDuplicates)
    pii: PiiPolicy = Field(
        PiiPolicy.IGNORE,
        description=(
            "Personal data of obvious form: Ignore; Count and warn; or Redact, which puts [EMAIL], [PHONE], [CREDIT_CARD], [IBAN], [SSN] or "
            "[IP_ADDRESS] in its place in all texts before anything is made of them. Names and addresses are not looked for."
        ),
    )


_PII_MESSAGE = (
    "data.checks.pii: Redact cannot find personal data in rows of token ids: give texts instead of format: Tokenized"
)


class Data(ApiModel):
    """Training data, held-out data and the checks on both."""

    train: Annotated[list[DataSource], Field(min_length=1, max_length=32)] = Field(
        description="Sources of training rows; their rows are concatenated.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    held_out: HeldOut = Field(
        default=HeldOut(fraction=0.1), description="The rows used for evaluation, never for training."
    )
    checks: DataChecks = Field(default_factory=DataChecks)
    chat_template: Annotated[str, StringConstraints(min_length=1, max_length=32768)] | None = Field(
        None,
        description=(
            "Jinja chat template in the place of the model's own, or where it has none. It is kept with the adapter and the merged model. "
            "strftime_now gives one fixed date, in any template."
        ),
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.checks.pii != 'Redact' || (self.train.all(source, source.format != 'Tokenized') && (!has(self.heldOut.sources) || "
                "self.heldOut.sources.all(source, source.format != 'Tokenized')))",
                _PII_MESSAGE,
            ),
        )
    )

    @model_validator(mode="after")
    def _texts_to_redact(self) -> Data:
        formats = {source.format for source in [*self.train, *(self.held_out.sources or [])]}
        if self.checks.pii is PiiPolicy.REDACT and DataFormat.TOKENIZED in formats:
            raise ValueError(_PII_MESSAGE)
        return self


class LossOn(StrEnum):
    """Which tokens are learned."""

    ASSISTANT = "Assistant"
    COMPLETION = "Completion"
    ALL = "All"


class SupervisedFineTuning(ApiModel):
    """Settings of supervised fine-tuning."""

    loss_on: LossOn = Field(
        LossOn.ASSISTANT,
        description=(
            "Assistant: every assistant turn (or the completion). Completion: the last assistant turn only. All: every token. "
            "Text rows are always learned whole, Tokenized rows by their labels."
        ),
    )


class ObjectiveType(StrEnum):
    """Training objectives."""

    SFT = "SFT"


class Objective(ApiModel):
    """What is optimized."""

    type: ObjectiveType = Field(ObjectiveType.SFT)
    sft: SupervisedFineTuning = Field(default_factory=SupervisedFineTuning)


class MethodType(StrEnum):
    """Fine-tuning methods."""

    LORA = "LoRA"
    QLORA = "QLoRA"
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
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=64)] = Field(
        default=["all-linear"],
        description="Names of the linear layers to adapt, or all-linear. A name that matches nothing fails the job before a GPU is used.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    exclude_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=64)] | None = Field(
        None,
        description="Names of layers that targetModules names and that are left as they are.",
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
            "(Li et al., 2023; QLoRA only)."
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
        )
    )


class QuantizationType(StrEnum):
    """4-bit data types of bitsandbytes."""

    NF4 = "NF4"
    FP4 = "FP4"


class Quantization(ApiModel):
    """How QLoRA holds the frozen base (Dettmers et al., 2023)."""

    type: QuantizationType = Field(QuantizationType.NF4)
    double_quantization: bool = Field(
        True, description="Quantize the quantization constants too (0.4 bit per parameter less)."
    )


_BIAS_MESSAGE = (
    "QLoRA cannot train biases, and Auto may choose it: bitsandbytes holds those of quantized layers in 16 bit, where small updates "
    "are lost; set lora.bias: None, or type: LoRA"
)


class Method(ApiModel):
    """How the model is adapted."""

    type: MethodType = Field(
        MethodType.LORA,
        description="LoRA keeps the base in 16 bit; QLoRA in 4 bit. Auto is LoRA if that fits the GPU, otherwise QLoRA.",
    )
    lora: Lora = Field(default_factory=Lora)
    quantization: Quantization = Field(default_factory=Quantization, description="Used by QLoRA.")

    # bitsandbytes casts the biases of quantized layers to the compute dtype in the first forward pass (Linear4bit.forward).
    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.type == 'LoRA' || self.lora.bias == 'None'", _BIAS_MESSAGE),
            (
                "self.type == 'QLoRA' || self.lora.initialization != 'LoftQ'",
                "lora.initialization: LoftQ makes good for quantization: it needs type: QLoRA",
            ),
        ),
    )

    @model_validator(mode="after")
    def _no_biases_in_16_bit(self) -> Method:
        if self.type is not MethodType.LORA and self.lora.bias is not LoraBias.NONE:
            raise ValueError(_BIAS_MESSAGE)
        return self


class Length(ApiModel):
    """How long to train: passes over the data, or optimizer steps."""

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None

    model_config = ConfigDict(json_schema_extra=cel(exactly_one("epochs", "steps")))

    @model_validator(mode="after")
    def _one_of(self) -> Length:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("exactly one of epochs, steps must be set")
        return self


class Warmup(ApiModel):
    """Learning-rate warm-up, as a share of the steps or as a number of steps."""

    fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    steps: Annotated[int, Field(ge=0, le=10_000_000)] | None = None

    model_config = ConfigDict(json_schema_extra=cel(exactly_one("fraction", "steps")))

    @model_validator(mode="after")
    def _one_of(self) -> Warmup:
        if (self.fraction is None) == (self.steps is None):
            raise ValueError("exactly one of fraction, steps must be set")
        return self


class Optimizer(ApiModel):
    """The optimizer, by transformers' own name (``TrainingArguments.optim``)."""

    name: OptimizerName = Field(OptimizerName.ADAMW_TORCH_FUSED)
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="Peak learning rate; the default is 2e-4."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Gradient clipping norm; 0 switches it off."
    )


class Scheduler(StrEnum):
    """Learning-rate schedules, all after the warm-up. CosineWithMinLR ends at a tenth of the peak; WarmupStableDecay is constant and
    falls to zero over the last tenth of the steps."""

    COSINE = "Cosine"
    COSINE_WITH_MIN_LR = "CosineWithMinLR"
    LINEAR = "Linear"
    CONSTANT = "Constant"
    INVERSE_SQRT = "InverseSqrt"
    WARMUP_STABLE_DECAY = "WarmupStableDecay"


class Parallelism(StrEnum):
    """How several GPUs share the work."""

    AUTO = "Auto"
    DDP = "DDP"
    FSDP = "FSDP"


class CpuOffload(StrEnum):
    """When the frozen base model lies in host memory, from where layers come to the GPU one at a time."""

    NEVER = "Never"
    IF_NEEDED = "IfNeeded"
    ALWAYS = "Always"


class Training(ApiModel):
    """The optimization. Batch sizes are global, in sequences, whatever the number of GPUs."""

    length: Length = Field(default=Length(epochs=3.0))
    global_batch_sequences: Annotated[int, Field(ge=1, le=65536)] = Field(
        16, description="Sequences per optimizer step, over all GPUs and accumulation steps."
    )
    micro_batch_sequences: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None,
        description="Sequences per forward pass on one GPU. It changes speed and memory, never the result. Chosen when absent.",
    )
    max_sequence_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = Field(
        2048, description="Longest sequence trained on, in tokens."
    )
    packing: bool = Field(
        False,
        description=(
            "Lay several rows end to end in one sequence, as long as the longest row at most: less padding and fewer forward passes where rows "
            "are of unlike length. Rows do not see each other (tried on the model before training; one that mixes them is trained unpacked, "
            "with a warning), and a step has the same rows: the result is the same but for rounding and dropout."
        ),
    )
    optimizer: Optimizer = Field(default_factory=Optimizer)
    scheduler: Scheduler = Field(
        Scheduler.COSINE,
        description=(
            "Learning rate after the warm-up. CosineWithMinLR ends at a tenth of the peak; WarmupStableDecay is constant and falls to zero over "
            "the last tenth of the steps."
        ),
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None,
        description="Noise on the embeddings while training (NEFTune, Jain et al., 2023); 5 to 15 are usual. Evaluation has none.",
    )
    warmup: Warmup = Field(default=Warmup(fraction=0.03))
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass: less memory, about 30 % slower."
    )
    parallelism: Parallelism = Field(
        Parallelism.AUTO,
        description=(
            "With several GPUs: DDP keeps the whole base model on each, FSDP a part of it, layer by layer; the adapter is whole on each. "
            "Auto takes DDP if that fits (or nothing is known of the GPU), otherwise FSDP."
        ),
    )
    cpu_offload: CpuOffload = Field(
        CpuOffload.NEVER,
        description=(
            "Keep the frozen base model in the training pod's host memory and copy it to the GPU a layer at a time, twice a micro-batch: it "
            "fits small GPUs, and takes several times as long. IfNeeded does so if nothing else fits by the memory plan."
        ),
    )
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 42
    use_cpu: bool = Field(
        False,
        description="Train on the CPU, whatever GPUs are asked for. Without it a container that finds no GPU fails.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!has(self.microBatchSequences) || self.microBatchSequences <= self.globalBatchSequences",
                "microBatchSequences must not exceed globalBatchSequences",
            ),
            (
                "!has(self.neftuneNoiseAlpha) || !self.packing",
                "neftuneNoiseAlpha depends on how long sequences are, which packing changes: leave one of them out",
            ),
            (
                "self.cpuOffload == 'Never' || self.parallelism != 'DDP'",
                "cpuOffload leaves no whole copy of the model on a GPU, as parallelism: DDP asks for: set parallelism: Auto",
            ),
        )
    )


class TextMetric(StrEnum):
    """What is computed of the answers. ROUGE is ROUGE-1, -2 and -L."""

    EXACT_MATCH = "ExactMatch"
    ROUGE = "ROUGE"
    BLEU = "BLEU"
    CHRF = "ChrF"
    JSON_VALIDITY = "JSONValidity"
    REGEX = "Regex"


_PROMPTS_MESSAGE = "every prompt is answered once, and token ids hold none: leave weight and format: Tokenized out"
_REGEX_MESSAGE = "regex and the metric Regex need each other: set both or none"


class Generation(ApiModel):
    """Answers to held-out prompts, or to prompts of your own, by base and tuned model, kept side by side."""

    prompts: Annotated[int, Field(ge=0, le=100)] = Field(
        3, description="How many prompts are answered: the first held-out ones, or the first of the sources."
    )
    sources: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = Field(
        None,
        description=(
            "Prompts of your own, answered instead of held-out ones and never trained on: rows as in data.train, whose answers may be missing "
            "(then only what needs no reference is scored)."
        ),
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="Longest answer, in tokens.")
    metrics: Annotated[list[TextMetric], Field(max_length=len(TextMetric))] = Field(
        default=[TextMetric.EXACT_MATCH, TextMetric.ROUGE, TextMetric.BLEU, TextMetric.CHRF],
        description=(
            "What is computed of both models' answers. ExactMatch, ROUGE, BLEU and ChrF compare with the reference; JSONValidity is the share of "
            "answers that are JSON, Regex of those in which regex finds something."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    regex: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        None,
        description="Regular expression (Python's syntax) that is searched for in every answer; ^ and $ stand for its ends.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("has(self.regex) == self.metrics.exists(m, m == 'Regex')", _REGEX_MESSAGE),
            (
                "!has(self.sources) || self.sources.all(source, !has(source.weight) && source.format != 'Tokenized')",
                _PROMPTS_MESSAGE,
            ),
        )
    )

    @model_validator(mode="after")
    def _regex_where_it_counts(self) -> Generation:
        if (self.regex is not None) != (TextMetric.REGEX in self.metrics):
            raise ValueError(_REGEX_MESSAGE)
        return self

    @model_validator(mode="after")
    def _sources_of_prompts(self) -> Generation:
        if any(s.weight is not None or s.format is DataFormat.TOKENIZED for s in self.sources or []):
            raise ValueError(_PROMPTS_MESSAGE)
        return self


class Judge(ApiModel):
    """A language model that compares the answers of base and tuned model. It is asked by the publish stage, without a GPU, over the
    protocol of OpenAI's chat completions."""

    endpoint_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@?#]+$", max_length=2048)] = Field(
        alias="endpointURL",
        description="Below it /chat/completions is asked, for example https://api.openai.com/v1 or http://vllm.models/v1.",
    )
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] = Field(
        description="Name of the judge there."
    )
    secret_ref: LocalObjectReference | None = Field(
        None, description="Secret in the same namespace with the key OPENAI_API_KEY; without one, no key is sent."
    )
    criteria: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = Field(
        None,
        description="What makes an answer better, in words; the default is correctness, helpfulness and following instructions.",
    )
    max_pairs: Annotated[int, Field(ge=1, le=100)] = Field(
        50, description="Most pairs of answers that are judged, each with two questions."
    )


_JUDGE_MESSAGE = "a judge compares answers: set generation.prompts above 0, or leave judge out"


class EarlyStopping(ApiModel):
    """When training ends before its last step, since the held-out loss no longer falls (transformers' ``EarlyStoppingCallback``)."""

    patience: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="So many evaluations in a row without a lower held-out loss."
    )
    threshold: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0, description="By more than this the loss must fall below the lowest so far to count."
    )


_EARLY_STOPPING_MESSAGE = (
    "earlyStopping goes by the evaluations on the way: set evaluation.intervalSteps, the number of steps between two"
)


class Evaluation(ApiModel):
    """What is measured on the held-out rows, and what is made of answers."""

    generation: Generation = Field(default_factory=Generation)
    judge: Judge | None = Field(None, description="Who compares the answers of base and tuned model.")
    interval_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None,
        description="Measure the held-out loss every so many optimizer steps too, not only before and after training.",
    )
    early_stopping: EarlyStopping | None = Field(
        None,
        description="End training when the held-out loss no longer falls. With output.select: Best the lowest one's weights are the result.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.earlyStopping) || has(self.intervalSteps)", _EARLY_STOPPING_MESSAGE),
            ("!has(self.judge) || self.generation.prompts > 0", _JUDGE_MESSAGE),
        )
    )

    @model_validator(mode="after")
    def _evaluations_to_stop_by(self) -> Evaluation:
        if self.early_stopping is not None and self.interval_steps is None:
            raise ValueError(_EARLY_STOPPING_MESSAGE)
        return self

    @model_validator(mode="after")
    def _judge_of_answers(self) -> Evaluation:
        if self.judge is not None and not self.generation.prompts:
            raise ValueError(_JUDGE_MESSAGE)
        return self


class Gpu(ApiModel):
    """Which GPUs are asked for."""

    resource_name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$", max_length=253)] = Field(
        "nvidia.com/gpu", description="Extended resource that the device plugin serves."
    )
    product: LabelValue | None = Field(None, description="Value of the node label nvidia.com/gpu.product to require.")
    memory: Quantity | None = Field(
        None,
        description=(
            "Memory that a process can allocate on one GPU, for the memory plan. Without it and without a product, the plan holds for "
            "those GPUs of the cluster's nodes (labels nvidia.com/gpu.product and .memory) that are large enough."
        ),
    )


class Compute(ApiModel):
    """Resources of the training pod. CPU stages get the operator's defaults."""

    nodes: Annotated[int, Field(ge=1, le=MOST_NODES)] = Field(
        1,
        description=(
            "Pods that train together, each with gpusPerNode GPUs. They start at the same time or not at all (recovery.placementTimeoutSeconds)."
        ),
    )
    gpus_per_node: Annotated[int, Field(ge=0, le=MOST_GPUS_PER_NODE)] | Literal["Auto"] = Field(
        1,
        description=(
            "GPUs of the training pod, each with its share of every step's rows; 0 only with training.useCpu. Auto takes the fewest that "
            "the run fits on, by its memory plan, of as many as one node has."
        ),
    )
    gpu: Gpu = Field(default_factory=Gpu)
    cpu: Quantity | None = Field(None, description="CPU request of the training pod.")
    memory: Quantity | None = Field(None, description="Memory request and limit of the training pod.")
    ephemeral_storage: Quantity | None = Field(
        None,
        description="Ephemeral storage request of the stages that download the base model (about twice the model's size).",
    )

    def gpus(self, planned: int | None = None) -> int | None:
        """GPUs of the training pod: as asked for; for Auto as ``planned``, and None as long as nothing is."""
        return planned if self.gpus_per_node == "Auto" else self.gpus_per_node


class Queue(ApiModel):
    """Kueue queues."""

    name: Name | None = Field(None, description="LocalQueue of the training Job.")
    cpu_name: Name | None = Field(None, description="LocalQueue of the CPU stages; without it they are not queued.")
    priority_class_name: Name | None = Field(None, description="Kueue WorkloadPriorityClass of the training Job.")


class Retention(StrEnum):
    """What happens to intermediate results after success."""

    DELETE = "Delete"
    KEEP = "Keep"


class CheckpointInterval(ApiModel):
    """How often training is checkpointed: every so many optimizer steps, or as soon as so many seconds have passed."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    seconds: Annotated[int, Field(ge=1, le=86_400)] | None = None

    model_config = ConfigDict(json_schema_extra=cel(exactly_one("steps", "seconds")))

    @model_validator(mode="after")
    def _one_of(self) -> CheckpointInterval:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("exactly one of steps, seconds must be set")
        return self


class Checkpoint(ApiModel):
    """Checkpoints of the adapter, optimizer, scheduler, random numbers and data position; never of the base. They lie in the
    workspace and are written while training goes on."""

    interval: CheckpointInterval = Field(
        default=CheckpointInterval(seconds=300),
        description="The first step and the last are checkpointed in any case, and so is a run that is told to stop.",
    )
    keep: Annotated[int, Field(ge=1, le=100)] = Field(
        2, description="How many of the newest are kept; the one with the best held-out loss is kept beside them."
    )
    retention: Retention = Field(Retention.DELETE, description="What happens to them after success.")


class OutOfMemoryAction(StrEnum):
    """What may be changed after the GPU's memory did not suffice. Only ShorterSequences changes the result."""

    SMALLER_MICRO_BATCH = "SmallerMicroBatch"
    GRADIENT_CHECKPOINTING = "GradientCheckpointing"
    SHORTER_SEQUENCES = "ShorterSequences"


class OutOfMemory(ApiModel):
    """How a job heals itself when memory does not suffice."""

    actions: Annotated[list[OutOfMemoryAction], Field(max_length=3)] = Field(
        default=[OutOfMemoryAction.SMALLER_MICRO_BATCH, OutOfMemoryAction.GRADIENT_CHECKPOINTING],
        description=(
            "What may be tried, in this order, each until it helps no more: half the micro-batch and twice the accumulation "
            "(same rows, same normaliser), gradient checkpointing, half of maxSequenceTokens (longer rows are truncated)."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    max_memory: Quantity | None = Field(
        None,
        description=(
            "Up to here compute.memory grows by half each time the training container was killed for exceeding it; absent: never."
        ),
    )


class Recovery(ApiModel):
    """What happens after a failure that may pass."""

    # status.attempts, from which the operator counts, holds 64.
    max_failures: Annotated[int, Field(ge=0, le=50)] = Field(
        2, description="Failed executions of a stage that are repeated. Interruptions from outside do not count."
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    out_of_memory: OutOfMemory = Field(default_factory=OutOfMemory)
    hung_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = Field(
        1800, description="So long training may show no sign of life before its processes are started again."
    )
    stop_on_divergence: bool = Field(
        True,
        description="Fail when the training loss has risen far above where it began and stays there, instead of training on.",
    )
    termination_grace_period_seconds: Annotated[int, Field(ge=10, le=3600)] = Field(
        120, description="How long a training pod that is told to stop may take to save a checkpoint."
    )
    placement_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = Field(
        600,
        description=(
            "With compute.nodes above 1: so long, and at random up to half as long again, pods that run wait for the others (an image that "
            "must be pulled counts). Then "
            "all give their GPUs back, and the job starts at prepare again, so that two jobs never hold each other up for ever."
        ),
    )


class Toleration(ApiModel):
    """A core/v1 Toleration."""

    key: Annotated[str, StringConstraints(max_length=316)] | None = None
    operator: Annotated[str, StringConstraints(pattern=r"^(Exists|Equal)$")] | None = None
    value: LabelValue | None = None
    effect: Annotated[str, StringConstraints(pattern=r"^(NoSchedule|PreferNoSchedule|NoExecute)$")] | None = None
    toleration_seconds: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = None


class EnvVar(ApiModel):
    """A plain environment variable."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    value: ShortText = ""


class Runtime(ApiModel):
    """How the pods run: narrow by intent, so that a job stays portable and restricted."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        None,
        description=(
            "Image of every stage, built on the trainer image; the default is the operator's own. That it can be pulled "
            "shows in the prepare stage, before a GPU is asked for."
        ),
    )
    service_account_name: Name | None = Field(None, description="For workload identity. No token of it is mounted.")
    runtime_class_name: Name | None = Field(
        None,
        description=(
            "RuntimeClass of the training pod. Clusters whose default container runtime is not NVIDIA's (k3s, RKE2) need "
            "nvidia here for the container to see its GPU."
        ),
    )
    node_selector: LabelMap | None = Field(
        None, description="Node labels the training pod requires.", json_schema_extra=LABEL_KEYS
    )
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = Field(
        None, description="Tolerations of the training pod.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] | None = Field(
        None,
        description="Environment of every stage's container.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    labels: LabelMap | None = Field(None, description="Labels of the pods.", json_schema_extra=LABEL_KEYS)
    annotations: AnnotationMap | None = Field(
        None, description="Annotations of the pods.", json_schema_extra=LABEL_KEYS
    )
    image_pull_secrets: Annotated[list[LocalObjectReference], Field(max_length=8)] | None = Field(
        None, json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )


class Workspace(ApiModel):
    """Prepared data and intermediate results: a copy of possibly private rows, so it goes after success unless kept."""

    uri: Annotated[str, StringConstraints(pattern=OUTPUT_URI_PATTERN, max_length=2048)] | None = Field(
        None,
        description=(
            "Where it lives, in <name>-<first 8 characters of the UID>/workspace/ below this; the default is the output's uri. "
            "Same store and credentials as the output."
        ),
    )
    retention: Retention = Field(Retention.DELETE)


class MergedDtype(StrEnum):
    """Element types of the merged weights."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class MergedBase(StrEnum):
    """Which base weights the adapter is merged into after QLoRA."""

    QUANTIZED = "Quantized"
    ORIGINAL = "Original"


class Merged(ApiModel):
    """Base and adapter merged into one model folder."""

    enabled: bool = False
    dtype: MergedDtype = MergedDtype.BFLOAT16
    base: MergedBase = Field(
        MergedBase.QUANTIZED,
        description=(
            "Quantized merges into the quantized-and-dequantized weights that training saw, which is what the adapter was "
            "trained for; Original into the published ones. The same for LoRA."
        ),
    )


class Selection(StrEnum):
    """Which of the weights that were evaluated become the result."""

    BEST = "Best"
    LAST = "Last"


class DeletionPolicy(StrEnum):
    """What deleting the FineTuneJob does to its output."""

    RETAIN = "Retain"
    DELETE = "Delete"


class Output(RemoteSource):
    """Where the results go: s3://bucket/prefix/<name>-<first 8 characters of the UID>/."""

    uri: Annotated[str, StringConstraints(pattern=OUTPUT_URI_PATTERN, max_length=2048)] = Field(
        description="s3://bucket/prefix"
    )
    workspace: Workspace = Field(default_factory=Workspace)
    merged: Merged = Field(default_factory=Merged)
    select: Selection = Field(
        Selection.BEST,
        description="Best: the weights with the lowest held-out loss of all evaluations; Last: those after the last step.",
    )
    deletion_policy: DeletionPolicy = Field(
        DeletionPolicy.RETAIN,
        description="What happens to everything below the job's output folder when the FineTuneJob is deleted.",
    )


class TrackerType(StrEnum):
    """Experiment trackers, by their libraries."""

    WEIGHTS_AND_BIASES = "WeightsAndBiases"
    MLFLOW = "MLflow"
    TENSORBOARD = "TensorBoard"
    TRACKIO = "Trackio"


TRACKER_RULES = (
    (
        "self.type != 'TensorBoard' || (!has(self.project) && !has(self.runName) && !has(self.endpointURL) && !has(self.secretRef))",
        "TensorBoard's event files lie beside the other results: leave project, runName, endpointURL and secretRef out",
    ),
    (
        "self.type != 'WeightsAndBiases' || has(self.secretRef)",
        "WeightsAndBiases needs secretRef: a Secret with the key WANDB_API_KEY",
    ),
    (
        "self.type != 'MLflow' || has(self.endpointURL) || has(self.secretRef)",
        "MLflow needs endpointURL, or secretRef: a Secret with the key MLFLOW_TRACKING_URI",
    ),
    (
        "self.type != 'Trackio' || has(self.secretRef)",
        "Trackio needs secretRef: a Secret with the key TRACKIO_WRITE_TOKEN or, for a Space, HF_TOKEN",
    ),
)


class Tracker(ApiModel):
    """An experiment tracker that is told of the run while it trains. It never slows, stops or fails training. The Secret's keys are the
    libraries' own environment names (WANDB_API_KEY, WANDB_ENTITY, WANDB_BASE_URL; MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN,
    MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD; TRACKIO_SERVER_URL, TRACKIO_SPACE_ID, TRACKIO_WRITE_TOKEN, HF_TOKEN)."""

    type: TrackerType
    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$", max_length=128)] | None = Field(
        None, description="Project (MLflow: experiment) that the run belongs to; the default is the namespace."
    )
    run_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$", max_length=128)] | None = (
        Field(
            None,
            description="Name of the run; the default is the job's. Every execution of a job goes on in the same run, which its UID tells apart.",
        )
    )
    endpoint_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@?#]+$", max_length=2048)] | None = Field(
        None,
        alias="endpointURL",
        description=(
            "Address of the tracking server, or of a Trackio Space (https://huggingface.co/spaces/owner/name), without credentials. Overrides "
            "the Secret's; Weights & Biases has its own as default."
        ),
    )
    secret_ref: LocalObjectReference | None = Field(
        None, description="Secret in the same namespace that holds the credentials, under the libraries' names."
    )

    model_config = ConfigDict(json_schema_extra=cel(*TRACKER_RULES))

    @model_validator(mode="after")
    def _as_its_type_takes_them(self) -> Tracker:
        server = self.endpoint_url or self.secret_ref
        wrong = {
            TrackerType.TENSORBOARD: bool(server or self.project or self.run_name),
            TrackerType.WEIGHTS_AND_BIASES: self.secret_ref is None,
            TrackerType.MLFLOW: not server,
            TrackerType.TRACKIO: self.secret_ref is None,
        }
        if wrong[self.type]:
            raise ValueError(next(words for rule, words in TRACKER_RULES if f"'{self.type.value}'" in rule))
        return self


def _each_once(trackers: list[Tracker]) -> list[Tracker]:
    types = [tracker.type for tracker in trackers]
    twice = next((kind for kind in types if types.count(kind) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice.value} stands twice: at most one tracker of each type")
    return trackers


IMMUTABLE_FIELDS = (
    "model",
    "data",
    "objective",
    "method",
    "training",
    "evaluation",
    "compute",
    "queue",
    "recovery",
    "runtime",
    "output",
    "trackers",
    "planOnly",
)
OPTIONAL_FIELDS = ("trackers",)
"""Of those the ones without a default: CEL cannot compare what is absent."""


def _immutable(name: str) -> tuple[str, str]:
    same = f"self.{name} == oldSelf.{name}"
    if name in OPTIONAL_FIELDS:
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
    return same, f"{name} is immutable: create a new FineTuneJob instead"


class FineTuneJobSpec(ApiModel):
    """What is to be trained, on what, how, and where the result goes."""

    suspend: bool = Field(
        False, description="Save a checkpoint, stop and release everything; false again goes on from there."
    )
    plan_only: bool = Field(
        False,
        description="Check model, data and output and plan the memory, and end there: no GPU is asked for and nothing is stored.",
    )
    model: Model
    data: Data
    objective: Objective = Field(default_factory=Objective)
    method: Method = Field(default_factory=Method)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    compute: Compute = Field(default_factory=Compute)
    queue: Queue = Field(default_factory=Queue)
    recovery: Recovery = Field(default_factory=Recovery)
    runtime: Runtime = Field(default_factory=Runtime)
    output: Output
    trackers: Annotated[list[Tracker], Field(min_length=1, max_length=4), AfterValidator(_each_once)] | None = Field(
        None,
        description="Experiment trackers that follow the run, at most one of each type.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    active_deadline_seconds: Annotated[int, Field(ge=1, le=2_147_483_647)] | None = Field(
        None, description="Longest running time (time in a queue or suspended does not count), then the job fails."
    )
    pending_timeout_seconds: Annotated[int, Field(ge=1, le=2_147_483_647)] = Field(
        3600,
        description="Longest uninterrupted wait for one thing that is missing (Secret, image, endpoint, GPU), then the job fails.",
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = Field(
        None,
        description="The FineTuneJob is deleted so long after it finished; its results stay in the bucket unless output.deletionPolicy is Delete.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            *(_immutable(name) for name in IMMUTABLE_FIELDS),
            (
                "self.compute.gpusPerNode == 'Auto' || self.compute.gpusPerNode > 0 || self.training.useCpu",
                "compute.gpusPerNode: 0 needs training.useCpu: true",
            ),
            (
                "!self.method.lora.useDora || (self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                "method.lora.useDora needs the whole base model on each GPU: leave training.parallelism: FSDP and cpuOffload out",
            ),
            (
                "!has(self.method.lora.modulesToSave) || (self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                "method.lora.modulesToSave needs the whole base model on each GPU: leave training.parallelism: FSDP and cpuOffload out",
            ),
            (
                "!(self.method.lora.initialization in ['EVA', 'LoftQ']) || (self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                "method.lora.initialization: EVA and LoftQ need the whole base model on each GPU: leave training.parallelism: FSDP and cpuOffload out",
            ),
            (
                "!has(self.model.initialAdapter) || self.method.lora.initialization == 'Default'",
                "model.initialAdapter has weights already: leave method.lora.initialization out",
            ),
            (
                "self.compute.gpusPerNode != 'Auto' || !self.training.useCpu",
                "compute.gpusPerNode: Auto plans for GPUs: set a number with training.useCpu: true",
            ),
            (
                "self.training.parallelism != 'FSDP' || self.training.cpuOffload != 'Never' || self.compute.nodes > 1 || "
                "self.compute.gpusPerNode == 'Auto' || self.compute.gpusPerNode > 1",
                "training.parallelism: FSDP needs compute.gpusPerNode of at least 2, several nodes, or training.cpuOffload",
            ),
            (
                "!has(self.recovery.outOfMemory.maxMemory) || has(self.compute.memory)",
                "recovery.outOfMemory.maxMemory needs compute.memory: that is what grows",
            ),
            (
                "!has(self.recovery.outOfMemory.maxMemory) || !has(self.compute.memory) || "
                "quantity(self.recovery.outOfMemory.maxMemory).compareTo(quantity(self.compute.memory)) >= 0",
                "recovery.outOfMemory.maxMemory must not be less than compute.memory",
            ),
        )
    )
