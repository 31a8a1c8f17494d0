"""What several parts of a spec refer to: objects by name, and stores."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import Name


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
