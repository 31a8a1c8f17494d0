"""What stands around an AdapterCombination's spec: the frozen input of its pod, what that leaves in the bucket, and its status.

Layout below ``<output.uri>/<name>-<uid8>/``::

    adapter/            adapter_config.json, adapter_model.safetensors, README.md (model card); tokenizer and chat template, if all adapters have the same
    manifest.json       written last: no manifest, no result
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.names import job_key
from finetune_api.results import FileRecord, Sha256
from finetune_api.snapshot import JobIdentity
from finetune_api.spec import AdapterCombinationSpec, CombinationRuntime, CombinationType
from finetune_api.status import DATE_TIME, Conditions
from finetune_api.uris import S3Location, parse_uri

COMBINATION_VERSION = 1
SNAPSHOT_VERSION = 1


def combination_output(spec: AdapterCombinationSpec, name: str, uid: str) -> S3Location:
    """The prefix of everything that a combination publishes."""
    location = parse_uri(spec.output.uri)
    assert isinstance(location, S3Location)  # the spec's pattern allows nothing else
    return location.join(job_key(name, uid))


class CombinationSnapshot(ApiModel):
    """Input of the combine stage."""

    version: int = SNAPSHOT_VERSION
    job: JobIdentity
    """Which AdapterCombination this is."""
    spec: AdapterCombinationSpec

    @property
    def output(self) -> S3Location:
        """``<output.uri>/<name>-<uid8>``."""
        return combination_output(self.spec, self.job.name, self.job.uid)

    def canonical_json(self) -> str:
        """One byte form per value: sorted keys, no white space."""
        return json.dumps(self.to_json_dict(), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of what decides the result: where and for how long its pod runs does not."""
        what = self.spec.model_copy(update={"runtime": CombinationRuntime()})
        return hashlib.sha256(self.model_copy(update={"spec": what}).canonical_json().encode()).hexdigest()


class CombinedAdapter(ApiModel):
    """One of the adapters, as it was read."""

    uri: str
    commit: str | None = None
    """Of hf:// adapters."""
    weight: float
    rank: int
    """The highest of its modules."""
    modules: int
    files: list[FileRecord]
    """adapter_config.json and adapter_model.safetensors."""


class CombinationError(ApiModel):
    """How far the result, read back from the bucket, is from the weighted sum of the adapters: ‖ΔW − Σ wᵢ ΔWᵢ‖ / ‖Σ wᵢ ΔWᵢ‖ (Frobenius)."""

    whole: float
    """Over all modules together."""
    largest: float
    module: str
    """Where it is largest."""
    tolerance: float | None = None
    """What it had to be below; absent for types that mean something else than the sum."""


class CombinationManifest(ApiModel):
    """``manifest.json``, written last."""

    version: int = COMBINATION_VERSION
    combination: dict[str, object]
    """name, namespace, uid of the AdapterCombination."""
    base_model: str
    """As the adapters name it."""
    adapters: list[CombinedAdapter]
    type: CombinationType
    rank: int
    modules: int
    relative_error: CombinationError
    snapshot_digest: Sha256
    config: dict[str, object]
    """The spec, without its runtime."""
    versions: dict[str, str]
    warnings: list[str] = []
    created_at: str
    files: list[FileRecord]


class CombineReport(ApiModel):
    """What the operator learns of a finished combine stage."""

    base_model: str
    rank: int
    modules: int
    relative_error: float
    exact: bool
    """Whether that had to be nothing but rounding."""
    adapter_bytes: int
    adapter_sha256: Sha256
    """Of adapter_model.safetensors."""
    warnings: list[str] = []


class CombinationPhase(StrEnum):
    """A one-word summary for people; machines read conditions."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class CombinationArtifacts(ApiModel):
    """Where the result is."""

    uri: str
    manifest_uri: str = Field(alias="manifestURI")
    adapter_uri: str = Field(alias="adapterURI", description="What a FineTuneJob's model.initialAdapter.uri may name.")
    adapter_bytes: int | None = None
    adapter_sha256: str | None = Field(None, alias="adapterSHA256", description="Of adapter_model.safetensors.")


class AdapterCombinationStatus(ApiModel):
    """Observed state."""

    phase: CombinationPhase | None = None
    observed_generation: int | None = None
    message: str | None = Field(None, description="One sentence for people: what happens now or how it ended.")
    conditions: Conditions = []
    start_time: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None
    completion_time: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None
    base_model: str | None = None
    rank: int | None = Field(None, description="Of the combined adapter.")
    modules: int | None = Field(None, description="How many layers it adapts.")
    relative_error: float | None = Field(
        None, description="How far the result is from the weighted sum of the adapters, relative to that."
    )
    artifacts: CombinationArtifacts | None = None
    warnings: Annotated[list[str], Field(max_length=32)] | None = Field(
        None, json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
