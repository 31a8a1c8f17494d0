"""``spec.compute`` and ``spec.queue``: the resources of the training pods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import LabelValue, Name, Quantity

MOST_GPUS_PER_NODE = 8


MOST_NODES = 64


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
