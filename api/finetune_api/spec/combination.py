"""``AdapterCombination.spec``: which adapters are combined, how, and where the result goes.

Rules stand here in CEL and in Python, in the same words.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import LABEL_KEYS, AnnotationMap, LabelMap, Name, Rank, cel
from finetune_api.spec.references import LocalObjectReference, RemoteSource
from finetune_api.spec.runtime import EnvVar, Toleration
from finetune_api.uris import MODEL_URI_PATTERN, OUTPUT_URI_PATTERN

MOST_ADAPTERS = 16


class CombinationType(StrEnum):
    """How adapters are combined (``combination_type`` of peft's ``add_weighted_adapter``)."""

    LINEAR = "Linear"
    CAT = "Cat"
    SVD = "SVD"
    TIES = "TIES"
    DARE_LINEAR = "DARELinear"
    DARE_TIES = "DARETIES"
    MAGNITUDE_PRUNE = "MagnitudePrune"


PRUNING = (
    CombinationType.TIES,
    CombinationType.DARE_LINEAR,
    CombinationType.DARE_TIES,
    CombinationType.MAGNITUDE_PRUNE,
)
ELECTING = (CombinationType.TIES, CombinationType.DARE_TIES)
DRAWING = (CombinationType.DARE_LINEAR, CombinationType.DARE_TIES)
"""Types that prune, that elect a sign for each value, and that draw at random."""


class MajoritySign(StrEnum):
    """Whose sign wins where adapters disagree: that of the sum, or that of most of them."""

    TOTAL = "Total"
    FREQUENCY = "Frequency"


_REVISION = "revision applies to hf:// adapters only"
_WEIGHT = "weight must not be 0: leave the adapter out"


class WeightedAdapter(RemoteSource):
    """A LoRA adapter of peft's (adapter_config.json, adapter_model.safetensors), and how much of it goes in."""

    uri: Annotated[str, StringConstraints(pattern=MODEL_URI_PATTERN, max_length=2048)] = Field(
        description=(
            "hf://org/name, s3://bucket/prefix or pvc://claim/path of the adapter's folder, such as the adapter/ of a FineTuneJob's output."
        )
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="Branch, tag or commit (hf:// only)."
    )
    weight: Annotated[float, Field(ge=-100, le=100)] = Field(
        1.0, description="Its update is multiplied by this. A negative one takes away what the adapter has learned."
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("!has(self.revision) || self.uri.startsWith('hf://')", _REVISION),
            ("self.weight != 0.0", _WEIGHT),
        )
    )

    @model_validator(mode="after")
    def _as_the_api_server_checks(self) -> WeightedAdapter:
        if self.revision is not None and not self.uri.startswith("hf://"):
            raise ValueError(_REVISION)
        if self.weight == 0:
            raise ValueError(_WEIGHT)
        return self


class CombinationOutput(RemoteSource):
    """Where the result goes: s3://bucket/prefix/<name>-<first 8 characters of the UID>/. It stays when the resource is deleted."""

    uri: Annotated[str, StringConstraints(pattern=OUTPUT_URI_PATTERN, max_length=2048)] = Field(
        description="s3://bucket/prefix"
    )


class CombinationRuntime(ApiModel):
    """How the pod runs."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        None, description="Built on the trainer image; the default is the operator's own."
    )
    service_account_name: Name | None = Field(None, description="For workload identity. No token of it is mounted.")
    node_selector: LabelMap | None = Field(
        None, description="Node labels the pod requires.", json_schema_extra=LABEL_KEYS
    )
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = Field(
        None, description="Tolerations of the pod.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] | None = Field(
        None,
        description="Environment of the container.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    labels: LabelMap | None = Field(None, description="Labels of the pod.", json_schema_extra=LABEL_KEYS)
    annotations: AnnotationMap | None = Field(None, description="Annotations of the pod.", json_schema_extra=LABEL_KEYS)
    image_pull_secrets: Annotated[list[LocalObjectReference], Field(max_length=8)] | None = Field(
        None, json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )


def _one_of(types: Iterable[CombinationType]) -> str:
    return f"self.type in [{', '.join(repr(t.value) for t in types)}]"


_DENSITY = "density, the share of values that is kept, is set for TIES, DARELinear, DARETIES and MagnitudePrune, and for no other type"
_SIGN = "majoritySign applies to TIES and DARETIES only"
_RANK = "rank applies to SVD only: the ranks of the others follow from the adapters"
_SEED = "seed applies to DARELinear and DARETIES only: the others draw nothing"
_IMMUTABLE = "spec is immutable: create a new AdapterCombination instead"


class AdapterCombinationSpec(ApiModel):
    """What is combined, how, and where the result goes."""

    adapters: Annotated[list[WeightedAdapter], Field(min_length=2, max_length=MOST_ADAPTERS)] = Field(
        description="LoRA adapters of one base model.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    type: CombinationType = Field(
        CombinationType.CAT,
        description=(
            "Cat: the exact weighted sum; its rank is the sum of the ranks. SVD: the best adapter of a given rank. Linear: A to A and B to B, rough, of one "
            "rank. TIES, DARELinear, DARETIES, MagnitudePrune: Linear after pruning and, for TIES and DARETIES, the election of signs."
        ),
    )
    density: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of the values that is kept: the largest ones, or with DARE random ones."
    )
    majority_sign: MajoritySign | None = Field(None, description="The default is Total.")
    rank: Rank | None = Field(None, description="The default is the highest rank of the adapters.")
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = Field(
        None, description="Of DARE's draws; the default is 0. The same seed gives the same adapter."
    )
    output: CombinationOutput
    runtime: CombinationRuntime = Field(default_factory=CombinationRuntime)
    active_deadline_seconds: Annotated[int, Field(ge=1, le=2_147_483_647)] = Field(
        3600, description="Longest time until it is done, waiting for what is missing included; then it fails."
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = Field(
        None,
        description="The AdapterCombination is deleted so long after it finished; the result stays in the bucket.",
    )

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self == oldSelf", _IMMUTABLE),
            (f"has(self.density) == ({_one_of(PRUNING)})", _DENSITY),
            (f"!has(self.majoritySign) || {_one_of(ELECTING)}", _SIGN),
            ("!has(self.rank) || self.type == 'SVD'", _RANK),
            (f"!has(self.seed) || {_one_of(DRAWING)}", _SEED),
        )
    )

    @model_validator(mode="after")
    def _as_the_api_server_checks(self) -> AdapterCombinationSpec:
        broken = (
            (_DENSITY, (self.density is not None) != (self.type in PRUNING)),
            (_SIGN, self.majority_sign is not None and self.type not in ELECTING),
            (_RANK, self.rank is not None and self.type is not CombinationType.SVD),
            (_SEED, self.seed is not None and self.type not in DRAWING),
        )
        for message, is_broken in broken:
            if is_broken:
                raise ValueError(message)
        return self
