"""``FineTuneJob.spec``: what a user asks for.

Every field here is API. Static defaults stand in the CRD; defaults that depend on other fields (alpha, learning rate,
micro-batch) stay absent here and are resolved into the run snapshot by :func:`finetune_api.snapshot.resolve_plan`.
Rules carry their CEL form beside them (``x-kubernetes-validations``), so that the apiserver refuses what pydantic would.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import cel
from finetune_api.optimizers import OptimizerName
from finetune_api.spec.compute import Compute, Queue
from finetune_api.spec.data import Data
from finetune_api.spec.evaluation import Evaluation
from finetune_api.spec.method import EMBEDDINGS, WHOLE_WEIGHTS, Method, MethodType
from finetune_api.spec.model import Model
from finetune_api.spec.objective import Objective
from finetune_api.spec.output import Output
from finetune_api.spec.recovery import Recovery
from finetune_api.spec.runtime import Runtime
from finetune_api.spec.trackers import Tracker, _each_once
from finetune_api.spec.training import CpuOffload, Parallelism, Training

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


_INT8_MESSAGE = (
    "method.quantization.type: Int8 needs the whole base model on each GPU: leave training.parallelism: FSDP and cpuOffload out, or "
    "take a 4-bit type"
)
_NEEDS_WHOLE = "the whole base model on each GPU: leave training.parallelism: FSDP and cpuOffload out"
_DORA_MESSAGE = f"method.lora.useDora needs {_NEEDS_WHOLE}"
_SAVED_MESSAGE = f"method.lora.modulesToSave needs {_NEEDS_WHOLE}"
_PARAMETERS_MESSAGE = f"method.lora.targetParameters needs {_NEEDS_WHOLE}"
_INITIALIZATION_MESSAGE = f"method.lora.initialization: EVA, LoftQ, PiSSA and OLoRA need {_NEEDS_WHOLE}"
_FULL_IS_WHOLE = (
    "method.type: Full keeps what it trains whole on each GPU: leave training.parallelism: FSDP and cpuOffload out; for less memory train fewer "
    "weights (method.full.spectrum, modules), use training.optimizer.name: galore_adamw, or type: LoRA or QLoRA"
)
_FULL_IS_MERGED = "method.type: Full publishes a whole model anyway, in model/: leave output.merged.enabled out"
_FULL_HAS_NO_ADAPTER = (
    "model.initialAdapter is for type: LoRA and QLoRA: merge it first, and name the merged model in model.uri"
)
_FULL_HAS_NO_NEW_TOKENS = (
    "model.newTokens is for type: LoRA and QLoRA, which train the new tokens' rows: method.type: Full adds no tokens"
)
_TOKENS_ARE_WHOLE = "model.newTokens and method.lora.trainableTokens need the whole base model on each GPU: leave training.parallelism: FSDP and cpuOffload out"
_NEW_ROWS_TWICE = "method.lora.modulesToSave trains embeddings whole, and model.newTokens their rows: leave embed_tokens and lm_head out of modulesToSave"
_ADAPTER_TRAINS_NO_TOKENS = (
    "model.initialAdapter trains no tokens: leave method.lora.trainableTokens out, or train afresh"
)
_GALORE_IS_FULL = (
    "training.optimizer.name: galore_adamw projects gradients of whole weight matrices: it needs method.type: Full"
)


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
                "self.method.type != 'Full' || (self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                _FULL_IS_WHOLE,
            ),
            ("self.method.type != 'Full' || !self.output.merged.enabled", _FULL_IS_MERGED),
            ("self.method.type != 'Full' || !has(self.model.initialAdapter)", _FULL_HAS_NO_ADAPTER),
            ("self.method.type != 'Full' || !has(self.model.newTokens)", _FULL_HAS_NO_NEW_TOKENS),
            ("self.method.type == 'Full' || self.training.optimizer.name != 'galore_adamw'", _GALORE_IS_FULL),
            (
                "!self.method.lora.useDora || (self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                _DORA_MESSAGE,
            ),
            (
                "!has(self.method.lora.modulesToSave) || (self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                _SAVED_MESSAGE,
            ),
            (
                "!has(self.method.lora.targetParameters) || (self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                _PARAMETERS_MESSAGE,
            ),
            (
                "!has(self.model.newTokens) && !has(self.method.lora.trainableTokens) || "
                "(self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                _TOKENS_ARE_WHOLE,
            ),
            (
                "!has(self.model.newTokens) || !has(self.method.lora.modulesToSave) || "
                f"!self.method.lora.modulesToSave.exists(m, m.matches('(^|[.])({EMBEDDINGS})$'))",
                _NEW_ROWS_TWICE,
            ),
            (
                "!has(self.model.initialAdapter) || !has(self.method.lora.trainableTokens)",
                _ADAPTER_TRAINS_NO_TOKENS,
            ),
            (
                "!(self.method.lora.initialization in ['EVA', 'LoftQ', 'PiSSA', 'OLoRA']) || (self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                _INITIALIZATION_MESSAGE,
            ),
            (
                "self.method.type == 'LoRA' || self.method.quantization.type != 'Int8' || "
                "(self.training.parallelism != 'FSDP' && self.training.cpuOffload == 'Never')",
                _INT8_MESSAGE,
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

    @model_validator(mode="after")
    def _whole_where_it_must_be(self) -> FineTuneJobSpec:
        method, lora = self.method, self.method.lora
        whole = (
            (method.type is not MethodType.LORA and method.quantization.bits == 8, _INT8_MESSAGE),
            (lora.use_dora, _DORA_MESSAGE),
            (lora.modules_to_save is not None, _SAVED_MESSAGE),
            (lora.target_parameters is not None, _PARAMETERS_MESSAGE),
            (lora.initialization in WHOLE_WEIGHTS, _INITIALIZATION_MESSAGE),
        )
        for needed, message in whole:
            if needed and self._shards:
                raise ValueError(message)
        return self

    @property
    def _shards(self) -> bool:
        return self.training.parallelism is Parallelism.FSDP or self.training.cpu_offload is not CpuOffload.NEVER

    @property
    def publishes_model(self) -> bool:
        """Whether publish writes a whole model, for which it needs torch and the base."""
        return self.output.merged.enabled or self.method.type is MethodType.FULL

    @model_validator(mode="after")
    def _full_weights(self) -> FineTuneJobSpec:
        full = self.method.type is MethodType.FULL
        galore = self.training.optimizer.name is OptimizerName.GALORE_ADAMW
        for wrong, message in (
            (full and self._shards, _FULL_IS_WHOLE),
            (full and self.output.merged.enabled, _FULL_IS_MERGED),
            (full and self.model.initial_adapter is not None, _FULL_HAS_NO_ADAPTER),
            (galore and not full, _GALORE_IS_FULL),
        ):
            if wrong:
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _tokens(self) -> FineTuneJobSpec:
        lora, new = self.method.lora, bool(self.model.new_tokens)
        for wrong, message in (
            (new and self.method.type is MethodType.FULL, _FULL_HAS_NO_NEW_TOKENS),
            ((new or bool(lora.trainable_tokens)) and self._shards, _TOKENS_ARE_WHOLE),
            (new and lora.saves_embeddings, _NEW_ROWS_TWICE),
            (bool(lora.trainable_tokens) and self.model.initial_adapter is not None, _ADAPTER_TRAINS_NO_TOKENS),
        ):
            if wrong:
                raise ValueError(message)
        return self
