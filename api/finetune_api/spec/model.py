"""``spec.model``: the base model."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import Name, NewToken, cel
from finetune_api.spec.references import RemoteSource
from finetune_api.uris import MODEL_URI_PATTERN


class CacheFetch(StrEnum):
    """When a base model that is not in the cache yet is fetched, for a job with a queue."""

    WHILE_QUEUED = "WhileQueued"
    BEFORE_QUEUE = "BeforeQueue"


class ModelCache(ApiModel):
    """A volume on which jobs share base models."""

    claim_name: Name = Field(
        description=(
            "PersistentVolumeClaim in the same namespace, of access mode ReadWriteMany, or of another one where all jobs run on one node. "
            "Models that were not used for the longest time leave it when there is no room."
        )
    )
    fetch: CacheFetch = Field(
        CacheFetch.WHILE_QUEUED,
        description=(
            "With queue.name. WhileQueued: the training Job joins its queue as soon as the plan stands, and the base model is fetched while it "
            "waits there; if it is admitted before that is done, its GPUs wait for the rest. BeforeQueue: it joins its queue when the base "
            "model is in the cache. Without a queue the base model is always fetched first."
        ),
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


_ADAPTER_KNOWS_NO_NEW = "initialAdapter knows no new tokens: leave newTokens out, or train afresh"


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
    new_tokens: Annotated[list[NewToken], Field(min_length=1, max_length=256)] | None = Field(
        None,
        description=(
            "Tokens that the tokenizer gets in addition, such as <tool_call>: plain ones, which stand in answers as any text does. Their rows of the "
            "embeddings begin as the mean of all others, and are trained. Needs the whole base model on each GPU; vLLM serves such a model merged only."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model repository ships.")
    cache: ModelCache | None = Field(
        None,
        description=(
            "Where the base model is kept between jobs (hf:// and s3://). It is fetched on a CPU, before a GPU is asked for or while the "
            "training Job waits in its queue, and the later stages use it where it lies."
        ),
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.revision) || self.uri.startsWith('hf://')", "revision applies to hf:// models only"),
            (
                "!has(self.cache) || !self.uri.startsWith('pvc://')",
                "a pvc:// model is used where it lies: cache applies to others",
            ),
            (
                "!has(self.initialAdapter) || !has(self.newTokens)",
                _ADAPTER_KNOWS_NO_NEW,
            ),
        )
    )

    @model_validator(mode="after")
    def _new_tokens_are_trained_afresh(self) -> Model:
        if self.new_tokens and self.initial_adapter is not None:
            raise ValueError(_ADAPTER_KNOWS_NO_NEW)
        return self
