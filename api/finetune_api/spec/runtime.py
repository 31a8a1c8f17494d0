"""``spec.runtime``: how the pods run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import LABEL_KEYS, AnnotationMap, LabelMap, LabelValue, Name, ShortText
from finetune_api.spec.references import LocalObjectReference


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
