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
    AnnotationMap,
    ColumnName,
    LabelMap,
    LabelValue,
    ModuleName,
    Name,
    Quantity,
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


class Model(RemoteSource):
    """The base model."""

    uri: Annotated[str, StringConstraints(pattern=MODEL_URI_PATTERN, max_length=2048)] = Field(
        description="hf://org/name, s3://bucket/prefix or pvc://claim/path of a Hugging Face model folder."
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="Branch, tag or commit (hf:// only). The commit it resolves to is recorded in status."
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


class DataChecks(ApiModel):
    """How strictly the rows are judged, before any GPU is asked for."""

    max_bad_rows: Annotated[int, Field(ge=0, le=1_000_000_000)] = Field(
        0, description="Rows that may be unusable (they are left out and listed) before the job fails."
    )
    overlength: Overlength = Field(
        Overlength.TRUNCATE, description="What to do with a row longer than training.maxSequenceTokens."
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


class Lora(ApiModel):
    """Low-rank adaptation (Hu et al., 2021). Defaults follow common practice: rank 16, alpha = 2 × rank, all linear layers."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank r of the update matrices.")
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="Scaling numerator; the default is 2 × rank."
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
    use_dora: bool = Field(
        False,
        description=(
            "Train the magnitude of each output beside its direction (DoRA, Liu et al., 2024): better at low ranks, slower, and more memory. "
            "Needs the whole base model on each GPU."
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
        json_schema_extra=cel(("self.type == 'LoRA' || self.lora.bias == 'None'", _BIAS_MESSAGE)),
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
                "self.cpuOffload == 'Never' || self.parallelism != 'DDP'",
                "cpuOffload leaves no whole copy of the model on a GPU, as parallelism: DDP asks for: set parallelism: Auto",
            ),
        )
    )


class Generation(ApiModel):
    """Answers to held-out prompts by base and tuned model, kept side by side."""

    prompts: Annotated[int, Field(ge=0, le=100)] = Field(3, description="How many held-out prompts are answered.")
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="Longest answer, in tokens.")


class Evaluation(ApiModel):
    """What is measured on the held-out rows."""

    generation: Generation = Field(default_factory=Generation)
    interval_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None,
        description="Measure the held-out loss every so many optimizer steps too, not only before and after training.",
    )


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
