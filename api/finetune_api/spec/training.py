"""``spec.training``: the optimization."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import cel, exactly_one
from finetune_api.optimizers import REFUSED, SCHEDULE_FREE, OptimizerName


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


_GALORE_MESSAGE = "training.optimizer.galore needs name: galore_adamw"


class GaLore(ApiModel):
    """AdamW on gradients that are projected to a few dimensions (Zhao et al., 2024). Defaults are transformers'."""

    rank: Annotated[int, Field(ge=1, le=8192)] = Field(
        128, description="Dimensions of the projected gradient of each weight matrix."
    )
    update_interval_steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        200, description="The projection is made anew every so many steps, from the gradient of that step."
    )
    scale: Annotated[float, Field(gt=0, le=1000)] = Field(
        0.25, description="By what projected updates are multiplied: learningRate × scale is their learning rate."
    )


def _refusal(why: str) -> str:
    return f"training.optimizer.name: {why}"


class Optimizer(ApiModel):
    """The optimizer, by transformers' own name (``TrainingArguments.optim``)."""

    name: OptimizerName = Field(
        OptimizerName.ADAMW_TORCH_FUSED,
        description=(
            "Any of transformers' names; those that cannot run here are refused, with the reason and what to take instead. schedule_free_* "
            "publish the average of the weights, and need training.scheduler: Constant."
        ),
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="Peak learning rate; the default is 2e-4, of method.type: Full 2e-5."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Gradient clipping norm; 0 switches it off."
    )
    galore: GaLore | None = Field(None, description="Used by galore_adamw, which needs method.type: Full.")

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.galore) || self.name == 'galore_adamw'", _GALORE_MESSAGE),
            *((f"!(self.name in {[n.value for n in names]})", _refusal(why)) for names, why in REFUSED),
        )
    )

    @model_validator(mode="after")
    def _can_run(self) -> Optimizer:
        for names, why in REFUSED:
            if self.name in names:
                raise ValueError(_refusal(why))
        return self

    @model_validator(mode="after")
    def _galore_applies(self) -> Optimizer:
        if self.galore is not None and self.name is not OptimizerName.GALORE_ADAMW:
            raise ValueError(_GALORE_MESSAGE)
        return self


class Scheduler(StrEnum):
    """Learning-rate schedules, all after the warm-up. CosineWithMinLR ends at a tenth of the peak; WarmupStableDecay is constant and
    falls to zero over the last tenth of the steps. transformers' polynomial and its cosine with restarts are Linear and Cosine where nothing
    else is set, and a plateau is looked for by losses that a resumed run would not have."""

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


class ComputeDtype(StrEnum):
    """Element types of the base model's weights while training, and of the products with them."""

    AUTO = "Auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


_SCHEDULE_FREE_MESSAGE = (
    "training.optimizer.name: schedule_free_adamw, schedule_free_radam and schedule_free_sgd average weights in place of lowering the learning "
    "rate: set training.scheduler: Constant"
)
NO_BFLOAT16 = "training.computeDtype: bfloat16: {} multiplies float16 only. Leave it out, or set float16."
COMPUTE_DTYPE_RULES = (
    (
        "self.computeDtype != 'float16' || !self.useCpu",
        "computeDtype: float16 needs a GPU, for its loss scaling: leave it out, or set bfloat16 or float32",
    ),
    (
        "self.computeDtype != 'float32' || self.useCpu",
        "computeDtype: float32 is for training.useCpu: on a GPU it takes twice the memory, and what is trained is float32 anyway",
    ),
)


class Training(ApiModel):
    """The optimization. Batch sizes are global, in sequences, whatever the number of GPUs."""

    length: Length = Field(default=Length(epochs=3.0))
    global_batch_sequences: Annotated[int, Field(ge=1, le=65536)] = Field(
        16, description="Sequences per optimizer step, over all GPUs and accumulation steps."
    )
    micro_batch_sequences: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None,
        description="Sequences per forward pass on one GPU. It changes speed and memory, not a step's rows or their weight in it; dropout and NEFTune "
        "draw otherwise. Chosen when absent.",
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
        description=(
            "Noise on the embeddings while training (NEFTune, Jain et al., 2023); 5 to 15 are usual. Evaluation has none. Its size goes by the "
            "padded length, so with noise the micro-batch changes the result a little."
        ),
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
    compute_dtype: ComputeDtype = Field(
        ComputeDtype.AUTO,
        description=(
            "Type of the frozen base's weights (for QLoRA: of the products with them) and of activations; what is trained is always float32. "
            "Auto is bfloat16 where the device multiplies it fast, otherwise float16 with loss scaling on a GPU and float32 on a CPU."
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
            (
                f"!(self.optimizer.name in {[n.value for n in sorted(SCHEDULE_FREE)]}) || self.scheduler == 'Constant'",
                _SCHEDULE_FREE_MESSAGE,
            ),
            *COMPUTE_DTYPE_RULES,
        )
    )

    @model_validator(mode="after")
    def _no_schedule_twice(self) -> Training:
        if self.optimizer.name in SCHEDULE_FREE and self.scheduler is not Scheduler.CONSTANT:
            raise ValueError(_SCHEDULE_FREE_MESSAGE)
        return self

    @model_validator(mode="after")
    def _a_type_for_the_device(self) -> Training:
        wrong = {ComputeDtype.FLOAT16: self.use_cpu, ComputeDtype.FLOAT32: not self.use_cpu}
        if wrong.get(self.compute_dtype):
            raise ValueError(next(words for rule, words in COMPUTE_DTYPE_RULES if f"'{self.compute_dtype}'" in rule))
        return self
